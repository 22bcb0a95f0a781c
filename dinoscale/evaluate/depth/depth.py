"""`dinoscale evaluate depth`: the distance of every pixel from frozen patch features.

A batch norm and a linear layer learn it as the mean of bins, after the configuration of DINOv3
(Simeoni et al. 2025, arXiv:2508.10104).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dinoscale.evaluate.dense_probes.linear_head import HeadTraining, LinearHead
from dinoscale.evaluate.dense_probes.pair_crops import CropRule
from dinoscale.evaluate.dense_probes.pairs import Pairs, warn_of_shared_pictures
from dinoscale.evaluate.dense_probes.probe import (
    DEFAULT_PROBING,
    Features,
    FeaturesName,
    Probe,
    ProbeOptions,
)
from dinoscale.evaluate.dense_probes.target_files import Part
from dinoscale.evaluate.depth.bins import bins_loss
from dinoscale.evaluate.depth.depth_files import HOLE
from dinoscale.evaluate.depth.protocol import DepthProtocol
from dinoscale.evaluate.depth.scoring import Measured, Scoring, floors, open_depths


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
    sets = [open_depths(probe, part, protocol) for part in (train, test)]
    warn_of_shared_pictures(*sets)
    run = _Run(sets[0], Scoring(probe, sets[1], protocol))
    report = run.report()
    if options.untrained:
        fresh = run.measured("untrained").mirrored
        report |= {"untrained": fresh.deltas(), "untrained_errors": fresh.errors()}
    report |= run.floors(pixels=options.pixels)
    probe.forget_states()
    return report


@dataclass(frozen=True)
class _Run:
    """The measurement, but for the features."""

    train: Pairs
    scoring: Scoring

    def measured(self, name: FeaturesName) -> Measured:
        """Train a head on some features, and measure it."""
        features = self.scoring.probe.features(name)
        return self.scoring.scored(self._trained(features), features.maps)

    def _trained(self, features: Features) -> LinearHead:
        protocol, probe = self.scoring.protocol, self.scoring.probe
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
            protocol=self.scoring.settings(),
            module=__name__,
            card={"task": "depth", "mean_depth": self._mean()},
        )

    def report(self) -> dict[str, object]:
        """The report of the weights themselves."""
        out = self.scoring.probe.out
        kept = {} if out is None else {"out": str(out)}
        return self.scoring.report(self.measured("trained"), self.train.about, kept)

    def floors(self, *, pixels: bool) -> dict[str, object]:
        """Scores without a network."""
        found = {"mean_depth": self.scoring.of_mean(self._mean())}
        if pixels:
            found["colors"] = self.measured("colors").mirrored
        return floors(found)

    def _mean(self) -> float:
        """Of the depths of the train set, metres."""
        total, number = self.train.total
        return float(total / number)
