"""`dinoscale evaluate segmentation`: the class of every pixel from frozen patch features.

Shape letter: K classes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.dense_probes.pairs import Pairs, warn_of_shared_pictures
from dinoscale.evaluate.dense_probes.probe import (
    DEFAULT_PROBING,
    Features,
    FeaturesName,
    Probe,
    ProbeOptions,
)
from dinoscale.evaluate.segmentation.confusion import Confusion
from dinoscale.evaluate.segmentation.index_masks import VOID
from dinoscale.evaluate.segmentation.kept import head_card
from dinoscale.evaluate.segmentation.layouts import Layout
from dinoscale.evaluate.segmentation.protocols import Linear, Predict
from dinoscale.evaluate.segmentation.scoring import (
    Protocol,
    Said,
    Scoring,
    floors,
    open_masks,
    open_test,
    sheet_folder,
)

log = logging.getLogger(__name__)


def evaluate_segmentation(
    weights_path: str | Path,
    layout: Layout,
    *,
    protocol: Protocol,
    pictures: str | Path | None = None,
    options: ProbeOptions = DEFAULT_PROBING,
) -> dict[str, object]:
    """Learn the classes of pixels from patch features of one set, and test them on another.

    Args:
        weights_path: any weights of a ViT that `load_backbone` reads.
        layout: images and masks of both sets, and what the masks mean.
        protocol: what is learned, with its published numbers as defaults.
        pictures: folder for a sheet of test images with their found and true classes; None draws
            nothing.
        options: which network and device, and what is measured; the blocks are the last ones, and
            only `Linear` trains a head to keep.

    Returns:
        The report, ready for JSON: `score` in percent, `iou` of each class, baselines.

    Raises:
        CheckpointError: the weights or the saved state of the training cannot be used.
        ConfigError: a setting is out of range, the backbone is no ViT, or the state beside `out`
            belongs to another training.
        DataError: a set cannot be read, a mask cannot be used, or there is only one class.
        NonFiniteError: a feature is not a finite number, or the training diverged.
    """
    if options.out is not None and not isinstance(protocol, Linear):
        raise ConfigError("out: only --protocol linear trains a head to keep. Leave it out.")
    probe = Probe.open(weights_path, options, spread="last")
    folder = sheet_folder(pictures, probe)
    train, test, number = _open(probe, layout)
    names = layout.class_names or tuple(map(str, range(number)))
    run = _Run(train, Scoring(probe, test, protocol, layout.rule, names, folder))
    report = run.report()
    if options.untrained:
        report["untrained"] = run.measured("untrained")[0].score()
    report |= run.floors(pixels=options.pixels)
    probe.forget_states()
    return report


def _open(probe: Probe, layout: Layout) -> tuple[Pairs, Pairs, int]:
    """Open and check train and test set; also K."""
    train = open_masks(probe, layout.train, layout.rule)
    present = np.flatnonzero(train.total[:VOID])
    if len(present) < 2:
        raise DataError(
            f"{layout.train.images}: its masks hold {len(present)} class, need at least two."
            + (
                " If 255 is an object, not void, add --binary; masks must be gray."
                if train.total[VOID]
                else ""
            )
        )
    number = layout.rule.num_classes or int(present[-1]) + 1
    test = open_test(probe, layout.test, replace(layout.rule, num_classes=number))
    warn_of_shared_pictures(train, test)
    return train, test, number


@dataclass(frozen=True)
class _Run:
    """The measurement, but for the features."""

    train: Pairs
    scoring: Scoring

    def measured(self, name: FeaturesName) -> tuple[Confusion, Said]:
        """Learn from some features, and score them; also what the report says of it."""
        scoring = self.scoring
        probe, protocol = scoring.probe, scoring.protocol
        features = probe.features(name)
        if isinstance(protocol, Linear):
            predict, said = self._trained(protocol, features)
        else:
            predict, said = protocol.fitted(
                *(features.maps, self.train, probe.reading),
                num_classes=len(scoring.names),
                seed=probe.seed,
            )
        drawing = name == "trained"
        found, drawn = scoring.scored(predict, patch=features.maps.patch, drawing=drawing)
        return found, said | drawn

    def _trained(self, protocol: Linear, features: Features) -> tuple[Predict, Said]:
        """Train a head."""
        scoring, probe, maps = self.scoring, self.scoring.probe, features.maps
        head = probe.trained_head(
            features,
            protocol.training(self.train, probe.reading, patch=maps.patch, seed=probe.seed),
            outputs=len(scoring.names),
            protocol=scoring.settings(),
            module=__name__,
            card=head_card(scoring.rule, scoring.names, most_frequent=self._most_frequent()),
        )
        predict = protocol.predict(head, maps, batch_size=probe.reading.batch_size)
        return predict, {} if probe.out is None else {"out": str(probe.out)}

    def report(self) -> dict[str, object]:
        """The report of the weights themselves."""
        found, said = self.measured("trained")
        return self.scoring.report(found, self.train.about, said)

    def floors(self, *, pixels: bool) -> dict[str, object]:
        """Scores without a network."""
        baselines = {"most_frequent_class": self.scoring.of_one_class(self._most_frequent())}
        if pixels:
            baselines["colors"] = self.measured("colors")[0].score()
        return floors(baselines)

    def _most_frequent(self) -> int:
        """The class of most pixels of the train set."""
        return int(self.train.total[: len(self.scoring.names)].argmax())
