"""Classifiers kept in files judge other test sets, and only with their own backbone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dinoscale import cli
from dinoscale.convert.weights_file import BackboneCard, save_backbone
from dinoscale.errors import CheckpointError, DataError
from dinoscale.evaluate.classification.answers import Details
from dinoscale.evaluate.classification.finetune import Recipe, evaluate_finetune
from dinoscale.evaluate.classification.kept_probe import evaluate_probe, load_probe
from dinoscale.evaluate.classification.linear import evaluate_linear
from dinoscale.evaluate.classification.linear_protocols import DinoProtocol, GridProtocol
from dinoscale.evaluate.classification.logistic import evaluate_logistic
from dinoscale.evaluate.frozen_backbone import ExtractionOptions
from dinoscale.models.zoo import build_backbone
from dinoscale.reports.comparison.scores import Outcome, compare
from tests.unit.evaluate.conftest import CARD, SHAPE, Colors

OPTIONS = ExtractionOptions(num_workers=0, device="cpu", progress=False)
TASKS: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "logistic": (evaluate_logistic, {"cs": (1.0, 100.0)}),
    "grid": (
        evaluate_linear,
        {"protocol": GridProtocol(iterations=6, batch_size=16), "augment": False},
    ),
    "dino": (
        evaluate_linear,
        {"protocol": DinoProtocol(epochs=2, batch_size=24, lr=1.0), "augment": False},
    ),
    "finetune": (evaluate_finetune, {"recipe": Recipe(epochs=1, batch_size=24, lr=1e-3)}),
}


def _keep(task: str, colors: Colors, out: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Backbone and classifier of a training on noisy images, and its report."""
    evaluate, settings = TASKS[task]
    details = Details(predictions=out.with_suffix(".csv"))
    how = {**settings, "options": OPTIONS, "details": details, "out": out}
    report = evaluate(colors.weights, *colors.hard, **how)
    chosen = Path(report["best_out" if "last_top1" in report["score"] else "out"])
    if task == "finetune":
        return chosen, chosen.with_name(f"{chosen.stem}-head.safetensors"), report
    return colors.weights, chosen, report


@pytest.mark.parametrize("task", TASKS)
def test_a_kept_classifier_gives_the_answers_that_it_gave(
    task: str, colors: Colors, tmp_path: Path
) -> None:
    weights, probe, report = _keep(task, colors, tmp_path / "kept.safetensors")
    details = Details(predictions=tmp_path / "again.csv")
    found = evaluate_probe(weights, probe, colors.hard[1], details=details, options=OPTIONS)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["score"] == {"top1": report["score"]["top1"]}
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "kept.csv").read_bytes()


def test_only_the_classes_of_the_set_compete(colors: Colors, tmp_path: Path) -> None:
    weights, probe, _ = _keep("logistic", colors, tmp_path / "kept.safetensors")
    few = colors.folder(f"{tmp_path.name}-few", {"blue": 9, "red": 7}, seed=3, noise=250)
    details = Details(per_class=True)
    found = evaluate_probe(weights, probe, few, details=details, options=OPTIONS)
    score = found["score"]
    assert score["top1"] > score["top1_all_classes"]  # type: ignore[index]  # nested report
    assert found["confusion"]["classes"] == ["blue", "red"]  # type: ignore[index]  # nested report
    assert found["protocol"]["competing_classes"] == 2  # type: ignore[index]  # nested report
    other = colors.folder(f"{tmp_path.name}-other", {"green": 1}, seed=3)
    Path(other, "green").rename(Path(other, "violet"))
    with pytest.raises(DataError, match="no images of: 'violet'; train has 'blue', 'green', 'red'"):
        evaluate_probe(weights, probe, other, options=OPTIONS)


def test_only_the_network_and_preparation_of_the_training_are_judged(
    colors: Colors, tmp_path: Path
) -> None:
    _, probe, _ = _keep("logistic", colors, tmp_path / "kept.safetensors")
    with safe_open(colors.weights, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def judge(card: BackboneCard) -> dict[str, Any]:
        save_backbone(tmp_path / "same.safetensors", state, card)
        return evaluate_probe(tmp_path / "same.safetensors", probe, colors.test, options=OPTIONS)

    stated = replace(SHAPE, name="vit_small_patch16_224", norm_eps=1e-6)  # what names imply
    assert judge(replace(CARD, backbone=stated))["score"] == judge(CARD)["score"]
    for changed, named in (
        ({"backbone": replace(SHAPE, num_heads=2)}, "num_heads"),
        ({"backbone": replace(SHAPE, norm_eps=1e-5)}, "norm_eps"),
        ({"mean": (0.0, 0.9, 0.2), "std": (1.0, 0.1, 0.5)}, "mean, std"),
        ({"max_pixel_value": 255.0}, "max_pixel_value"),
    ):
        with pytest.raises(CheckpointError, match=f"trained with another {named} than .*same"):
            judge(replace(CARD, **changed))
    kept = load_probe(probe)
    older = replace(kept.card, backbone=kept.card.backbone["weights"])  # type: ignore[index]  # JSON
    save_file({"weight": kept.weight, "bias": kept.bias}, probe, older.metadata())
    with pytest.raises(CheckpointError, match=r"by an older version, and does not say the .*mean"):
        judge(CARD)


def test_other_weights_and_other_files_are_refused(colors: Colors, tmp_path: Path) -> None:
    _, probe, _ = _keep("grid", colors, tmp_path / "kept.safetensors")
    torch.manual_seed(9)
    others = tmp_path / "others.safetensors"
    save_backbone(others, build_backbone(**vars(SHAPE)).state_dict(), CARD)
    with pytest.raises(CheckpointError, match=r"of other weights than .*others"):
        evaluate_probe(others, probe, colors.test, options=OPTIONS)
    for wrong in (others, tmp_path / "nowhere", Path(colors.train, "red", "0.png")):
        with pytest.raises(CheckpointError, match=f"{wrong.name} is no kept classifier"):
            evaluate_probe(colors.weights, wrong, colors.test, options=OPTIONS)


def test_the_command_judges_at_the_sizes_of_the_training(
    colors: Colors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kept.safetensors"
    sets = ("--train", colors.hard[0], "--test", colors.hard[1], "--num-workers", "0")
    line = ("logistic", str(colors.weights), *sets, "--c", "1", "--out", str(out))
    cli.run(["evaluate", *line])
    kept = json.loads(capsys.readouterr().out)
    words = ("--probe", str(out), "--test", colors.hard[1], "--num-workers", "0")
    cli.run(["evaluate", "probe", str(colors.weights), *words])
    judged = json.loads(capsys.readouterr().out)
    assert judged["score"] == kept["score"]
    assert judged["protocol"]["images"] == kept["protocol"]["images"]
    assert {"weights", "test", "probe"} <= judged["made_from"]["input"].keys()


def test_classifiers_of_other_sets_and_settings_are_other_columns(
    colors: Colors, tmp_path: Path
) -> None:
    # Made the same way twice, of which once from a copy, by another C, and from another train set.
    shutil.copytree(colors.hard[0], tmp_path / "copy")
    ways = [(1.0, 0), (1.0, 2), (2.0, 0), (1.0, 1)]
    outcomes = []
    for number, (c, of) in enumerate(ways):
        sets = ((colors.hard[0], colors.train, str(tmp_path / "copy"))[of], colors.test)
        out = tmp_path / f"{number}.safetensors"
        evaluate_logistic(colors.weights, *sets, cs=(c,), out=out, options=OPTIONS)
        report = evaluate_probe(colors.weights, out, colors.test, options=OPTIONS)
        outcomes.append(Outcome(f"w{number}", "teacher", "probe", "", report))
        training = report["protocol"]["training"]  # type: ignore[index]  # nested report
        assert training["train_digest_of"].endswith("not their contents")
    assert len(compare(outcomes[:2]).columns) == 1
    assert len(compare(outcomes).columns) == 3
