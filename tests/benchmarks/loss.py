"""`python -m tests.benchmarks.loss`: the loss, forward and backward, ours and pair by pair.

Two comparisons, turn by turn: of the loss alone, from given logits to their gradient; and of the
prototype layer with the loss, from unit vectors to the gradients of vectors and prototypes, which
is what a step runs and where the logits need not exist. The pair-by-pair form is that of the
authors' code; in bf16 it runs under autocast, as theirs does in float16, and ours as in a bf16 run,
where the prototypes are bf16 and the arithmetic is float32. Memory is that of all tensors at the
peak, inputs included.
"""

import argparse
import json
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscale.losses.dino import dino_loss, dino_loss_of_prototypes
from tests.benchmarks.forms import compare_forms

NUM_TEACHERS, TEMP = 2, 0.1
LIMIT_S = 150.0  # of all turns of one comparison, of two


def pair_by_pair(logits: Tensor, teacher_probs: Tensor) -> Tensor:
    """Equation 3 of the paper in the form of the authors' code, logits (S*B, K)."""
    views = (logits / TEMP).chunk(len(logits) // teacher_probs.shape[1])
    total, num_pairs = logits.new_zeros(()), 0
    for t, targets in enumerate(teacher_probs):
        for s, view in enumerate(views):
            if s == t:
                continue
            total = total + torch.sum(-targets * F.log_softmax(view, dim=-1), dim=-1).mean()
            num_pairs += 1
    return total / num_pairs


def measure(
    *, crops: int, batch: int, prototypes: int, width: int, precision: str, turns: int
) -> dict[str, Any]:
    """Seconds, bytes and ratios of both comparisons.

    Args:
        crops: S, student crops of an image.
        batch: B, images.
        prototypes: K.
        width: D, of the vectors that meet the prototypes.
        precision: bf16 or fp32.
        turns: measurements of each form, in turn.

    Returns:
        JSON-able: for each comparison the seconds (median, least, largest), peak bytes and the
        ratios pair by pair / ours within a turn.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    low = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    x = F.normalize(torch.randn(crops * batch, width, device=device), dim=-1)
    v = torch.randn(prototypes, width, device=device).to(low)
    targets = torch.randn(NUM_TEACHERS, batch, prototypes, device=device).softmax(-1)
    compare = partial(compare_forms, turns=turns, low=low, limit_s=LIMIT_S)
    with_layer = compare(
        {
            "ours": lambda x, v: dino_loss_of_prototypes(
                x, v, None, teacher_probs=targets, student_temp=TEMP
            )[0],
            "pair by pair": lambda x, v: pair_by_pair(F.linear(x, F.normalize(v, dim=-1)), targets),
        },
        (x, v),
    )
    logits = F.linear(x.to(low), F.normalize(v, dim=-1))
    del x, v
    alone = compare(
        {
            "ours": lambda z: dino_loss(z.unflatten(0, (crops, batch)), targets, student_temp=TEMP),
            "pair by pair": lambda z: pair_by_pair(z, targets),
        },
        (logits,),
    )
    return {
        "crops": crops,
        "batch": batch,
        "prototypes": prototypes,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "precision": precision,
        "loss_alone": alone,
        "prototypes_and_loss": with_layer,
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.loss", description=__doc__)
    parser.add_argument("--crops", type=int, default=12, metavar="S", help="default 12")
    parser.add_argument("--batch", type=int, default=64, metavar="B", help="images; default 64")
    parser.add_argument("--prototypes", type=int, default=65536, metavar="K", help="default 65536")
    parser.add_argument("--width", type=int, default=256, metavar="D", help="default 256")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--turns", type=int, default=5, help="default 5")
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
