"""A frozen backbone, loaded once for a measurement, and the features it extracts.

Shape letters: N images of a set that can be read, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dinoscale.convert.card import BackboneCard
from dinoscale.convert.weights import Network
from dinoscale.convert.weights_file import load_backbone
from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.sources.source import Source, StoredSource, open_source
from dinoscale.errors import CheckpointError, ConfigError
from dinoscale.evaluate.feature_cache import (
    InFiles,
    Preparation,
    features_key,
    tensors_digest,
    through_cache,
    weights_digest,
)
from dinoscale.evaluate.features import extract_features, extract_unlabelled, find_device
from dinoscale.evaluate.untrained import untrained_backbone
from dinoscale.models.block import KeylessBias
from dinoscale.models.vit import VisionTransformer
from dinoscale.runtime import distributed
from dinoscale.runtime.fingerprint import code_fingerprint

OUTPUT = "output"  # of a backbone, as it is
_SMALL = 2**16  # elements of the tensors that ranks compare: biases and norms, read in no time

AnyBackbone = TypeVar("AnyBackbone", bound="LoadedBackbone")


@dataclass(frozen=True)
class LoadOptions:
    """Which backbone of a weights file to load, and onto which device.

    Attributes:
        network: teacher or student, of a run or a full checkpoint.
        num_heads: for weights that do not state it and whose heads are not 64 channels wide.
        device: a torch device; None takes the accelerator if there is one.
        progress: draw progress bars (`bar_options`).
    """

    network: Network = "teacher"
    num_heads: int | None = None
    device: str | None = None
    progress: bool = True


@dataclass(frozen=True)
class ExtractionOptions(LoadOptions):
    """How features are extracted from images; only `resize` and `crop` change them.

    Attributes:
        resize: short side of the images in pixels; None takes the weights file's.
        crop: side of the center crop in pixels; None takes the weights file's.
        batch_size: images of one forward without gradients.
        num_workers: processes of each rank that decode; 0 decodes in the rank itself.
        cache: read features cached by an earlier run, and cache those extracted.
    """

    resize: int | None = None
    crop: int | None = None
    batch_size: int = 64
    num_workers: int = 4
    cache: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if self.batch_size < 1 or self.num_workers < 0:
            numbers = f"{self.batch_size} and {self.num_workers}"
            raise ConfigError(f"need batch_size > 0 and num_workers >= 0, got {numbers}")


DEFAULT_LOADING = LoadOptions()
DEFAULT_EXTRACTION = ExtractionOptions()


@dataclass(frozen=True)
class LoadedBackbone:
    """A frozen backbone on its device.

    Attributes:
        path: of its weights file.
        backbone: in eval mode, without gradients.
        card: what it is, and how its images are prepared.
        device: where it computes.
        options: as given.
    """

    path: str
    backbone: nn.Module
    card: BackboneCard
    device: torch.device
    options: LoadOptions

    def open(self, spec: str, heartbeat: Callable[[], None] = lambda: None) -> StoredSource:
        """Open images with the channels of this backbone; `heartbeat` as of `open_source`.

        Raises:
            DataError: nothing is there, it cannot be read, or it holds no images.
        """
        return open_source(spec, self.decoder, heartbeat)

    @property
    def decoder(self) -> Decoder:
        """Decodes images to the channels of this backbone."""
        return Decoder(self.card.backbone.in_chans, self.card.max_pixel_value)

    @property
    def normalisation(self) -> dict[str, object]:
        """Mean and std of each channel, for the protocol of a report."""
        return {"mean": list(self.card.mean), "std": list(self.card.std)}

    def identity(self, backbone: nn.Module) -> dict[str, object]:
        """All that the features of a backbone depend on but image sizes and precision, for JSON.

        Args:
            backbone: of this architecture.
        """
        return {
            "weights": weights_digest(backbone),
            **_unlike_tensors(backbone),
            **self.normalisation,
            "max_pixel_value": self.card.max_pixel_value,
        }

    def require_identity(self, kept: object, of: str | Path) -> None:
        """Refuse what was trained on the features of another backbone.

        Args:
            kept: the `identity` of that backbone, from a file; in files of older versions only its
                digest.
            of: the file.

        Raises:
            CheckpointError: they differ, or the file does not say enough.
        """
        now = self.identity(self.backbone)
        before: Mapping[str, object] = kept if isinstance(kept, dict) else {"weights": kept}
        if before.get("weights") != now["weights"]:
            raise CheckpointError(
                f"{of} was trained on features of other weights than {self.path}: name those"
            )
        if lacking := sorted(now.keys() - before.keys()):
            raise CheckpointError(
                f"{of} was written by an older version, and does not say the {', '.join(lacking)}"
                " of its backbone: train it again, with --out"
            )
        if changed := [name for name in now if before[name] != now[name]]:
            raise CheckpointError(
                f"{of} was trained with another {', '.join(changed)} than {self.path} has now: name"
                " the weights that it was trained on, or train it again"
            )

    def untrained(self: AnyBackbone) -> AnyBackbone:
        """The same architecture and preparation with fresh weights, the same at every call."""
        return replace(self, backbone=untrained_backbone(self.card).to(self.device))

    def report(self, task: str, **parts: object) -> dict[str, object]:
        """The report of a task, ready for JSON: which weights it measured, then its own parts."""
        return {"task": task, **self.about, **parts}

    @property
    def about(self) -> dict[str, object]:
        """Which weights these are, for a report."""
        return {
            "weights": self.path,
            "weights_source": self.card.source,
            "backbone": asdict(self.card.backbone),
        }


def _unlike_tensors(backbone: nn.Module) -> dict[str, object]:
    """What changes the features of a backbone and shows in none of its tensors, for JSON.

    Of the network itself: cards of the same network may state what others leave to its name.
    """
    if not isinstance(backbone, VisionTransformer):
        return {}
    block: Any = backbone.blocks[0]
    return {
        "num_heads": block.attn.num_heads,
        "norm_eps": block.norm1.eps,
        "activation": type(block.mlp.act).__name__,
        "rope": None if backbone.rope is None else asdict(backbone.rope),
        "position_resize": None if backbone.pos_embed is None else backbone.position_resize,
        "mask_key_bias": isinstance(block.attn.qkv, KeylessBias),
    }


@dataclass(frozen=True)
class FeatureExtractor(LoadedBackbone):
    """A frozen backbone, and how it extracts the features of whole sets.

    Attributes:
        options: as given; `card` has the image sizes that they ask for.
    """

    options: ExtractionOptions

    @property
    def preparation(self) -> dict[str, object]:
        """Resize of the short side, center crop, normalisation, for the protocol of a report."""
        sizes = {"resize": self.card.resize, "crop": self.card.crop}
        return {**sizes, "interpolation": "bicubic", **self.normalisation}

    def features(
        self, source: Source, network: nn.Module | None = None, *, output_key: str | None = OUTPUT
    ) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) of the readable images; all ranks of a job call it.

        Args:
            source: labelled images, of `open`.
            network: the backbone, or a module around it; None takes the backbone.
            output_key: what the network computes, in words, for the cache; None does not cache.

        Raises:
            DataError: an image has no label.
            NonFiniteError: a feature is not a finite number.
        """
        arguments = self._arguments(output_key=output_key, progress=True)
        return extract_features(self.backbone if network is None else network, source, **arguments)

    def unlabelled(
        self,
        source: Source,
        network: nn.Module | None = None,
        *,
        output_key: str | None = OUTPUT,
        progress: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Features (N, D) of the readable images, and their numbers in the source (N,).

        Arguments and errors as of `features`, but the images need no labels; `progress` draws a
        bar, if the options do.
        """
        arguments = self._arguments(output_key=output_key, progress=progress)
        network = self.backbone if network is None else network
        return extract_unlabelled(network, source, **arguments)

    def cached(
        self,
        source: Source,
        extract: Callable[[], tuple[Tensor, Tensor]],
        *,
        taken: str,
        images: int,
        module: str,
    ) -> tuple[Tensor, Tensor]:
        """Rows (N, ...) of images of a source, and their numbers (N,), from the cache if they are.

        All ranks of a job call it.

        Args:
            source: of `open`.
            extract: computes them on every rank.
            taken: in words, what is computed, and of which of the images.
            images: how many these are, the unreadable ones included.
            module: whose code computes them.
        """
        if not (self.options.cache and isinstance(source, InFiles)):
            return extract()
        card = self.card
        sizes = Preparation(card.resize, card.crop, tuple(card.mean), tuple(card.std))

        def key() -> str:
            output_key = self._output_key(f"{taken}, made by {code_fingerprint(module)}")
            return features_key(
                self.backbone, source, sizes, output_key=output_key, device=self.device
            )

        return through_cache(key, extract, num_images=images, device=self.device)

    def _output_key(self, output_key: str) -> str:
        card = self.card
        return f"{output_key} of {card.backbone}, max_pixel_value {card.max_pixel_value}"

    def _arguments(self, *, output_key: str | None, progress: bool) -> dict[str, Any]:
        """How to extract."""
        card, options = self.card, self.options
        output_key = output_key if options.cache else None
        return {
            "resize": card.resize,
            "crop": card.crop,
            "mean": card.mean,
            "std": card.std,
            "batch_size": options.batch_size,
            "device": self.device,
            "num_workers": options.num_workers,
            "output_key": None if output_key is None else self._output_key(output_key),
            "progress": options.progress and progress,
        }


def load_frozen(weights_path: str | Path, options: LoadOptions) -> LoadedBackbone:
    """Load the backbone of a weights file onto a device, without gradients.

    Args:
        weights_path: as `load_backbone` takes it.
        options: which network, and which device.

    Raises:
        CheckpointError: the weights cannot be used.
        ConfigError: there is no such device.
    """
    device = find_device(options.device)
    backbone, card = load_backbone(
        weights_path, network=options.network, num_heads=options.num_heads
    )
    return LoadedBackbone(str(weights_path), backbone.to(device), card, device, options)


def load_on_ranks(weights_path: str | Path, options: LoadOptions) -> LoadedBackbone:
    """`load_frozen` where ranks share the work: all call it, and fail together.

    Raises:
        CheckpointError: the weights cannot be used, or ranks loaded different ones.
        ConfigError: there is no such device.
    """
    loaded = distributed.together(lambda: load_frozen(weights_path, options))
    _require_same_weights(loaded)
    return loaded


def load_extractor(weights_path: str | Path, options: ExtractionOptions) -> FeatureExtractor:
    """Load a backbone to extract features; all ranks of a job call it, and fail together.

    Args:
        weights_path: as `load_backbone` takes it.
        options: which network, which device, and how to extract.

    Raises:
        CheckpointError: the weights cannot be used, or ranks loaded different ones, as of a run
            that saved meanwhile.
        ConfigError: there is no such device, or the crop is larger than the image.
    """

    def load() -> FeatureExtractor:
        loaded = load_frozen(weights_path, options)
        card = _with_sizes(loaded.card, resize=options.resize, crop=options.crop)
        return FeatureExtractor(loaded.path, loaded.backbone, card, loaded.device, options)

    extractor = distributed.together(load)
    _require_same_weights(extractor)
    return extractor


def _require_same_weights(loaded: LoadedBackbone) -> None:
    """Refuse ranks with different weights; a step of the training changes every tensor."""
    if distributed.world_size() == 1:
        return
    state = loaded.backbone.state_dict()
    digest = tensors_digest({k: v for k, v in state.items() if v.numel() <= _SMALL})
    first, *others = distributed.gather_objects(digest)
    for rank, other in enumerate(others, start=1):
        if other != first:
            raise CheckpointError(
                f"{loaded.path}: rank {rank} read other weights than rank 0. Name a file that"
                " all ranks see, or one checkpoint of a run that is still trained"
            )


def _with_sizes(card: BackboneCard, *, resize: int | None, crop: int | None) -> BackboneCard:
    """The card with the image sizes that the options ask for."""
    card = replace(
        card,
        resize=card.resize if resize is None else resize,
        crop=card.crop if crop is None else crop,
    )
    if not 1 <= card.crop <= card.resize:
        sizes = f"{card.crop} and {card.resize} pixels"
        raise ConfigError(f"crop: need 1 <= crop <= resize, got {sizes}")
    return card
