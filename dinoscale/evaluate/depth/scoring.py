"""A test set with depths, and how a head is scored on it and reported.

Shape letters: N images, C channels, H, W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinoscale.errors import DataError
from dinoscale.evaluate.dense_probes.linear_head import LinearHead
from dinoscale.evaluate.dense_probes.pair_crops import ResizeShort
from dinoscale.evaluate.dense_probes.pairs import Pairs, open_pairs, read_target, whole_images
from dinoscale.evaluate.dense_probes.patch_maps import Maps
from dinoscale.evaluate.dense_probes.probe import Probe
from dinoscale.evaluate.dense_probes.sliding import to_pixels
from dinoscale.evaluate.dense_probes.target_files import Part, TargetFiles
from dinoscale.evaluate.depth.bins import depth_of
from dinoscale.evaluate.depth.depth_errors import DepthErrors
from dinoscale.evaluate.depth.depth_files import (
    MEMBER,
    NYU_NAMES,
    Depths,
    DepthTargets,
    eigen_crop,
)
from dinoscale.evaluate.depth.protocol import DepthProtocol

log = logging.getLogger(__name__)


def open_depths(probe: Probe, part: Part, protocol: DepthProtocol) -> Pairs:
    """Open and check images and depth pictures.

    Raises:
        DataError: they cannot be read, or no depth counts.
    """
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
class Measured:
    """The errors of the mean with the mirrored image, and of the image alone."""

    mirrored: DepthErrors
    single: DepthErrors


@dataclass(frozen=True)
class Scoring:
    """A test set, and how heads are scored on it.

    Attributes:
        probe: the backbone.
        test: the set.
        protocol: how depth is learned and measured.
    """

    probe: Probe
    test: Pairs
    protocol: DepthProtocol

    def settings(self) -> dict[str, object]:
        """All that changes a number, ready for JSON."""
        return {**self.probe.protocol(), **self.protocol.protocol()}

    def scored(self, head: LinearHead, maps: Maps) -> Measured:
        """Score a head on the features that it was trained on."""
        reading = self.probe.reading
        found = Measured(DepthErrors(), DepthErrors())
        for batch in whole_images(self.test, ResizeShort(self.protocol.size), reading):
            images = reading.normalized(batch.images)
            one = self._predicted(head, maps, images)
            other = self._predicted(head, maps, images.flip(3)).flip(3)
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

    def report(
        self, found: Measured, train: Mapping[str, object], kept: Mapping[str, object]
    ) -> dict[str, object]:
        """The report of the weights themselves.

        Args:
            found: their errors.
            train: what was read of the train set.
            kept: where the head is, if it is in a file.
        """
        if not found.single.images:
            raise DataError(
                f"{self.test.part.images}: no depth is known in the part that is scored"
            )
        errors = found.mirrored.errors()
        log.info("rmse %.3f m, abs_rel %.3f", errors["rmse"], errors["abs_rel"])
        return self.probe.loaded.report(
            "depth",
            train=train,
            test=self.test.about,
            scored=len(found.single.images),
            blocks=list(self.probe.blocks),
            protocol=self.settings(),
            score=found.mirrored.deltas(),
            errors=errors,
            single={"score": found.single.deltas(), "errors": found.single.errors()},
            **kept,
        )

    def of_mean(self, mean: float) -> DepthErrors:
        """The errors of one depth everywhere, in metres."""
        errors = DepthErrors()
        for index in self.test.indices.tolist():
            truth = read_target(self.test.targets, self.test.source, index)
            self._add_pixels(errors, np.full_like(truth, mean), truth)
        return errors


def floors(found: Mapping[str, DepthErrors]) -> dict[str, object]:
    """Errors without a network, for the report: `floors` is the one with the higher delta1."""
    best = max(found.values(), key=lambda errors: errors.deltas()["delta1"])
    baselines = {name: {**e.deltas(), **e.errors()} for name, e in found.items()}
    return {"floors": best.deltas(), "baselines": baselines}
