"""Read any SOURCE of weights: a run, or a file of ours, the reference's, timm's or Hugging Face's.

The format is recognised by the content, never by the name of the path; nothing is unpickled that
could run code. The name of a tensor alone decides to which network it belongs, and no name is
dropped silently: `Weights` keeps all tensors of the backbone, even those that the architecture does
not have, so that `weights_file.build` can refuse them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dinoscale.convert.card import parse_card
from dinoscale.convert.formats.convnets import (
    from_convnext,
    is_convnext,
    warn_of_same_tensors,
    with_batch_counts,
)
from dinoscale.convert.formats.dinov3 import dinov3_card, dinov3_shape, from_dinov3, is_dinov3
from dinoscale.convert.formats.hf_convnext import is_hf_convnext, read_hf_convnext
from dinoscale.convert.formats.hf_dinov3 import is_hf_dinov3, read_hf_dinov3
from dinoscale.convert.formats.huggingface import is_huggingface, read_huggingface
from dinoscale.convert.formats.licences import licence_note
from dinoscale.convert.formats.reference import (
    guess_shape,
    is_dinov2,
    network_state,
    reference_card,
    split,
)
from dinoscale.convert.formats.timm import is_timm, timm_card
from dinoscale.convert.formats.timm_dinov3 import from_timm_dinov3, is_timm_dinov3
from dinoscale.convert.read_files import Content, read_content
from dinoscale.convert.run_checkpoint import is_run, read_run
from dinoscale.convert.weights import Network, Weights
from dinoscale.errors import CheckpointError

# Values of `model_type` in config.json.
_OF_TRANSFORMERS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext")


def read_source(
    path: str | Path,
    *,
    network: Network = "teacher",
    num_heads: int | None = None,
    heartbeat: Callable[[], None] = lambda: None,
) -> Weights:
    """Read one network of a source, without building it.

    Args:
        path: a run directory (its newest checkpoint) or one of its step_*, at any ZeRO stage and
            world size; our own safetensors files; the reference's `.pth`, full or backbone only;
            a timm or Hugging Face folder or its weights file.
        network: which network of a run or full checkpoint to take; other files hold only one.
        num_heads: for files that do not store it and whose heads are not 64 channels wide.
        heartbeat: called regularly while the files of a run are read, and checksums compared.

    Raises:
        CheckpointError: nothing is there, it is damaged, its format is unknown, or it stores
            another number of heads; the text begins with the path.
    """
    try:
        if is_run(Path(path)):
            weights = read_run(Path(path), network=network, heartbeat=heartbeat)
        else:
            content = read_content(Path(path), heartbeat)
            weights = _weights_of(content, network=network, num_heads=num_heads)
        stored = weights.card.backbone.num_heads
        if num_heads not in (None, stored):
            raise CheckpointError(f"has num_heads={stored}, not {num_heads}; omit num_heads")
        return weights
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: does not fit into memory ({error or 'no more'})") from error


def _weights_of(content: Content, *, network: Network, num_heads: int | None) -> Weights:
    weights = _as_written(content, network=network, num_heads=num_heads)
    if content.card is not None:
        licence = parse_card(content.card).licence
    elif weights.is_rotary:
        licence = licence_note(content, "dinov3")
    elif is_convnext(weights.backbone):
        licence = licence_note(content, "convnext")
    else:
        licence = licence_note(content, "dinov2" if is_dinov2(weights.backbone) else "dino")
    return replace(weights, card=replace(weights.card, licence=licence))


def _as_written(content: Content, *, network: Network, num_heads: int | None) -> Weights:
    state = network_state(content.checkpoint, network=network)
    settings = content.settings or {}
    if settings.get("model_type", _OF_TRANSFORMERS[0]) not in _OF_TRANSFORMERS:
        raise CheckpointError(
            f"has a config.json with model_type {settings['model_type']!r}; of transformers,"
            f" dinoscale reads {', '.join(_OF_TRANSFORMERS)}"
        )
    if is_hf_dinov3(state, settings):
        return read_hf_dinov3(state, content, num_heads=num_heads)
    if is_hf_convnext(state, settings):
        return read_hf_convnext(state, content)
    if is_huggingface(state, settings):
        return read_huggingface(state, content, num_heads=num_heads)
    as_authors = is_dinov3(state)
    as_timm = is_timm_dinov3(state, settings, ours=content.card is not None)
    if is_convnext(state):
        renamed, outside = from_convnext(state)
        parts = split(renamed)
        parts = replace(parts, left_out=(*parts.left_out, *outside))
    elif as_authors or as_timm:
        parts = split(from_dinov3(state) if as_authors else from_timm_dinov3(state))
    else:
        parts = split(state)
        parts = replace(parts, backbone=with_batch_counts(parts.backbone))
    heads: dict[str, Any] = {"head": parts.head, "patch_head": parts.patch_head}
    if content.card is not None:
        if parts.left_out:
            raise CheckpointError(f"unexpected: {', '.join(parts.left_out)}")
        card = parse_card(content.card)
        return Weights(parts.backbone, card=card, kind="dinoscale", **heads)
    rest: dict[str, Any] = {**heads, "left_out": parts.left_out}
    if as_authors:
        card = dinov3_card(dinov3_shape(state, parts.backbone), source=content.name)
        return Weights(parts.backbone, card=card, kind="reference", **rest)
    if as_timm or is_timm(parts.backbone, settings):
        card = timm_card(parts.backbone, content, num_heads=num_heads, of_dinov3=as_timm)
        return Weights(parts.backbone, card=card, kind="timm", **rest)
    full = content.checkpoint
    args = full.get("args") if isinstance(full, Mapping) else None
    shape = guess_shape(parts.backbone, args=args, num_heads=num_heads)
    if args is None:  # else the reference's program wrote it
        warn_of_same_tensors(shape.name)
    card = reference_card(shape, source=content.name)
    return Weights(parts.backbone, card=card, kind="reference", **rest)
