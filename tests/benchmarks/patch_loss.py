"""`python -m tests.benchmarks.patch_loss`: targets and loss of masked patches, ours and literal.

From unit vectors of student and teacher to the gradients of the student's vectors and prototypes:
prototype layers, Sinkhorn-Knopp and cross-entropy, turn by turn. The literal form holds all logits
and iterates on the whole matrix of assignments, as the authors' code does; in bf16 its products run
under autocast, and ours as in a bf16 run, where the prototypes are bf16 and the arithmetic is
float32. Memory is that of all tensors at the peak, inputs included.
"""

import argparse
import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscale.losses.ibot import PatchTargets, patch_loss_of_prototypes
from dinoscale.losses.sinkhorn import sinkhorn_center
from tests.benchmarks.forms import compare_forms

TEMP, STUDENT_TEMP, ITERATIONS = 0.07, 0.1, 3
LIMIT_S = 300.0  # of all turns


@torch.no_grad()
def literal_targets(logits: Tensor) -> Tensor:
    """Sinkhorn-Knopp on the matrix of assignments, logits and targets (M, K)."""
    q = torch.exp(logits.float() / TEMP).t()
    num_prototypes, num_samples = q.shape
    q /= q.sum()
    for _ in range(ITERATIONS):
        q /= q.sum(dim=1, keepdim=True)
        q /= num_prototypes
        q /= q.sum(dim=0, keepdim=True)
        q /= num_samples
    q *= num_samples
    return q.t()


def literal_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the cross-entropies of all patches from logits (M, K)."""
    each = torch.sum(targets * F.log_softmax(logits.float() / STUDENT_TEMP, dim=-1), dim=-1)
    return -(each * weights).sum()


def measure(
    *, patches: int, prototypes: int, width: int, precision: str, turns: int
) -> dict[str, Any]:
    """Seconds, bytes and ratios.

    Args:
        patches: M, masked patches of the student, and samples of the teacher.
        prototypes: K.
        width: D, of the vectors that meet the prototypes.
        precision: bf16 or fp32.
        turns: measurements of each form, in turn.

    Returns:
        JSON-able: see `compare_forms`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    low = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    x, features = F.normalize(torch.randn(2, patches, width, device=device), dim=-1)
    v, teacher_v = torch.randn(2, prototypes, width, device=device).to(low)
    weights = torch.full((patches,), 1 / 80, device=device)

    def ours(x: Tensor, v: Tensor) -> Tensor:
        center = sinkhorn_center(
            [features],
            teacher_v,
            None,
            temp=TEMP,
            iterations=ITERATIONS,
            sum_over_ranks=torch.clone,
            max_over_ranks=torch.clone,
        )
        targets = PatchTargets(features, teacher_v, None, center=center, temp=TEMP)
        return patch_loss_of_prototypes(
            x, v, None, targets=targets, weights=weights, student_temp=STUDENT_TEMP
        )[0]

    def literal(x: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            logits = F.linear(features, F.normalize(teacher_v, dim=-1))
        targets = literal_targets(logits)
        del logits
        return literal_loss(F.linear(x, F.normalize(v, dim=-1)), targets, weights)

    result = compare_forms(
        {"ours": ours, "literal": literal}, (x, v), turns=turns, low=low, limit_s=LIMIT_S
    )
    return {
        "patches": patches,
        "prototypes": prototypes,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "precision": precision,
        **result,
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.patch_loss", description=__doc__
    )
    parser.add_argument("--patches", type=int, default=4000, metavar="M", help="default 4000")
    parser.add_argument("--prototypes", type=int, default=65536, metavar="K", help="default 65536")
    parser.add_argument("--width", type=int, default=256, metavar="D", help="default 256")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--turns", type=int, default=3, help="default 3")
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
