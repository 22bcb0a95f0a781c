"""Sweep files for tests: small, on drawn images."""

from pathlib import Path

from dinoscale.config.sweep.file import SweepConfig, load_sweep

HEAD = "base: quickstart\nout: runs/test\nmetrics: {loss: online}\n"
NO_SUCH_SET = "settings: {data.train: /nowhere/at/all}\n"
MODELS = "[{embed_dim: 32, depth: 2, head_dim: 16}, {embed_dim: 64, depth: 2, head_dim: 16}]"


def sweep_of(folder: Path, text: str, *, head: str = HEAD) -> SweepConfig:
    """Load a sweep from what follows the head."""
    path = folder / "sweep.yaml"
    path.write_text(head + text, encoding="utf-8")
    return load_sweep(path)
