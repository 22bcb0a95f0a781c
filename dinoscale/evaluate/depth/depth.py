"""`dinoscale evaluate depth`: the distance of every pixel from frozen patch features.

A batch norm and a linear layer learn it as the mean of bins, after the configuration of DINOv3
(Simeoni et al. 2025, arXiv:2508.10104).
Shape letters: N images, C channels, H, W pixels.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.dense_probes.linear_head import HeadTraining, LinearHead, Recipe
from dinoscale.evaluate.dense_probes.pair_crops import CropRule, ResizeShort
from dinoscale.evaluate.dense_probes.pairs import Pairs, open_pairs, whole_images
from dinoscale.evaluate.dense_probes.patch_maps import Maps
from dinoscale.evaluate.dense_probes.probe import (
    DEFAULT_PROBING,
    Features,
    FeaturesName,
    Probe,
    ProbeOptions,
)
from dinoscale.evaluate.dense_probes.sliding import to_pixels
from dinoscale.evaluate.dense_probes.target_files import Part, TargetFiles
from dinoscale.evaluate.depth.bins import BINS, LEAST, SHARE, bins_loss, depth_of
from dinoscale.evaluate.depth.depth_errors import DepthErrors
from dinoscale.evaluate.depth.depth_files import (
    HOLE,
    MEMBER,
    NYU_NAMES,
    DepthRange,
    Depths,
    DepthTargets,
    eigen_crop,
)

log = logging.getLogger(__name__)

RANGE = DepthRange()
RECIPE = Recipe(
    iterations=38_400, batch_size=16, lr=3e-4, weight_decay=1e-4, warmup=1 / 3, clip=35.0
)


@dataclass(frozen=True)
class DepthProtocol:
    """How depth is learned and measured; the published numbers are the defaults.

    Attributes:
        scale: numbers of a depth picture in a metre.
        range: of the bins, and of the depths that count.
        bins: number of bins.
        size: short side of an image in pixels; None keeps images as they are.
        crop: height and width of a train crop, pixels.
        eigen_crop: score only the middle part of NYUv2's pictures.
        recipe: of the optimizer.
    """

    scale: float = 1000.0
    range: DepthRange = RANGE
    bins: int = BINS
    size: int | None = None
    crop: tuple[int, int] = (416, 544)
    eigen_crop: bool = False
    recipe: Recipe = RECIPE

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ConfigError(f"bins: need at least 2, got {self.bins}")

    def protocol(self) -> dict[str, object]:
        """All that changes a number, ready for JSON."""
        return {
            "depth_scale": self.scale,
            "min_depth": self.range.low,
            "max_depth": self.range.high,
            "bins": self.bins,
            "size": self.size,
            "crop": list(self.crop),
            "eigen_crop": self.eigen_crop,
            **self.recipe.protocol(),
            "head": f"batch norm, 1 x 1 convolution; mean of bins with weights relu + {LEAST}",
            "loss": f"SigLoss, sqrt(mean(g^2) - {SHARE} mean(g)^2)",
            "train_images": "random crop, mirrored half of the time",
            "test_images": "whole; depth enlarged bilinearly to that of the depth picture",
            "test_time_augmentation": "mean with the mirrored image; `single` is without",
            "means": "of each image, then over images; zeros and other depths are holes",
        }


def evaluate_depth(
    weights_path: str | Path,
    train: Part,
    test: Part,
    *,
    protocol: DepthProtocol,
    options: ProbeOptions = DEFAULT_PROBING,
) -> dict[str, object]:
    """Learn the depth of pixels from patch features of one set, and test it on another.

    Args:
        weights_path: any weights of a ViT that `load_backbone` reads.
        train: images and depth pictures to learn from.
        test: those to test on.
        protocol: how.
        options: which network and device, and what is measured; the blocks are evenly spread over
            the network.

    Returns:
        The report, ready for JSON: `score` has threshold accuracies in percent, `errors` those that
        papers quote, `single` both without the mirrored image, and baselines.

    Raises:
        CheckpointError: the weights or the saved state of the training cannot be used.
        ConfigError: a setting is out of range, the backbone is no ViT, or the state beside `out`
            belongs to another training.
        DataError: a set cannot be read, a depth picture cannot be used, or all of it is holes.
        NonFiniteError: a feature is not a finite number, or the training diverged.
    """
    probe = Probe.open(weights_path, options, spread="even")
    sets = [_open(probe, part, protocol) for part in (train, test)]
    run = _Run(probe, sets[0], sets[1], protocol)
    report = run.report()
    if options.untrained:
        fresh = run.measured("untrained").mirrored
        report |= {"untrained": fresh.deltas(), "untrained_errors": fresh.errors()}
    report |= run.floors(pixels=options.pixels)
    probe.forget_states()
    return report


def _open(probe: Probe, part: Part, protocol: DepthProtocol) -> Pairs:
    source = part.open(probe.loaded)
    files = TargetFiles.of(source, part.images, part.targets, member=MEMBER, renames=NYU_NAMES)
    targets = DepthTargets(files, protocol.scale, protocol.range)
    pairs = open_pairs(part, source, targets, probe.reading)
    if not pairs.total[1]:
        raise DataError(
            f"{part.images}: no depth lies between {protocol.range.low} and"
            f" {protocol.range.high} metres. Correct --depth-scale ({protocol.scale:g} numbers in"
            " a metre), or --max-depth."
        )
    return pairs


@dataclass(frozen=True)
class _Measured:
    """The errors of the mean with the mirrored image, and of the image alone."""

    mirrored: DepthErrors
    single: DepthErrors


@dataclass(frozen=True)
class _Run:
    """The measurement, but for the features."""

    probe: Probe
    train: Pairs
    test: Pairs
    protocol: DepthProtocol

    def settings(self) -> dict[str, object]:
        """All that changes a number, ready for JSON."""
        return {**self.probe.protocol(), **self.protocol.protocol()}

    def measured(self, name: FeaturesName) -> _Measured:
        """Train a head on some features, and measure it."""
        features, reading = self.probe.features(name), self.probe.reading
        head = self._trained(features)
        found = _Measured(DepthErrors(), DepthErrors())
        for batch in whole_images(self.test, ResizeShort(self.protocol.size), reading):
            images = reading.normalized(batch.images)
            one = self._predicted(head, features.maps, images)
            other = self._predicted(head, features.maps, images.flip(3)).flip(3)
            for alone, both, truth in zip(one, (one + other) / 2, batch.targets, strict=True):
                self._add(found.single, alone, truth)
                self._add(found.mirrored, both, truth)
        return found

    def _predicted(self, head: LinearHead, maps: Maps, images: Tensor) -> Tensor:
        """Depth (N, 1, H, W) of images (N, C, H, W), metres."""
        height, width = images.shape[2:]
        with torch.no_grad():
            depth = depth_of(head(maps(images)), self.protocol.range)
        return to_pixels(depth, patch=maps.patch, height=height, width=width)

    def _add(self, errors: DepthErrors, depth: Tensor, truth: Depths) -> None:
        """Count an image; `depth` (1, H, W) is enlarged to the size of the truth."""
        size = truth.shape
        enlarged = F.interpolate(depth[None], size=size, mode="bilinear", align_corners=False)
        self._add_pixels(errors, enlarged[0, 0].cpu().numpy(), truth)

    def _add_pixels(self, errors: DepthErrors, found: Depths, truth: Depths) -> None:
        part = eigen_crop(*truth.shape) if self.protocol.eigen_crop else np.s_[:, :]
        errors.add(found[part], truth[part])

    def _trained(self, features: Features) -> LinearHead:
        protocol, probe = self.protocol, self.probe
        training = HeadTraining(
            self.train,
            CropRule(*protocol.crop, protocol.size),
            HOLE,
            protocol.recipe,
            bins_loss(features.maps.patch, protocol.range),
            probe.reading,
            probe.seed,
        )
        return probe.trained_head(
            features,
            training,
            outputs=protocol.bins,
            protocol=self.settings(),
            module=__name__,
            card={"task": "depth"},
        )

    def report(self) -> dict[str, object]:
        """The report of the weights themselves."""
        found = self.measured("trained")
        if not found.single.images:
            raise DataError(
                f"{self.test.part.images}: no depth is known in the part that is scored"
            )
        errors = found.mirrored.errors()
        log.info("rmse %.3f m, abs_rel %.3f", errors["rmse"], errors["abs_rel"])
        kept = {} if self.probe.out is None else {"out": str(self.probe.out)}
        return self.probe.loaded.report(
            "depth",
            train=self.train.about,
            test=self.test.about,
            scored=len(found.single.images),
            protocol=self.settings(),
            score=found.mirrored.deltas(),
            errors=errors,
            single={"score": found.single.deltas(), "errors": found.single.errors()},
            **kept,
        )

    def floors(self, *, pixels: bool) -> dict[str, object]:
        """Scores without a network: `floors` is the one with the higher delta1."""
        found = {"mean_depth": self._of_mean()}
        if pixels:
            found["colors"] = self.measured("colors").mirrored
        best = max(found.values(), key=lambda errors: errors.deltas()["delta1"])
        baselines = {name: {**e.deltas(), **e.errors()} for name, e in found.items()}
        return {"floors": best.deltas(), "baselines": baselines}

    def _of_mean(self) -> DepthErrors:
        """The mean depth of the train set everywhere."""
        total, number = self.train.total
        errors = DepthErrors()
        for index in self.test.indices.tolist():
            truth = self.test.targets.read(self.test.source, index)
            assert truth is not None  # `open_pairs` found it
            self._add_pixels(errors, np.full_like(truth, total / number), truth)
        return errors
