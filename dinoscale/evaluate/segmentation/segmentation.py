"""`dinoscale evaluate segmentation`: the class of every pixel from frozen patch features.

Shape letter: K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.any_size import image_mode, save_picture, writing_to
from dinoscale.evaluate.dense.mask_pictures import GAP, compare
from dinoscale.evaluate.dense_probes.pairs import Pairs, open_pairs, whole_images
from dinoscale.evaluate.dense_probes.probe import (
    DEFAULT_PROBING,
    Features,
    FeaturesName,
    Probe,
    ProbeOptions,
)
from dinoscale.evaluate.dense_probes.target_files import Part, TargetFiles
from dinoscale.evaluate.overlap import find_overlap
from dinoscale.evaluate.segmentation.confusion import (
    Confusion,
    all_of_one_class,
    enlarged_argmax,
)
from dinoscale.evaluate.segmentation.index_masks import MEMBER, VOID, MaskRule, MaskTargets
from dinoscale.evaluate.segmentation.layouts import Layout
from dinoscale.evaluate.segmentation.protocols import Knn, Linear, Logistic, Predict

log = logging.getLogger(__name__)

Protocol = Knn | Logistic | Linear
Said = dict[str, object]  # of a fit, for the report

SHEET = "segmentation-sheet.png"
ROWS = 8  # of the sheet, the first test images


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
    folder = None if pictures is None else Path(pictures)
    if folder is not None:
        image_mode(channels=probe.loaded.card.backbone.in_chans)
    run = _Run(probe, _open(probe, layout), protocol, layout.rule, folder)
    report = run.report()
    if options.untrained:
        report["untrained"] = run.measured("untrained")[0].score()
    report |= run.floors(pixels=options.pixels)
    probe.forget_states()
    return report


@dataclass(frozen=True)
class _Sets:
    """Both sets, what they are called, and K."""

    train: Pairs
    test: Pairs
    num_classes: int
    names: tuple[str, ...]


def _open(probe: Probe, layout: Layout) -> _Sets:
    """Open and check both sets."""

    def opened(part: Part, rule: MaskRule) -> Pairs:
        source = part.open(probe.loaded)
        files = TargetFiles.of(
            source, part.images, part.targets, member=MEMBER, renames=part.renames
        )
        return open_pairs(part, source, MaskTargets(files, rule), probe.reading)

    train = opened(layout.train, layout.rule)
    present = np.flatnonzero(train.total[:VOID])
    if len(present) < 2:
        raise DataError(
            f"{layout.train.images}: its masks hold {len(present)} class, need at least two."
            + (" If 255 is an object, not void, add --binary." if train.total[VOID] else "")
        )
    number = layout.rule.num_classes or int(present[-1]) + 1
    test = opened(layout.test, replace(layout.rule, num_classes=number))
    if not test.total[:VOID].any():
        raise DataError(f"{layout.test.images}: all pixels of its masks are void (255)")
    shared = find_overlap(test.source, train.source) if _apart(layout) else None
    if shared is not None and shared.found:
        log.warning(
            "%d of the %d pictures of test that were looked for are in train, byte for byte, as %s:"
            " the score is too high",
            *(shared.found, shared.looked_for, shared.example),
        )
    return _Sets(train, test, number, layout.class_names or tuple(map(str, range(number))))


def _apart(layout: Layout) -> bool:
    """Whether both parts could share a picture: not the lists of one folder, each named once."""
    return layout.train.names is None or layout.test.names is None


@dataclass(frozen=True)
class _Run:
    """The measurement, but for the features."""

    probe: Probe
    sets: _Sets
    protocol: Protocol
    rule: MaskRule
    pictures: Path | None

    def settings(self) -> dict[str, object]:
        """All that changes a number, ready for JSON."""
        return {
            "method": type(self.protocol).__name__.lower(),
            **self.probe.protocol(),
            **self.protocol.protocol(),
            "masks": {"binary": self.rule.binary, "ignore_zero": self.rule.ignore_zero},
            "scored_at": "the size of the mask; scores enlarged bilinearly; void (255) left out",
            "mean_iou": "over classes that are in the masks or were found, of all pixels together",
        }

    def measured(self, name: FeaturesName) -> tuple[Confusion, Said]:
        """Measure some features; also what the report says of the fit."""
        features = self.probe.features(name)
        sets, protocol, reading = self.sets, self.protocol, self.probe.reading
        if isinstance(protocol, Linear):
            predict, said = self._trained(protocol, features)
            reading = replace(reading, batch_size=1)  # of images, each of several windows
        else:
            predict, said = protocol.fitted(
                *(features.maps, sets.train, reading),
                num_classes=sets.num_classes,
                seed=self.probe.seed,
            )
        confusion = Confusion(sets.num_classes)
        drawn: list[Image.Image] = []
        for batch in whole_images(sets.test, protocol.resize(features.maps.patch), reading):
            scores = predict(reading.normalized(batch.images))
            for image, one, mask in zip(batch.images, scores, batch.targets, strict=True):
                height, width = mask.shape
                found = enlarged_argmax(one, height=height, width=width)
                confusion.add(found, torch.from_numpy(mask).to(found.device))
                if name == "trained" and self.pictures is not None and len(drawn) < ROWS:
                    pixels = image.permute(1, 2, 0).numpy()
                    drawn.append(compare(pixels, found.byte().cpu().numpy(), mask))
        return confusion, said | self._drawn(drawn)

    def _drawn(self, rows: Sequence[Image.Image]) -> Said:
        """Write a sheet; what the report says of it."""
        if self.pictures is None or not rows:
            return {}
        heights = [row.height + GAP for row in rows]
        sheet = Image.new("RGB", (rows[0].width, sum(heights)), "white")
        for row, top in zip(rows, accumulate(heights, initial=0), strict=False):
            sheet.paste(row, (0, top))
        with writing_to(self.pictures):
            save_picture(sheet, self.pictures / SHEET)
        return {"picture": str(self.pictures / SHEET)}

    def _trained(self, protocol: Linear, features: Features) -> tuple[Predict, Said]:
        """Train a head."""
        sets, probe, maps = self.sets, self.probe, features.maps
        head = probe.trained_head(
            features,
            protocol.training(sets.train, probe.reading, patch=maps.patch, seed=probe.seed),
            outputs=sets.num_classes,
            protocol=self.settings(),
            module=__name__,
            card={"task": "segmentation", "classes": list(sets.names)},
        )
        predict = protocol.predict(head, maps, batch_size=probe.reading.batch_size)
        return predict, {} if probe.out is None else {"out": str(probe.out)}

    def report(self) -> dict[str, object]:
        """The report of the weights themselves."""
        found, said = self.measured("trained")
        sets = self.sets
        missing = [sets.names[number] for number in found.missing()]
        if missing:
            examples = ", ".join(missing[:5])
            log.warning("%d classes are in no mask of test: %s", len(missing), examples)
        return self.probe.loaded.report(
            "segmentation",
            scored=found.images,
            train=sets.train.about,
            test=sets.test.about,
            classes=sets.num_classes,
            protocol=self.settings(),
            score=found.score(),
            iou=dict(zip(sets.names, found.iou(), strict=True)),
            missing_in_test=missing,
            **said,
        )

    def floors(self, *, pixels: bool) -> dict[str, object]:
        """Scores without a network: `floors` is the higher one."""
        sets = self.sets
        chosen = int(sets.train.total[: sets.num_classes].argmax())
        tested = sets.test.total[: sets.num_classes].tolist()
        baselines = {"most_frequent_class": all_of_one_class(tested, chosen).score()}
        if pixels:
            baselines["colors"] = self.measured("colors")[0].score()
        best = max(baselines.values(), key=lambda score: score["miou"])
        return {"floors": best, "baselines": baselines}
