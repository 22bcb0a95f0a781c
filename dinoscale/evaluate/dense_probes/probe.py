"""A frozen backbone, opened once for a task on single pixels, and the features to compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from torch import nn

from dinoscale.errors import CheckpointError, ConfigError
from dinoscale.evaluate.any_size import find_patch_size
from dinoscale.evaluate.classification.resumable_training import check_target
from dinoscale.evaluate.dense_probes.kept_head import (
    KeptHead,
    remove_states,
    save_head,
    state_beside,
)
from dinoscale.evaluate.dense_probes.linear_head import HeadTraining, LinearHead
from dinoscale.evaluate.dense_probes.pairs import Reading
from dinoscale.evaluate.dense_probes.patch_maps import (
    BlockMaps,
    Maps,
    PixelMaps,
    Precision,
    Spread,
    choose_blocks,
)
from dinoscale.evaluate.frozen_backbone import ExtractionOptions, LoadedBackbone, load_frozen

FeaturesName = Literal["trained", "untrained", "colors"]


@dataclass(frozen=True)
class ProbeOptions(ExtractionOptions):
    """How the features of single pixels are measured, whatever is learned from them.

    Attributes:
        layers: number of blocks whose patch tokens are joined.
        precision: of the forward of the backbone; None is bf16 on a GPU, fp32 on a CPU.
        seed: of all random numbers, >= 0.
        untrained: also measure the same architecture with fresh weights.
        pixels: also measure the pixels of each patch as its features.
        out: safetensors file for the head, if one is trained; the state of its training lies beside
            it, from which the same call resumes to the same numbers. None writes nothing.
    """

    layers: int = 1
    precision: Precision | None = None
    seed: int = 0
    untrained: bool = False
    pixels: bool = False
    out: str | Path | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        if self.seed < 0:
            raise ConfigError(f"seed: need 0 or more, got {self.seed}")


DEFAULT_PROBING = ProbeOptions()


class Features(NamedTuple):
    """Features to measure: their name, what makes maps of them, and of which backbone."""

    name: FeaturesName
    maps: Maps
    backbone: nn.Module | None


@dataclass(frozen=True)
class Probe:
    """A backbone, and how it is measured.

    Attributes:
        loaded: the backbone.
        blocks: whose patch tokens are joined.
        precision: of the forward of the backbone.
        reading: how images are read.
        seed: of all random numbers.
        out: file of the trained head, if it is kept.
        spread: which blocks several are.
    """

    loaded: LoadedBackbone
    blocks: tuple[int, ...]
    precision: Precision
    reading: Reading
    seed: int
    out: Path | None
    spread: Spread

    @classmethod
    def open(cls, weights_path: str | Path, options: ProbeOptions, *, spread: Spread) -> Probe:
        """Load a backbone.

        Args:
            weights_path: any weights of a ViT that `load_backbone` reads.
            options: what to load, and how to measure it.
            spread: which blocks are joined, as of `choose_blocks`.

        Raises:
            CheckpointError: the weights cannot be used.
            ConfigError: a setting is out of range, the backbone is no ViT, or there is no such
                device.
            OutputError: `out` is a file that this program did not write.
        """
        target = check_target(options.out, weights_path)
        loaded = load_frozen(weights_path, options)
        blocks = choose_blocks(loaded.backbone, options.layers, spread)
        reading = Reading(
            *(loaded.card.mean, loaded.card.std, loaded.device),
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            progress=options.progress,
        )
        chosen = options.precision or ("bf16" if loaded.device.type == "cuda" else "fp32")
        return cls(loaded, blocks, chosen, reading, options.seed, target, spread)

    @classmethod
    def of_head(cls, weights_path: str | Path, kept: KeptHead, options: ExtractionOptions) -> Probe:
        """Load the backbone that a kept head was trained on, to measure as then.

        Args:
            weights_path: as of `open`.
            kept: the head; of its card are blocks, precision and seed.
            options: as of `open`.

        Raises:
            CheckpointError: the weights cannot be used, or are not those of the head.
            ConfigError: as of `open`.
        """
        with kept.reading():
            settings = kept.card["protocol"]
            blocks = tuple(int(block) for block in kept.card["blocks"])
            spread: Spread = "even" if settings["spread"] == "even" else "last"
            precision: Precision = "bf16" if settings["precision"] == "bf16" else "fp32"
            seed = int(settings["seed"])
        as_then = ProbeOptions(**vars(options), precision=precision, seed=seed)
        probe = cls.open(weights_path, as_then, spread=spread)
        probe.loaded.require_identity(kept.card["backbone"], kept.path)
        probe = replace(probe, blocks=blocks)
        if probe.features("trained").maps.width != kept.head.norm.num_features:
            raise CheckpointError(f"{kept.path} is damaged: it takes other features than it names")
        return probe

    def features(self, name: FeaturesName) -> Features:
        """Those of the weights, of fresh weights, or the pixels of each patch."""
        if name == "colors":
            patch = find_patch_size(self.loaded.backbone)
            channels = self.loaded.card.backbone.in_chans
            return Features(name, PixelMaps(patch=patch, channels=channels), None)
        loaded = self.loaded if name == "trained" else self.loaded.untrained()
        backbone = loaded.backbone
        return Features(name, BlockMaps(backbone, self.blocks, self.precision), backbone)

    def protocol(self) -> dict[str, object]:
        """All of it that changes a number but the weights, ready for JSON.

        Numbers of blocks depend on the depth of the network, which weights of a column need not
        share: they stand elsewhere in the report.
        """
        return {
            "network": self.loaded.options.network,
            "features": "patch tokens of blocks through the final norm, joined",
            "layers": len(self.blocks),
            "spread": self.spread,
            "precision": self.precision,
            "seed": self.seed,
            **self.loaded.normalisation,
        }

    def trained_head(
        self,
        features: Features,
        training: HeadTraining,
        *,
        outputs: int,
        protocol: Mapping[str, object],
        module: str,
        card: Mapping[str, object],
    ) -> LinearHead:
        """Train a head, resuming an earlier start; that on the weights' own features is kept.

        Args:
            features: what it learns from.
            training: how.
            outputs: of the head.
            protocol: all settings that change a number.
            module: the one whose code decides them.
            card: what is written beside the weights, with the protocol.

        Raises:
            CheckpointError: the saved state of the training is damaged.
            ConfigError: it belongs to another training, or a file cannot be written.
            NonFiniteError: the training diverged.
        """
        maps = features.maps
        head = LinearHead(maps.width, outputs, seed=self.seed).to(self.reading.device)
        shape = {"outputs": outputs, "width": maps.width, "patch": maps.patch}
        backbone = None if features.backbone is None else self.loaded.identity(features.backbone)
        saved = state_beside(
            *(self.out, features.name),
            backbone=backbone,
            train=training.pairs,
            protocol={**protocol, "blocks": list(self.blocks), "made_for": {**card, **shape}},
            module=module,
        )
        training.train(head, maps, saved)
        if self.out is not None and features.name == "trained":
            about = {
                "weights": self.loaded.path,
                "backbone": backbone,
                "train": training.pairs.about,
                "blocks": list(self.blocks),
                "protocol": protocol,
            }
            save_head(head, self.out, {**card, **about})
        return head

    def forget_states(self) -> None:
        """Delete the states of all trainings: they are reported."""
        if self.out is not None:
            remove_states(self.out)
