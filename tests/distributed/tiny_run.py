"""A run small enough for many of them in one launch: its configuration, batches and weights.

Sizes are odd on purpose, so that shards end inside tensors and are padded on 2 and on 3 ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinoscale.config import RunConfig, RunPlan, parse_config, resolve

BATCH, STEPS_PER_EPOCH = 6, 2

_CONFIG: dict[str, dict[str, Any]] = {
    "model": {
        "backbone": "vit_tiny_patch16_224",
        "patch_size": 8,
        "embed_dim": 20,
        "depth": 2,
        "num_heads": 2,
        "drop_path_rate": 0.0,
    },
    "head": {"num_prototypes": 33, "hidden_dim": 22, "bottleneck_dim": 15},
    "crops": {"global_size": 16, "local_size": 8, "num_local": 2},
    "dino": {"momentum": 0.9, "freeze_last_layer_epochs": 0},
    "optim": {"lr": 0.1, "warmup_epochs": 0},
    "train": {"epochs": 10, "batch_size": BATCH, "micro_batch_size": BATCH},
    "data": {"num_workers": 0},
    "eval": {"crop": 16, "resize": 16},
    "log": {"wandb": False, "every_steps": 1},
}


def tiny_config(run_dir: str = "unused", **changes: dict[str, Any]) -> RunConfig:
    """The configuration with some sections changed: `tiny_config(engine={"zero_stage": 3})`."""
    sections = {
        name: _CONFIG.get(name, {}) | changes.get(name, {}) for name in _CONFIG.keys() | changes
    }
    return parse_config({"run_dir": run_dir, **sections})


def dinov2(
    targets: str, *, patch_head: bool, **changes: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Changes for `tiny_config`: DINOv2's objective with all its terms, and further changes.

    Args:
        targets: `centering` or `sinkhorn_knopp`.
        patch_head: whether masked patches have a head of their own.
        changes: of sections.
    """
    sections: dict[str, dict[str, Any]] = {
        "crops": {"global_size": 32, "local_size": 16},  # masks need 4 x 4 patches
        "dino": {"targets": targets},
        "ibot": {"loss_weight": 1.0, "mask_rule": "dinov2", "mask_group": 1},
        "koleo": {"loss_weight": 0.1},
    }
    if patch_head:
        sections["patch_head"] = {"num_prototypes": 29, "hidden_dim": 18, "bottleneck_dim": 13}
    names = sections.keys() | changes
    return {name: sections.get(name, {}) | changes.get(name, {}) for name in names}


def tiny_plan(config: RunConfig) -> RunPlan:
    """The plan for the ranks at hand, with `STEPS_PER_EPOCH` steps an epoch."""
    from dinoscale.runtime import distributed

    images = config.train.batch_size * STEPS_PER_EPOCH
    return resolve(config, world_size=distributed.world_size(), num_images=images)


def micro_batches(config: RunConfig, plan: RunPlan, step: int) -> list[Any]:
    """This rank's share of a random global batch that depends on the step only, on the CPU.

    Without stochastic depth, unless as subsets; with the masks and rotary coordinates of a run.
    """
    from dinoscale.engine.frozen.gram import crop_size_of
    from dinoscale.engine.micro_batch import MicroBatch
    from dinoscale.runtime import distributed
    from dinoscale.training.feed import coordinates_of, masks_of

    crops, size = config.crops, plan.micro_batch_size
    generator = torch.Generator().manual_seed(step)

    def images(views: int, side: int) -> Tensor:
        return torch.randn(views, plan.batch_size, 3, side, side, generator=generator)

    wholes = images(2, crops.global_size), images(crops.num_local, crops.local_size)
    gram_whole = images(2, crop_size_of(config)) if config.gram.loss_weight else None
    batches = []
    for micro in range(plan.accumulation_steps):
        first = (micro * plan.world_size + distributed.rank()) * size
        keep = None
        if config.model.drop_path_mode == "subset":
            keep = torch.rand(
                config.model.depth or 0, 2, (2 + crops.num_local) * size, generator=generator
            )
        crops_of_rank = (whole[:, first : first + size] for whole in wholes)
        masks = masks_of(config, step=step, first_image=first, images=size)
        coordinates = coordinates_of(config, step=step, depth=config.model.depth or 0)
        gram = None if gram_whole is None else gram_whole[:, first : first + size]
        batches.append(MicroBatch(*crops_of_rank, keep, masks, coordinates, gram))
    return batches


def on_device(batch: Any, device: torch.device) -> Any:
    """A micro-batch without stochastic depth, moved."""
    from dinoscale.data.augmentation.masks import Masks
    from dinoscale.engine.micro_batch import MicroBatch

    masks = None if batch.masks is None else Masks(*(part.to(device) for part in batch.masks))
    gram = None if batch.gram_crops is None else batch.gram_crops.to(device)
    crops = batch.global_crops.to(device), batch.local_crops.to(device)
    return MicroBatch(*crops, None, masks, gram_crops=gram)


def take_step(student: Any, teacher: Any, config: RunConfig, plan: RunPlan, step: int) -> float:
    """One `train_step` on `micro_batches`; its loss."""
    from dinoscale.engine.build import loss_weights_of, schedules_of
    from dinoscale.engine.step import train_step

    now = schedules_of(config, plan).at(step)
    batches = micro_batches(config, plan, step)
    weights = loss_weights_of(config)
    return train_step(batches, student, teacher, now, loss_weights=weights).loss


class Gathering:
    """Collects the parts of all ranks, one (numel,) part per fragment of a student's layout."""

    def __init__(self, student: Any) -> None:
        from dinoscale.runtime import distributed

        own = [(f.name, f.start, f.numel) for f in student.layout.fragments]
        self._all_ranks = distributed.gather_objects(own)
        self._size = max(sum(numel for *_, numel in pieces) for pieces in self._all_ranks)
        self._shapes = student.shapes

    def __call__(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """Full tensors by name, float32, on every rank; NaN where no rank has anything."""
        from dinoscale.runtime import distributed

        padded = torch.zeros(self._size)
        own = torch.cat([torch.empty(0), *parts])
        padded[: len(own)] = own
        of_ranks = torch.empty(len(self._all_ranks) * self._size)
        distributed.all_gather_flat(of_ranks, padded)
        whole = {
            name: torch.full((torch.Size(shape).numel(),), torch.nan)
            for name, shape in self._shapes.items()
        }
        for pieces, rest in zip(self._all_ranks, of_ranks.split(self._size), strict=True):
            for name, start, numel in pieces:
                whole[name][start : start + numel] = rest[:numel]
                rest = rest[numel:]
        return {name: flat.view(self._shapes[name]) for name, flat in whole.items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """L2 norm of the difference, all tensors together."""
    assert a.keys() == b.keys()
    return float(
        torch.stack([(a[n].double() - b[n].double()).square().sum() for n in a]).sum().sqrt()
    )
