"""A checkpoint of a run as plain weights, on one process, from any ZeRO stage and world size."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dinoscale.checkpoint.layout import checkpoints, is_checkpoint, run_with_checkpoints
from dinoscale.checkpoint.load import EMA, MASTER, open_run
from dinoscale.config import RunConfig, parse_config
from dinoscale.convert.card import BackboneCard, BackboneShape
from dinoscale.convert.weights import Adapted, Network, Weights
from dinoscale.engine.build import layers_of
from dinoscale.models.network import MAPS
from dinoscale.models.weight_names import merged

_KINDS = {"teacher": EMA, "student": MASTER}


def is_run(path: Path) -> bool:
    """Whether a path is a run directory with a checkpoint, or one of its step_* directories.

    Raises:
        UnreadableError: it cannot be listed.
    """
    return path.is_dir() and (is_checkpoint(path) or bool(checkpoints(run_with_checkpoints(path))))


def read_run(
    path: Path, *, network: Network, heartbeat: Callable[[], None] = lambda: None
) -> Weights:
    """Merge one network of a checkpoint from the files of all ranks, float32, on the CPU.

    Memory: the network itself, and with adapters the matrices that they are merged into once more;
    each file is read once, front to back, directly into its tensors.

    Args:
        path: a run directory (its newest checkpoint) or one of its step_* directories.
        network: "teacher" or "student".
        heartbeat: called regularly.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    checkpoint = open_run(path, heartbeat)
    config = parse_config(checkpoint.state["config"], origin=str(checkpoint.path))
    tensors = checkpoint.full(_KINDS[network], heartbeat) | checkpoint.buffers(network)
    parts = {
        part: {
            name.removeprefix(part): tensor
            for name, tensor in tensors.items()
            if name.startswith(part)
        }
        for part in ("backbone.", "head.", "patch_head.")
    }
    adapted = None
    if config.lora.rank:
        adapted = Adapted(parts["backbone."], config.lora.rank, config.lora.alpha)
        parts["backbone."] = merged(parts["backbone."], scale=config.lora.scale)
    # A card is published: no folders above the run.
    name = "/".join(checkpoint.path.resolve().parts[-3:])
    card = replace(card_of(config, source=f"{name} {network}"), licence=checkpoint.licence)
    origin = {
        "checkpoint": name,
        "step": checkpoint.step,
        "knn_top1": checkpoint.knn_top1,
        "config": checkpoint.state["config"],
    }
    return Weights(
        parts["backbone."],
        parts["head."] or None,
        card,
        "run",
        run=origin,
        patch_head=parts["patch_head."] or None,
        maps={name: tensor for name, tensor in tensors.items() if name.startswith(MAPS)},
        adapted=adapted,
    )


def card_of(config: RunConfig, *, source: str) -> BackboneCard:
    """How to build the backbone of a run and prepare images for it."""
    model = config.model
    return BackboneCard(
        backbone=BackboneShape(
            name=model.backbone,
            img_size=config.crops.global_size,
            patch_size=model.patch_size,
            embed_dim=model.embed_dim,
            depth=model.depth,
            num_heads=model.num_heads,
            in_chans=config.data.channels,
            position_resize=model.position_resize,
            mask_token=config.ibot.loss_weight > 0,
            local_norm=model.local_norm,
            **layers_of(model),
        ),
        mean=config.data.mean,
        std=config.data.std,
        resize=config.eval.resize,
        crop=config.eval.crop,
        source=source,
        max_pixel_value=config.data.max_pixel_value,
    )
