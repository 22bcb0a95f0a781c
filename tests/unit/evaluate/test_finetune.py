"""Fine-tuning: it learns, it is reproducible, and it reports its settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoscale.convert.weights_file import load_backbone
from dinoscale.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    OutputError,
)
from dinoscale.evaluate.classification.finetune import Classifier, Recipe, evaluate_finetune
from dinoscale.evaluate.frozen_backbone import ExtractionOptions
from tests.unit.evaluate.conftest import Colors

FAST = Recipe(epochs=4, batch_size=12, lr=0.1)
OPTIONS = ExtractionOptions(num_workers=0, device="cpu", progress=False)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _run(colors: Colors, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "recipe": FAST,
        "options": OPTIONS,
    }
    sets = changes.pop("sets", (colors.train, colors.test))
    return evaluate_finetune(colors.weights, *sets, **{**settings, **changes})


def test_the_loss_falls_and_separable_classes_are_classified_perfectly(colors: Colors) -> None:
    report = _run(colors)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    losses = [evaluation["loss"] for evaluation in report["evaluations"]]
    assert losses[-1] < 0.8 * losses[0]
    assert report["score"]["top1"] == 100
    assert report["score"].keys() == {"top1", "last_top1"}
    assert report["chosen"]["chosen_on"] == "test"
    assert [evaluation["epoch"] for evaluation in report["evaluations"]] == [1, 2, 3, 4]


def test_workers_change_nothing_and_the_seed_does(colors: Colors) -> None:
    short = Recipe(epochs=1, batch_size=12, lr=0.1)
    losses = [
        _run(colors, recipe=short, seed=seed, options=replace(OPTIONS, num_workers=n))[
            "evaluations"
        ][0]["loss"]
        for seed, n in ((0, 0), (0, 2), (1, 0))
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_the_last_backbone_is_written_with_its_card(colors: Colors, tmp_path: Path) -> None:
    report = _run(colors, out=tmp_path / "new" / "tuned.safetensors", untrained=True)
    tuned, card = load_backbone(report["out"])
    before, old = load_backbone(colors.weights)
    assert card.source == "untrained, fine-tuned"
    assert card.backbone == old.backbone
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert (tuned([images]) - before([images])).abs().max() > 0.01
    assert report["untrained"].keys() == report["score"].keys()


HARD = Recipe(epochs=4, batch_size=12, lr=0.01)


@pytest.fixture(scope="module")
def whole(colors: Colors, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a training that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "tuned.safetensors"
    return _run(colors, recipe=HARD, sets=colors.hard, out=out, untrained=True)


@pytest.mark.parametrize("times", [1, 3, 4, 6])
def test_an_interrupted_training_resumes_to_the_same_numbers(
    colors: Colors,
    whole: dict[str, Any],
    tmp_path: Path,
    end_after: Callable[[int | None], None],
    times: int,
) -> None:
    out = tmp_path / "tuned.safetensors"
    end_after(times)
    with pytest.raises(KeyboardInterrupt):
        _run(colors, recipe=HARD, sets=colors.hard, out=out, untrained=True)
    assert out.exists()
    end_after(None)
    report = _run(colors, recipe=HARD, sets=colors.hard, out=out, untrained=True)
    names = ("out", "best_out")
    assert {k: v for k, v in report.items() if k not in names} == {
        k: v for k, v in whole.items() if k not in names
    }
    for name in names:
        assert Path(report[name]).read_bytes() == Path(whole[name]).read_bytes()
    files = {path.name for path in tmp_path.glob("tuned*")}
    names = ("tuned", "tuned-best", "tuned-head", "tuned-best-head")
    assert files == {f"{name}.safetensors" for name in names}


def test_the_best_backbone_is_that_of_the_best_epoch(whole: dict[str, Any]) -> None:
    best, last = (Path(whole[name]).read_bytes() for name in ("best_out", "out"))
    assert (best == last) == (whole["chosen"]["epoch"] == 4)


def test_the_state_of_another_training_is_refused(
    colors: Colors, tmp_path: Path, end_after: Callable[[int | None], None]
) -> None:
    out = tmp_path / "tuned.safetensors"
    end_after(1)
    with pytest.raises(KeyboardInterrupt):
        _run(colors, out=out)
    end_after(None)
    with pytest.raises(ConfigError, match=r"tuned.safetensors.resume .* \(command.lr, .*remove it"):
        _run(colors, recipe=replace(FAST, lr=0.2), out=out)
    (tmp_path / "tuned.safetensors.resume").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"resume is damaged: remove it"):
        _run(colors, out=out)


def test_reports_count_the_images_that_were_used(colors: Colors) -> None:
    train = Path(colors.folder("torn-train", {"blue": 5, "red": 4}))
    test = Path(colors.folder("torn-test", {"blue": 3, "red": 2}, seed=1))
    for torn in (train / "blue" / "0.png", train / "red" / "0.png", test / "red" / "1.png"):
        torn.write_bytes(b"torn")
    report = _run(colors, sets=(str(train), str(test)), recipe=replace(FAST, epochs=1))
    found = [[report[name][key] for key in ("images", "unreadable", "classes")]
             for name in ("train", "test")]  # fmt: skip
    assert found == [[7, 2, 2], [4, 1, 2]]


def test_the_rate_rises_for_a_sixtieth_of_the_steps_then_falls() -> None:
    recipe = Recipe(batch_size=128, lr=4e-4)
    rates = [recipe.rate(step, total_steps=600) for step in range(600)]
    assert rates[0] == 0
    assert rates[9] == rates[10] == max(rates) == 1e-4  # 4e-4 x 128 / 512
    assert rates[10 + 295] == pytest.approx(0.5e-4)  # half way down the cosine
    assert rates[-1] < 1e-8


def _after_one_step(colors: Colors, name: str, **changes: float) -> dict[str, torch.Tensor]:
    recipe = Recipe(epochs=1, batch_size=36, drop_path_rate=0.0, **changes)  # type: ignore[arg-type]  # floats only
    report = _run(colors, recipe=recipe, out=colors.root / name)
    return dict(load_backbone(report["out"])[0].named_parameters())


def test_every_tensor_learns_and_only_matrices_decay(colors: Colors) -> None:
    before = dict(load_backbone(colors.weights)[0].named_parameters())
    plain = _after_one_step(colors, "plain", weight_decay=0.0)
    decayed = _after_one_step(colors, "decayed", weight_decay=100.0)
    for name, old in before.items():
        assert not torch.equal(plain[name], old), name
        assert torch.equal(plain[name], decayed[name]) == (old.ndim == 1), name


def test_bf16_runs_on_a_cpu(colors: Colors) -> None:
    lower, full, other_draws = (
        _run(colors, recipe=replace(FAST, epochs=1, precision=precision), seed=seed)["evaluations"][
            0
        ]["loss"]
        for precision, seed in (("bf16", 0), ("fp32", 0), ("fp32", 1))
    )
    assert 0 < abs(lower - full) < abs(other_draws - full)  # rounding is the lesser change


def test_a_resnet_has_no_stochastic_depth() -> None:
    class Flat(torch.nn.Module):
        embed_dim, depth = 3, 0

        def forward(self, crops: list[torch.Tensor], keep: torch.Tensor | None) -> torch.Tensor:
            assert keep is None
            return crops[0].mean(dim=(2, 3))

    network = Classifier(Flat(), num_classes=5, seed=0)
    assert network([torch.ones(2, 3, 4, 4)]).shape == (2, 5)


def test_a_diverged_training_is_reported(colors: Colors) -> None:
    with pytest.raises(NonFiniteError, match=r"not a finite number|not finite"):
        _run(colors, recipe=Recipe(epochs=1, batch_size=6, lr=1e38, drop_path_rate=0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": Recipe(epochs=0)}, "epochs"),
        ({"recipe": Recipe(lr=0.0)}, "lr"),
        ({"recipe": Recipe(label_smoothing=1.0)}, "label_smoothing"),
        ({"seed": -1}, "seed"),
        ({"out": "/dev/null/x.safetensors"}, "out: .* cannot be written"),
        ({"out": "/tmp"}, "is a folder"),
    ],
)
def test_bad_settings_are_refused(colors: Colors, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _run(colors, **changes)


def test_the_weights_are_not_overwritten(colors: Colors) -> None:
    with pytest.raises(OutputError, match="is the input"):
        _run(colors, out=colors.weights)


def test_one_class_is_refused(colors: Colors) -> None:
    only = colors.folder("single", {"blue": 2})
    with pytest.raises(DataError, match="one class"):
        _run(colors, sets=(only, only))
