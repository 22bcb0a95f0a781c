"""`python -m tests.faults --kills N --stage S --seed R`: one JSON line on stdout.

Exit code 1 if a kill changed the run.
"""

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from tests.faults.kills import OBJECTIVES, run_kills


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description="Kill a small two-process run at random moments (a rank, all ranks, the"
        " launcher; at start, in steps, in saves), start it again each time, and compare with the"
        " same run left alone. bit_identical counts the kills after which everything on disk is"
        " the undisturbed run's, bit for bit; lost_steps those that were taken twice.",
    )
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--stage", type=int, default=2, choices=range(4), help="ZeRO stage")
    parser.add_argument(
        "--objective",
        default="dino",
        choices=OBJECTIVES,
        help="DINO, DINOv2 by its targets, or from weights of a run: adapters (stages 0 to 2), a"
        " student of a frozen teacher with heads or of its features alone",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="R", help="of the moments")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed prints a warning among the result
    with tempfile.TemporaryDirectory() as folder:
        tally = run_kills(
            Path(folder),
            kills=options.kills,
            stage=options.stage,
            seed=options.seed,
            objective=options.objective,
        )
    found = asdict(tally)
    print(json.dumps({k: found[k] for k in ("kills", "resumed", "bit_identical", "lost_steps")}))
    if tally.bit_identical < tally.kills:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
