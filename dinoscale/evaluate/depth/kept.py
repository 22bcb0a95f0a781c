"""`dinoscale evaluate depth --head`: a kept head, judged by another test set."""

from __future__ import annotations

from pathlib import Path

from dinoscale.evaluate.dense_probes.kept_head import load_head
from dinoscale.evaluate.dense_probes.probe import Probe
from dinoscale.evaluate.dense_probes.target_files import Part
from dinoscale.evaluate.depth.protocol import DepthProtocol
from dinoscale.evaluate.depth.scoring import Scoring, floors, open_depths
from dinoscale.evaluate.frozen_backbone import DEFAULT_EXTRACTION, ExtractionOptions


def evaluate_depth_head(
    weights_path: str | Path,
    head_path: str | Path,
    test: Part,
    *,
    options: ExtractionOptions = DEFAULT_EXTRACTION,
) -> dict[str, object]:
    """Judge a head that `evaluate_depth` kept by another test set, as by its own.

    Args:
        weights_path: the backbone that it was trained on.
        head_path: file of the head, whose card has all settings.
        test: images and depth pictures, of the scale of those of the train set.
        options: as of `evaluate_depth`.

    Returns:
        The report of the training, had it been tested on this set, with `head` for `out`.

    Raises:
        CheckpointError: the weights or the head cannot be used, or not together.
        ConfigError: a setting is out of range.
        DataError: the set cannot be read, a depth picture cannot be used, or all of it is holes.
        NonFiniteError: a feature is not a finite number.
    """
    kept = load_head(head_path, task="depth")
    probe = Probe.of_head(weights_path, kept, options)
    with kept.reading():
        protocol = DepthProtocol.of(kept.card["protocol"])
        mean, train = float(kept.card["mean_depth"]), dict(kept.card["train"])
    scoring = Scoring(probe, open_depths(probe, test, protocol), protocol)
    kept.require_settings(scoring.settings())
    head = kept.head.to(probe.reading.device)
    found = scoring.scored(head, probe.features("trained").maps)
    report = scoring.report(found, train, {"head": str(head_path)})
    return report | floors({"mean_depth": scoring.of_mean(mean)})
