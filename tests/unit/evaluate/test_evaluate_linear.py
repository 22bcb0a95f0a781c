"""Linear probes end to end: folders and a weights file in, a JSON report out."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dinoscale.data.augmentation.labelled_crops import endless_sampler
from dinoscale.errors import ConfigError, DataError, NonFiniteError
from dinoscale.evaluate import progress
from dinoscale.evaluate.classification.inputs import (
    extract_test_features,
    extract_train_features,
    open_inputs,
)
from dinoscale.evaluate.classification.linear import evaluate_linear
from dinoscale.evaluate.classification.linear_heads import LinearHeads, TokenFeatures
from dinoscale.evaluate.classification.linear_protocols import DinoProtocol, GridProtocol
from dinoscale.evaluate.frozen_backbone import ExtractionOptions
from dinoscale.runtime.fingerprint import differences
from tests.unit.evaluate.conftest import Colors

GRID = GridProtocol(iterations=20, batch_size=16, eval_every=15)
DINO = DinoProtocol(epochs=3, batch_size=24, lr=1.0)
OPTIONS = ExtractionOptions(num_workers=0, device="cpu", progress=False)


def _run(
    colors: Colors, *, train: str | None = None, test: str | None = None, **changes: Any
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "protocol": GRID,
        "options": OPTIONS,
    }
    sets = (train or colors.train, test or colors.test)
    return evaluate_linear(colors.weights, *sets, **{**settings, **changes})


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("protocol", [GRID, DINO])
def test_separable_classes_are_classified_perfectly(
    colors: Colors, protocol: GridProtocol | DinoProtocol, augment: bool
) -> None:
    report = _run(colors, protocol=protocol, augment=augment)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["score"]["top1"] == 100
    assert "top5" not in report["score"]  # of three classes
    assert report["train"]["left_out"] == report["test"]["left_out"] == {}
    assert report["chosen"]["chosen_on"] == "test"


def test_grid_reports_every_classifier_and_chooses_after_the_last_step(colors: Colors) -> None:
    report = _run(colors, augment=False)
    assert [e["step"] for e in report["evaluations"]] == [15, 20]
    last = report["evaluations"][-1]["classifiers"]
    assert len(last) == 4 * 13
    assert report["chosen"]["step"] == 20
    assert report["score"] == {"top1": max(entry["top1"] for entry in last)}
    assert {(e["blocks"], e["pooled"]) for e in last} == {
        *((1, False), (1, True), (2, False), (2, True))  # this network has two blocks
    }


@pytest.mark.parametrize(
    ("protocol", "augment"), [(DINO, True), (replace(GRID, eval_every=5), False)]
)
def test_an_interrupted_training_resumes_to_the_same_numbers(
    colors: Colors,
    tmp_path: Path,
    end_after: Callable[[int | None], None],
    protocol: GridProtocol | DinoProtocol,
    augment: bool,
) -> None:
    train, test = colors.hard
    runs = [tmp_path / name / "classifier.safetensors" for name in ("whole", "ended")]
    how: dict[str, Any] = {"train": train, "test": test, "protocol": protocol, "augment": augment}
    whole = _run(colors, out=runs[0], **how)
    end_after(2)
    with pytest.raises(KeyboardInterrupt):
        _run(colors, out=runs[1], **how)
    end_after(None)
    report = _run(colors, out=runs[1], **how)
    names = ("out", "best_out")
    assert report == whole | {name: report[name] for name in names}
    for name in names:
        assert Path(report[name]).read_bytes() == Path(whole[name]).read_bytes()
    assert len([*runs[1].parent.glob("classifier*")]) == 2
    tensors = load_file(report["out"])
    assert tensors["weight"].shape[0] == len(tensors["bias"]) == 3


def test_the_time_of_the_features_is_not_that_of_the_first_step(
    colors: Colors, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    with caplog.at_level(logging.INFO):
        _run(colors, augment=False, options=replace(OPTIONS, progress=True, cache=False))
    said = [record.getMessage() for record in caplog.records]
    counts = [line.split(" [")[0].split()[-1] for line in said if "% " in line]
    images = [at for at, count in enumerate(counts) if not count.endswith("/20")]
    assert counts[-1] == "20/20"
    assert images[-1] < counts.index("0/20"), "a bar of images within that of the steps"
    assert "\x1b" not in "".join(said)


def test_diverged_classifiers_are_reported_and_never_chosen(
    colors: Colors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dinoscale.evaluate.classification.linear_protocols.GRID_RATES", (3e38, 0.1)
    )
    report = _run(colors, augment=False)
    of_rates = [(e["lr"] > 1, e.get("diverged"), e["top1"]) for e in
                report["evaluations"][-1]["classifiers"]]  # fmt: skip
    assert {(True, True, 0.0)} < set(of_rates)
    assert all(diverged is None and top1 > 0 for high, diverged, top1 in of_rates if not high)
    with pytest.raises(NonFiniteError, match=r"step \d: .* lower the learning rate"):
        _run(colors, augment=False, protocol=replace(DINO, lr=3e38))


def test_dino_reports_the_best_and_the_last_epoch(colors: Colors) -> None:
    report = _run(colors, protocol=DINO)
    by_epoch = {e["epoch"]: e["classifiers"][0]["top1"] for e in report["evaluations"]}
    assert list(by_epoch) == [1, 2, 3]
    assert report["score"] == {"top1": max(by_epoch.values()), "last_top1": by_epoch[3]}
    assert by_epoch[report["chosen"]["epoch"]] == report["score"]["top1"]


@pytest.mark.parametrize("augment", [True, False])
def test_workers_change_nothing_and_the_seed_does(colors: Colors, augment: bool) -> None:
    short = GridProtocol(iterations=4, batch_size=8)
    train, test = colors.hard
    reports = [
        _run(
            colors,
            train=train,
            test=test,
            protocol=short,
            augment=augment,
            seed=seed,
            options=replace(OPTIONS, num_workers=workers),
        )
        for seed, workers in ((0, 0), (0, 2), (1, 0))
    ]
    assert reports[0] == reports[1]
    assert reports[0]["evaluations"] != reports[2]["evaluations"]


def test_without_augmentation_features_of_whole_images_are_trained_on(colors: Colors) -> None:
    """The same by hand, and something else with augmentation."""
    train, test = colors.hard
    short = GridProtocol(iterations=6, batch_size=8)
    without, with_ = (
        _run(colors, train=train, test=test, protocol=short, augment=augment, seed=5)
        for augment in (False, True)
    )
    inputs = open_inputs(colors.weights, train, test, OPTIONS)
    tokens = TokenFeatures(inputs.backbone, blocks=2)
    features, labels = extract_train_features(tokens, inputs, output_key=None)
    tests, test_labels = extract_test_features(tokens, inputs, output_key=None)
    plan = short.plan(inputs.backbone, images=48)
    sampler = endless_sampler(48, batch_size=8, steps=6, seed=5)
    accuracies = []
    for kind in plan.kinds:
        x, y = (kind.take(rows, stored=2, token_dim=32) for rows in (features, tests))
        heads = LinearHeads(num_heads=13, num_classes=3, width=x.shape[1], seed=5)
        for step in range(6):
            ids = torch.from_numpy(sampler.step(step).ids)
            heads.step(x[ids], labels[ids], torch.tensor(plan.rates) * plan.factor(step))
        accuracies += [100 * top1 / 48 for top1, _ in heads.num_correct(y, test_labels)]
    assert [entry["top1"] for entry in without["evaluations"][-1]["classifiers"]] == accuracies
    assert [entry["top1"] for entry in with_["evaluations"][-1]["classifiers"]] != accuracies


def test_results_are_logged_as_they_come_and_the_baseline_follows(
    colors: Colors, tmp_path: Path
) -> None:
    path = tmp_path / "made" / "log.jsonl"
    report = _run(colors, augment=False, untrained=True, log_path=path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["network"], line["step"]) for line in lines] == [
        *(("trained", 15), ("trained", 20), ("untrained", 15), ("untrained", 20))
    ]
    assert lines[1]["classifiers"] == report["evaluations"][1]["classifiers"]
    assert lines[3]["classifiers"] != lines[1]["classifiers"]
    assert report["untrained"].keys() == report["score"].keys()


def test_wrong_labels_give_wrong_answers(colors: Colors, tmp_path: Path) -> None:
    for wrong, right in (("blue", "red"), ("green", "blue"), ("red", "green")):
        (tmp_path / wrong).symlink_to(Path(colors.test) / right)
    report = _run(colors, test=str(tmp_path), protocol=DINO)
    assert report["score"]["last_top1"] == 0


def test_labels_of_the_test_set_are_in_the_numbers_of_the_train_set(colors: Colors) -> None:
    inputs = open_inputs(colors.weights, colors.train, colors.test, OPTIONS)
    other = replace(inputs, renumber=torch.tensor([2, 0, 1]))
    _, labels = extract_test_features(inputs.backbone, other, output_key=None)
    assert labels.tolist() == [2] * 4 + [0] * 4 + [1] * 4


def test_features_are_cached_by_what_the_network_computes(
    colors: Colors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINOSCALE_CACHE", str(tmp_path))
    inputs = open_inputs(colors.weights, colors.train, colors.test, OPTIONS)
    one, two = (TokenFeatures(inputs.backbone, blocks=n) for n in (1, 2))

    def forwards(tokens: TokenFeatures, *, cache: bool = True) -> tuple[Tensor, int]:
        calls = []
        hook = inputs.backbone.patch_embed.register_forward_hook(lambda *_: calls.append(1))
        extractor = replace(inputs.extractor, options=replace(OPTIONS, cache=cache))
        own = replace(inputs, extractor=extractor)
        rows, _ = extract_test_features(tokens, own, output_key=tokens.output_key)
        hook.remove()
        return rows, len(calls)

    rows, first = forwards(two)
    again, second = forwards(two)
    assert torch.equal(again, rows)
    assert (first, second) == (1, 0)
    assert [n for _, n in (forwards(one), forwards(two, cache=False))] == [1, 1]


def test_one_class_is_refused(colors: Colors) -> None:
    only = colors.folder("one", {"red": 3})
    with pytest.raises(DataError, match="of one class; need at least two"):
        _run(colors, train=only, test=only)


def test_a_set_without_labels_is_refused(colors: Colors, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "flat.png")
    with pytest.raises(DataError, match="train: the images have no labels"):
        _run(colors, train=str(tmp_path))


def test_other_classes_are_refused(colors: Colors) -> None:
    two = colors.folder("two", {"red": 1, "blue": 1})
    with pytest.raises(DataError, match="train has no images of: 'green'; train has 'blue', 'red'"):
        _run(colors, train=two)


def _shard(path: Path, numbers: tuple[int, ...]) -> str:
    """A tar shard with an image of each class number."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with tarfile.open(path, "w") as shard:
        for i, number in enumerate(numbers):
            for name, data in ((f"{i}.png", image.getvalue()), (f"{i}.cls", b"%d" % number)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    return str(path)


def test_a_class_number_that_the_train_set_lacks_is_refused(colors: Colors, tmp_path: Path) -> None:
    train, test = _shard(tmp_path / "a.tar", (0, 1, 4)), _shard(tmp_path / "b.tar", (1, 2, 3))
    with pytest.raises(DataError, match="has no images of: number 2, number 3"):
        _run(colors, train=train, test=test)


def test_a_training_is_another_where_its_classes_are(colors: Colors, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    shards = [_shard(path, (0, 1)) for path in (tmp_path / "train" / "a.tar", tmp_path / "b.tar")]
    found = []
    for of_train, of_test in (("ab", "ab"), ("ab", "ab"), ("ab", "ba"), ("ca", "ca")):
        for folder, (first, second) in (("train", of_train), ("", of_test)):
            (tmp_path / folder / "classes.txt").write_text(f"0\t{first}\n1\t{second}\n")
        found.append(open_inputs(colors.weights, *shards, OPTIONS).files)
    changed = [differences(found[0], other) for other in found[1:]]
    assert changed == [[], ["classes"], ["classes"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"protocol": GridProtocol(iterations=0)}, "iterations"),
        ({"log_path": "/dev/null/x"}, "log: /dev/null/x cannot be written"),
    ],
)
def test_bad_settings_are_refused(colors: Colors, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _run(colors, **changes)


def test_extraction_options_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_workers"):
        ExtractionOptions(num_workers=-1)
