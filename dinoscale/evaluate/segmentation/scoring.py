"""A test set with masks, and how predictions are scored on it and reported."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from dinoscale.errors import DataError
from dinoscale.evaluate.any_size import save_picture, writing_to
from dinoscale.evaluate.dense.mask_pictures import PANEL, panels
from dinoscale.evaluate.dense.side_by_side import draw_table
from dinoscale.evaluate.dense_probes.pairs import Pairs, open_pairs, whole_images
from dinoscale.evaluate.dense_probes.probe import Probe
from dinoscale.evaluate.dense_probes.target_files import Part, TargetFiles
from dinoscale.evaluate.segmentation.confusion import (
    Confusion,
    all_of_one_class,
    enlarged_argmax,
)
from dinoscale.evaluate.segmentation.index_masks import MEMBER, VOID, MaskRule, MaskTargets
from dinoscale.evaluate.segmentation.protocols import Knn, Linear, Logistic, Predict

log = logging.getLogger(__name__)

Protocol = Knn | Logistic | Linear
Said = dict[str, object]  # of a fit, for the report

SHEET = "segmentation-sheet.png"
ROWS = 8  # of the sheet, the first test images


def open_masks(probe: Probe, part: Part, rule: MaskRule) -> Pairs:
    """Open and check images and masks.

    Raises:
        DataError: they cannot be read, or a mask cannot be used.
    """
    source = part.open(probe.loaded)
    files = TargetFiles.of(source, part.images, part.targets, member=MEMBER, renames=part.renames)
    return open_pairs(part, source, MaskTargets(files, rule), probe.reading)


def open_test(probe: Probe, part: Part, rule: MaskRule) -> Pairs:
    """Open and check a test set, as `open_masks`; it must have a pixel that is not void."""
    test = open_masks(probe, part, rule)
    if not test.total[:VOID].any():
        raise DataError(f"{part.images}: all pixels of its masks are void (255)")
    return test


def sheet_folder(pictures: str | Path | None, probe: Probe) -> Path | None:
    """Where a sheet is drawn; None where none is wanted, or, with a warning, where none can be."""
    channels = probe.loaded.card.backbone.in_chans
    if pictures is not None and channels not in (1, 3):
        log.warning("no pictures: images of %d channels cannot be drawn", channels)
        return None
    return None if pictures is None else Path(pictures)


@dataclass(frozen=True)
class Scoring:
    """A test set, and how predictions are scored on it.

    Attributes:
        probe: the backbone.
        test: the set.
        protocol: how its classes are learned and predicted.
        rule: of its masks.
        names: of the classes in their order.
        pictures: folder for a sheet of test images, if it is wanted.
    """

    probe: Probe
    test: Pairs
    protocol: Protocol
    rule: MaskRule
    names: tuple[str, ...]
    pictures: Path | None

    def settings(self) -> dict[str, object]:
        """All that changes a number, ready for JSON."""
        return {
            "method": type(self.protocol).__name__.lower(),
            **self.probe.protocol(),
            **self.protocol.protocol(),
            "classes": len(self.names),
            "masks": self.rule.protocol(),
            "scored_at": "the size of the mask; scores enlarged bilinearly; void (255) left out",
            "mean_iou": "over classes that are in the masks or were found, of all pixels together",
        }

    def scored(self, predict: Predict, *, patch: int, drawing: bool) -> tuple[Confusion, Said]:
        """Score a prediction; also what the report says of a sheet, if it is drawn.

        Args:
            predict: from normalised images.
            patch: side of the patches that it sees, pixels.
            drawing: draw a sheet, if one is wanted.
        """
        reading = self.probe.reading
        if isinstance(self.protocol, Linear):
            reading = replace(reading, batch_size=1)  # of images, each of several windows
        confusion = Confusion(len(self.names))
        drawn: list[list[Image.Image]] = []
        for batch in whole_images(self.test, self.protocol.resize(patch), reading):
            scores = predict(reading.normalized(batch.images))
            for image, one, mask in zip(batch.images, scores, batch.targets, strict=True):
                height, width = mask.shape
                found = enlarged_argmax(one, height=height, width=width)
                confusion.add(found, torch.from_numpy(mask).to(found.device))
                if drawing and self.pictures is not None and len(drawn) < ROWS:
                    pixels = image.permute(1, 2, 0).numpy()
                    drawn.append(panels(pixels, found.byte().cpu().numpy(), mask))
        return confusion, self._drawn(drawn)

    def _drawn(self, rows: Sequence[Sequence[Image.Image]]) -> Said:
        """Write a sheet; what the report says of it."""
        if self.pictures is None or not rows:
            return {}
        sheet = draw_table(["found classes", "true classes"], rows, width=PANEL)
        with writing_to(self.pictures):
            save_picture(sheet, self.pictures / SHEET)
        return {"picture": str(self.pictures / SHEET)}

    def report(self, found: Confusion, train: Mapping[str, object], said: Said) -> Said:
        """The report of the weights themselves.

        Args:
            found: their scores.
            train: what was read of the train set.
            said: what else to report.
        """
        missing = [self.names[number] for number in found.missing()]
        if missing:
            examples = ", ".join(missing[:5])
            log.warning("%d classes are in no mask of test: %s", len(missing), examples)
        return self.probe.loaded.report(
            "segmentation",
            scored=found.images,
            train=train,
            test=self.test.about,
            classes=len(self.names),
            blocks=list(self.probe.blocks),
            protocol=self.settings(),
            score=found.score(),
            iou=dict(zip(self.names, found.iou(), strict=True)),
            missing_in_test=missing,
            **said,
        )

    def of_one_class(self, chosen: int) -> dict[str, float]:
        """The score of finding one class everywhere."""
        pixels = self.test.total[: len(self.names)].tolist()
        return all_of_one_class(pixels, chosen).score()


def floors(baselines: dict[str, dict[str, float]]) -> Said:
    """Scores without a network, for the report: `floors` is the higher one."""
    best = max(baselines.values(), key=lambda score: score["miou"])
    return {"floors": best, "baselines": baselines}
