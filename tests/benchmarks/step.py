"""`python -m tests.benchmarks.step`: a training step of ours and of the literal reference.

`dinoscale bench step` with the batch, crops and precision that the figures in README.md are for,
and an error instead of a note where there would be no ratio. Also under torchrun: --batch is of
one rank. JSON last.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dinoscale.config import load_config
from dinoscale.errors import ConfigError, DinoscaleError
from dinoscale.planning.bench.ceiling import matmul_rates
from dinoscale.planning.bench.step import bench_step
from dinoscale.runtime import distributed
from dinoscale.runtime.launcher_env import read_process


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result of `bench_step`, with ratios."""
    process = read_process(os.environ)
    distributed.start(process)
    precision = options.precision or distributed.broadcast_object(fastest(process.device))
    config = load_config(
        options.preset,
        [
            f"train.batch_size={options.batch * process.world_size}",
            f"train.micro_batch_size={options.batch}",
            f"crops.num_local={options.local_crops}",
            f"engine.precision={precision}",
            "optim.min_lr=0",  # else a small batch peaks below it
            *options.overrides,
        ],
    )
    result = bench_step(
        config,
        process,
        seconds=options.seconds,
        turns=options.turns,
        with_reference=True,
        trace_dir=Path(options.profile) if options.profile else None,
        limit_s=60 * options.minutes,
    )
    distributed.stop()
    if result["ratio"] is None:
        raise ConfigError(f"no reference to compare with: {result['no_reference']}")
    return result


def fastest(device: torch.device) -> str:
    """The precision whose products are faster: without instructions for it, bf16 takes minutes."""
    kinds = (torch.bfloat16, torch.float32)
    rates = matmul_rates(device, kinds, tokens=256, embed_dim=256)
    return "bf16" if rates[torch.bfloat16] > rates[torch.float32] else "fp32"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.step", description=__doc__)
    parser.add_argument("--preset", default="vit_s16", help="default vit_s16 (K = 65,536)")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="images (default 8)")
    parser.add_argument("--local-crops", type=int, default=8, metavar="n", help="default 8")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: the faster")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="of ours and the reference in each turn",
    )
    parser.add_argument(
        "--minutes", type=float, default=6.0, metavar="M", help="for all turns (default 6)"
    )
    parser.add_argument("--profile", metavar="DIR", help="also write chrome traces")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="win over all")
    try:
        result = measure(parser.parse_args(arguments))
    except DinoscaleError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    if int(os.environ["RANK"]) == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
