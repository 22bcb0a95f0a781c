"""A backbone that is only looked through: opened once, with the way its images are prepared.

Shape letters: N images of a set that can be read, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dinoscale.convert.card import BackboneCard
from dinoscale.convert.weights import Network
from dinoscale.convert.weights_file import load_backbone
from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.sources.source import Source, open_source
from dinoscale.errors import ConfigError
from dinoscale.evaluate.features import extract_features, find_device
from dinoscale.evaluate.untrained import untrained_backbone
from dinoscale.runtime import distributed

OUTPUT = "output"  # of a backbone, as it is


def taken_of(card: BackboneCard, what: str) -> str:
    """Say what features depend on besides weights, for the cache."""
    # "white": as earlier versions said it, whose caches stay good.
    return f"{what} of {card.backbone}, white {card.max_pixel_value}"


@dataclass(frozen=True)
class Extraction:
    """How a backbone is opened and its features are taken.

    Attributes:
        network: which network of a file with both.
        num_heads: for files without a card whose heads are not 64 channels wide.
        resize: short side of the images in pixels; None takes the weights file's.
        crop: side of the center crop in pixels; None takes the weights file's.
        batch_size: images in one forward.
        num_workers: processes of each rank that decode; 0 decodes in this one.
        device: a torch device; None takes the accelerator if there is one.
        cache: read features that are kept from an earlier run, and keep those extracted.
        progress: draw bars on stderr, if that is a terminal.
    """

    network: Network = "teacher"
    num_heads: int | None = None
    resize: int | None = None
    crop: int | None = None
    batch_size: int = 64
    num_workers: int = 4
    device: str | None = None
    cache: bool = True
    progress: bool = True


@dataclass(frozen=True)
class Frozen:
    """Backbone and preparation.

    Attributes:
        backbone: on `device`, in eval mode, without gradients.
        card: of its file, with the sizes that were asked for.
        device: where it computes.
        how: its features are taken.
    """

    backbone: nn.Module
    card: BackboneCard
    device: torch.device
    how: Extraction

    def open(self, spec: str, alive: Callable[[], None] = lambda: None) -> Source:
        """Open images as this backbone takes them; `alive` as of `open_source`.

        Raises:
            DataError: nothing is there, it cannot be read, or it holds no images.
        """
        return open_source(
            spec, Decoder(self.card.backbone.in_chans, self.card.max_pixel_value), alive
        )

    def features(self, source: Source) -> tuple[Tensor, Tensor]:
        """Outputs (N, D) and labels (N,) of the readable images; all ranks of a job call it.

        Args:
            source: labelled images, of `open`.

        Raises:
            DataError: an image has no label.
            NonFiniteError: a feature is not a finite number.
        """
        card = self.card
        return extract_features(
            self.backbone,
            source,
            resize=card.resize,
            crop=card.crop,
            mean=card.mean,
            std=card.std,
            batch_size=self.how.batch_size,
            device=self.device,
            num_workers=self.how.num_workers,
            taken=taken_of(card, OUTPUT) if self.how.cache else None,
            progress=self.how.progress,
        )

    def untrained(self) -> Frozen:
        """The same architecture and preparation with fresh weights, the same at every call."""
        return replace(self, backbone=untrained_backbone(self.card).to(self.device))


def open_frozen(weights_path: str | Path, how: Extraction) -> Frozen:
    """Open the backbone of a weights file; all ranks of a job call it, and fail together.

    Args:
        weights_path: as `load_backbone` takes it.
        how: to open it, and to take its features.

    Raises:
        CheckpointError: the weights cannot be used.
        ConfigError: there is no such device, the crop is larger than the image, or a number is out
            of range.
    """
    if how.batch_size < 1 or how.num_workers < 0:
        numbers = f"{how.batch_size}, {how.num_workers}"
        raise ConfigError(f"need batch_size > 0, num_workers >= 0; got {numbers}")

    def opened() -> Frozen:
        device = find_device(how.device)
        backbone, card = load_backbone(weights_path, network=how.network, num_heads=how.num_heads)
        card = _with_sizes(card, resize=how.resize, crop=how.crop)
        return Frozen(backbone.to(device), card, device, how)

    return distributed.together(opened)


def _with_sizes(card: BackboneCard, *, resize: int | None, crop: int | None) -> BackboneCard:
    """The card with the sizes that were asked for."""
    card = replace(
        card,
        resize=card.resize if resize is None else resize,
        crop=card.crop if crop is None else crop,
    )
    if not 1 <= card.crop <= card.resize:
        sizes = f"{card.crop} and {card.resize} pixels"
        raise ConfigError(f"crop: need 1 <= crop <= resize, got {sizes}")
    return card
