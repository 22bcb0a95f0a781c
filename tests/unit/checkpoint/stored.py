"""Checkpoints for tests, as `Saver` leaves them, without an engine."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dinoscale.checkpoint.checksums import flushed_sum, seal
from dinoscale.checkpoint.layout import directory, part_of, shard_file

SHAPES = {"backbone.a": (3, 5), "head.b": (7,)}
KINDS = ("master", "ema", "exp_avg")


def value_of(kind: str, name: str) -> Tensor:
    """Every element of a tensor is another number, (numel,) float32."""
    seed = 100 * KINDS.index(kind) + list(SHAPES).index(name)
    return torch.rand(
        torch.Size(SHAPES[name]).numel(), generator=torch.Generator().manual_seed(seed)
    )


def store(run_dir: Path, step: int, *, ranks: int, **state: object) -> Path:
    """Write a checkpoint of `ranks` ranks; returns its directory."""
    target = directory(run_dir, step)
    part = part_of(target)
    part.mkdir(parents=True)
    for rank in range(ranks):
        tensors: dict[str, Tensor] = {}
        starts: dict[str, int] = {}
        for name, shape in SHAPES.items():
            share = -(-torch.Size(shape).numel() // ranks)
            starts[name] = rank * share
            for kind in KINDS:
                piece = value_of(kind, name)[rank * share : (rank + 1) * share]
                if len(piece):
                    tensors[f"{kind}/{name}"] = piece
        save_file(tensors, part / shard_file(rank), metadata={"starts": json.dumps(starts)})
    save_file({"center": torch.zeros(2)}, part / "shared.safetensors")
    sections = {"config": {}, "plan": {}, "progress": {}, "optimizer_steps": {}}
    written = {"format": 2, "step": step, "shapes": SHAPES, **sections, **state}
    (part / "state.json").write_text(json.dumps(written))
    seal(part, target, {file.name: flushed_sum(file) for file in part.iterdir()})
    return target
