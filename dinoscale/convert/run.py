"""A run's backbone as plain weights, on one process, from any ZeRO stage and world size."""

from pathlib import Path

from torch import Tensor

from dinoscale.checkpoint.load import EMA, MASTER, Checkpoint, open_run
from dinoscale.config import RunConfig, parse_config
from dinoscale.convert.card import BackboneCard, BackboneShape
from dinoscale.convert.weights_file import save_backbone

_KINDS = {"teacher": EMA, "student": MASTER}
_PREFIX = "backbone."


def export_backbone(run: Path, out: Path, *, network: str) -> dict[str, object]:
    """Write the float32 backbone of a checkpoint under the reference's names.

    Args:
        run: a run directory (its newest checkpoint) or one of its step_* directories.
        out: safetensors file to write; folders above it are made.
        network: "teacher" or "student".

    Returns:
        JSON-able summary.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    checkpoint = open_run(run)
    state = backbone_state(checkpoint, network=network)
    config = parse_config(checkpoint.state["config"], origin=str(checkpoint.path))
    save_backbone(out, state, card_of(config, source=f"{checkpoint.path} {network}"))
    return {
        "weights": str(out),
        "network": network,
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "tensors": len(state),
        "parameters": sum(tensor.numel() for tensor in state.values()),
    }


def backbone_state(checkpoint: Checkpoint, *, network: str) -> dict[str, Tensor]:
    """Parameters and buffers of a backbone, float32, under the reference's names."""
    tensors = checkpoint.full(_KINDS[network]) | checkpoint.buffers(network)
    return {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(_PREFIX)
    }


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
        ),
        mean=config.data.mean,
        std=config.data.std,
        resize=config.eval.resize,
        crop=config.eval.crop,
        source=source,
        white=config.data.white,
    )
