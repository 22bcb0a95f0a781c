"""One file, one backbone: safetensors with a card that says how to build and feed it.

Loading is strict in both directions and counts what it found: a file that lacks a tensor, has one
too many or one of another shape is refused by name, never half loaded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dinoscale.convert.card import METADATA_KEY, BackboneCard, BackboneShape, parse_card
from dinoscale.convert.reference import Network, backbone_state, guess_card, read_torch_file
from dinoscale.errors import CheckpointError, ConfigError
from dinoscale.models.zoo import build_backbone

__all__ = ["BackboneCard", "BackboneShape", "load_backbone", "read_backbone", "save_backbone"]

log = logging.getLogger(__name__)

NAMES_SHOWN = 8  # of each kind of mismatch, in an error

_NO_WEIGHTS = (  # first bytes of what a failed download leaves behind
    (b"<", "is a web page or XML, not weights: download the file itself"),
    (b"version https://git-lfs", "is a Git LFS pointer, not weights: run `git lfs pull`"),
)


def save_backbone(path: str | Path, state: Mapping[str, Tensor], card: BackboneCard) -> None:
    """Write a weights file, whole or not at all: beside the target first, then renamed.

    Args:
        path: of the file; folders above it are made, an existing file is replaced.
        state: the backbone's tensors under the reference's names, on any device.
        card: how to build the backbone and prepare its images.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, beside, metadata={METADATA_KEY: card.to_json()})
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def load_backbone(
    path: str | Path, *, network: Network = "teacher", num_heads: int | None = None
) -> tuple[nn.Module, BackboneCard]:
    """Build the backbone of a weights file, or of a checkpoint of the reference implementation.

    Args:
        path: a `.safetensors` file of ours or under the reference's names, or a `.pth` file.
        network: which network of a full reference checkpoint to take.
        num_heads: for files without a card whose heads are not 64 channels wide.

    Returns:
        The backbone on the CPU, float32, in eval mode, without gradients; and its card.

    Raises:
        CheckpointError: the file is missing, damaged, unknown, or does not fit its architecture.
    """
    state, card = read_backbone(path, network=network, num_heads=num_heads)
    if (card.backbone.depth or 0) > len(state):
        blocks = card.backbone.depth
        raise CheckpointError(f"{path}: {len(state)} tensors cannot be {blocks} blocks of a ViT")
    try:
        with torch.device("meta"):  # takes no memory, whatever sizes the file claims
            expected = build_backbone(**asdict(card.backbone)).state_dict()
    except (ConfigError, ValueError) as error:
        raise CheckpointError(f"{path}: its backbone cannot be built: {error}") from error
    problem = _mismatch(state, expected)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    backbone = build_backbone(**asdict(card.backbone))
    backbone.load_state_dict(state)
    log.info("%s: %d of %d tensors loaded", path, len(state), len(expected))
    return backbone.eval().requires_grad_(False), card


def read_backbone(
    path: str | Path, *, network: Network = "teacher", num_heads: int | None = None
) -> tuple[dict[str, Tensor], BackboneCard]:
    """Read tensors and card without building the backbone; arguments as in `load_backbone`."""
    file = Path(path)
    try:
        start = _first_bytes(file)
        if start[8:9] == b"{":  # safetensors: the length of its header, then the header's JSON
            state, card_text = _read_safetensors(file)
            if card_text is not None:
                return state, parse_card(card_text)
            checkpoint: object = state
        elif start.startswith((b"PK", b"\x80")):  # a zip archive, or the older plain pickle
            checkpoint = read_torch_file(file)
        else:
            raise CheckpointError("is neither a safetensors nor a torch file")
        state = backbone_state(checkpoint, network=network)
        args = checkpoint.get("args") if isinstance(checkpoint, Mapping) else None
        return state, guess_card(state, args=args, num_heads=num_heads, source=file.name)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _first_bytes(file: Path) -> bytes:
    """Read the start of a file that may hold weights; say so if it cannot."""
    if file.is_dir():
        raise CheckpointError("is a folder, not a weights file")
    try:
        with file.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})") from error
    if not start:
        raise CheckpointError("is an empty file")
    for signature, reason in _NO_WEIGHTS:
        if start.lstrip().startswith(signature) and start[8:9] != b"{":
            raise CheckpointError(reason)
    return start


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safe_open(file, framework="pt") as tensors:
            card = (tensors.metadata() or {}).get(METADATA_KEY)
            return {name: tensors.get_tensor(name) for name in tensors.keys()}, card  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"is not a complete safetensors file ({error})") from error


def _mismatch(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Say in one sentence how two states differ, or where one is not finite; empty if all fits."""
    common = [name for name in expected if name in state]
    shapes = [
        f"{name} {[*state[name].shape]} for {[*expected[name].shape]}"
        for name in common
        if state[name].shape != expected[name].shape
    ]
    kinds = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": shapes,
        "not finite": [name for name in common if not torch.isfinite(state[name]).all()],
    }
    wrong = [f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    if not wrong:
        return ""
    coverage = f"{len(common) - len(shapes)} of {len(expected)} tensors fit"
    return "; ".join([coverage, *wrong])


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
