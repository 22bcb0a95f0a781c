"""Weights files: one backbone in safetensors, with a card of its architecture and preprocessing.

Loading is strict in both directions and counts tensors: weights that lack a tensor, have one too
many or one of another shape are refused by name, never partly loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dinoscale.checkpoint.checksums import flush
from dinoscale.convert.card import METADATA_KEY, BackboneCard, BackboneShape
from dinoscale.convert.coverage import Coverage, coverage_of, listed
from dinoscale.convert.read_files import remove_cards_of
from dinoscale.convert.source import read_source
from dinoscale.convert.weights import Network, Weights
from dinoscale.errors import CheckpointError, ConfigError
from dinoscale.models.convnet import ConvNet
from dinoscale.models.heads import DinoHead
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.zoo import build_backbone
from dinoscale.runtime.outputs import require_ours, staging_folder, swap, write_tensors

__all__ = [
    "BackboneCard",
    "BackboneShape",
    "build",
    "build_head",
    "expected_tensors",
    "load_backbone",
    "save_backbone",
]

log = logging.getLogger(__name__)


def save_backbone(path: str | Path, state: Mapping[str, Tensor], card: BackboneCard) -> None:
    """Write a weights file, whole or not at all: beside the target first, then renamed.

    Args:
        path: of the file; folders above it are made, and a file that we wrote is replaced.
        state: the backbone's tensors under the reference's names, on any device.
        card: its architecture and preprocessing.

    Raises:
        OutputError: a file is there that is not ours.
        OSError: it cannot be written.
    """
    target = Path(path)
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    require_ours(target)
    with staging_folder(target) as folder:
        beside = folder / target.name
        write_tensors(tensors, beside, metadata={METADATA_KEY: card.to_json()})
        flush(beside)
        swap(beside, target)
    remove_cards_of(target)


def load_backbone(
    path: str | Path, *, network: Network = "teacher", num_heads: int | None = None
) -> tuple[VisionTransformer | ConvNet, BackboneCard]:
    """Build the backbone of any source of weights.

    Args:
        path: a run or one of its checkpoints, a weights file of ours, the reference's, timm's or
            Hugging Face's, or a folder of theirs; see `source.read_source`.
        network: which network of a run or full checkpoint to take.
        num_heads: for files that do not store it and whose heads are not 64 channels wide.

    Returns:
        The backbone on the CPU, float32, in eval mode, without gradients; and its card.

    Raises:
        CheckpointError: the file is missing, damaged, unknown, or does not fit its architecture.
    """
    weights = read_source(path, network=network, num_heads=num_heads)
    try:
        backbone, coverage = build(weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    log.info("%s: %s loaded", path, coverage)
    if weights.left_out:
        log.info("%s: not part of the backbone: %s", path, ", ".join(weights.left_out))
    return backbone, weights.card


def build(weights: Weights) -> tuple[VisionTransformer | ConvNet, Coverage]:
    """Build the backbone of weights; all tensors must fit.

    Returns:
        The backbone on the CPU, float32, in eval mode, without gradients; and the coverage.

    Raises:
        CheckpointError: it cannot be built, or tensors are missing, left over, of another shape or
            not finite, all by name.
    """
    coverage = coverage_of(weights.backbone, expected_tensors(weights))
    if not coverage.complete:
        raise CheckpointError(str(coverage))
    with torch.device("meta"):  # skips the random initialisation
        backbone = build_backbone(**vars(weights.card.backbone))
    tensors = {
        name: weights.backbone[name].to(value.dtype).contiguous()
        for name, value in backbone.state_dict().items()
    }
    backbone.load_state_dict(tensors, assign=True)
    return backbone.eval().requires_grad_(False), coverage


def build_head(state: Mapping[str, Tensor]) -> DinoHead:
    """Build the projection head of `Weights.head`; all tensors must fit.

    Returns:
        The head on the CPU, float32, in eval mode, without gradients.

    Raises:
        CheckpointError: they are not the tensors of a head; all by name.
    """
    linear = [x for name, x in state.items() if name.startswith("mlp.") and x.ndim == 2]
    plain = state.get("last_layer.weight")
    prototypes = state.get("last_layer.weight_v") if plain is None else plain
    if not linear or prototypes is None:
        raise CheckpointError(f"has no DINO projection head, only {listed([*state])}")
    with torch.device("meta"):
        head = DinoHead(
            linear[0].shape[1],
            num_prototypes=len(prototypes),
            hidden_dim=len(linear[0]),
            bottleneck_dim=len(linear[-1]),
            num_layers=len(linear),
            norm_last_layer=plain is None and "last_layer.weight_g" not in state,
            weight_norm=plain is None,
            batch_norm=any(name.endswith(".running_mean") for name in state),
        )
    coverage = coverage_of(state, head.state_dict())
    if not coverage.complete:
        raise CheckpointError(f"its projection head has {coverage}")
    head.to_empty(device="cpu").load_state_dict(dict(state))
    return head.eval().requires_grad_(False)


def expected_tensors(weights: Weights) -> dict[str, Tensor]:
    """All tensors of the card's architecture, on the meta device.

    Raises:
        CheckpointError: it cannot be built.
    """
    shape = weights.card.backbone
    if (shape.depth or 0) > len(weights.backbone):
        blocks = shape.depth
        raise CheckpointError(f"{len(weights.backbone)} tensors cannot be {blocks} blocks of a ViT")
    try:
        with torch.device("meta"):  # takes no memory, whatever sizes the file claims
            return build_backbone(**vars(shape)).state_dict()
    except (ConfigError, ValueError) as error:
        raise CheckpointError(f"its backbone cannot be built: {error}") from error
