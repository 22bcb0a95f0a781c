"""What the tests with hostile input share: a tiny run, and a pickle that calls a function."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.forked import ROOT, run_module

SYNTHETIC = "synthetic:shapes?images=8&size=16"
TINY = {
    "model.patch_size": 8,
    "model.embed_dim": 32,
    "model.depth": 1,
    "model.num_heads": 1,
    "head.num_prototypes": 33,
    "head.hidden_dim": 22,
    "head.bottleneck_dim": 15,
    "crops.global_size": 16,
    "crops.local_size": 8,
    "crops.num_local": 2,
    "eval.crop": 16,
    "train.batch_size": 8,
    "train.epochs": 1,
    "optim.warmup_epochs": 0,
    "dino.warmup_teacher_temp_epochs": 0,
    "engine.precision": "fp32",
    "log.wandb": "false",
    "data.num_workers": 0,
}


def settings(**changed: object) -> list[str]:
    """Overrides of a run small enough for a test: `settings(data__train=...)` for one more."""
    more = {key.replace("__", "."): value for key, value in changed.items()}
    return [f"{key}={value}" for key, value in (TINY | more).items()]


def dinoscale(
    *arguments: object, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line with more environment variables."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return run_module("dinoscale", *arguments, cwd=cwd, environment=environment)


def refused(done: subprocess.CompletedProcess[str], *says: object) -> None:
    """Check that it ended with a sentence."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for text in says:
        assert str(text) in done.stderr


class Call:
    """Unpickling this calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments
