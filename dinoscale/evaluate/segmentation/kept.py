"""`dinoscale evaluate segmentation --head`: a kept head, judged by another test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dinoscale.errors import ConfigError
from dinoscale.evaluate.dense_probes.kept_head import KeptHead, load_head
from dinoscale.evaluate.dense_probes.probe import Probe
from dinoscale.evaluate.dense_probes.target_files import Part
from dinoscale.evaluate.frozen_backbone import DEFAULT_EXTRACTION, ExtractionOptions
from dinoscale.evaluate.segmentation.index_masks import MaskRule
from dinoscale.evaluate.segmentation.protocols import Linear
from dinoscale.evaluate.segmentation.scoring import Scoring, floors, open_test, sheet_folder


def head_card(rule: MaskRule, names: Sequence[str], *, most_frequent: int) -> dict[str, object]:
    """What the card of a head says of its classes, ready for JSON.

    Args:
        rule: of the masks.
        names: of the classes in their order.
        most_frequent: class of most pixels of the train set, for the floor of a report.
    """
    return {
        "task": "segmentation",
        "classes": list(names),
        "masks": asdict(replace(rule, num_classes=len(names))),
        "most_frequent": most_frequent,
    }


def evaluate_segmentation_head(
    weights_path: str | Path,
    head_path: str | Path,
    test: Part,
    *,
    rule: MaskRule | None = None,
    pictures: str | Path | None = None,
    options: ExtractionOptions = DEFAULT_EXTRACTION,
) -> dict[str, object]:
    """Judge a head that `evaluate_segmentation` kept by another test set, as by its own.

    Args:
        weights_path: the backbone that it was trained on.
        head_path: file of the head, whose card has all settings.
        test: images and masks, with the classes of the train set.
        rule: of these masks, if it is known; None takes that of the train set.
        pictures: as of `evaluate_segmentation`.
        options: as of `evaluate_segmentation`.

    Returns:
        The report of the training, had it been tested on this set, with `head` for `out`.

    Raises:
        CheckpointError: the weights or the head cannot be used, or not together.
        ConfigError: the head knows other classes, or a setting is out of range.
        DataError: the set cannot be read, or a mask cannot be used.
        NonFiniteError: a feature is not a finite number.
    """
    kept = load_head(head_path, task="segmentation")
    probe = Probe.of_head(weights_path, kept, options)
    with kept.reading():
        protocol = Linear.of(kept.card["protocol"])
        names, most_frequent = (
            tuple(map(str, kept.card["classes"])),
            int(kept.card["most_frequent"]),
        )
        own, train = _rule(kept), dict(kept.card["train"])
    if rule is not None and rule != own:
        raise ConfigError(f"{head_path} was trained on other classes than those of --data")
    folder = sheet_folder(pictures, probe)
    scoring = Scoring(probe, open_test(probe, test, own), protocol, own, names, folder)
    kept.require_settings(scoring.settings())
    head, maps = kept.head.to(probe.reading.device), probe.features("trained").maps
    predict = protocol.predict(head, maps, batch_size=probe.reading.batch_size)
    found, drawn = scoring.scored(predict, patch=maps.patch, drawing=True)
    report = scoring.report(found, train, {"head": str(head_path), **drawn})
    return report | floors({"most_frequent_class": scoring.of_one_class(most_frequent)})


def _rule(kept: KeptHead) -> MaskRule:
    """That of the masks of the train set."""
    masks = kept.card["masks"]
    return MaskRule(**{**masks, "renumber": tuple(masks["renumber"])})
