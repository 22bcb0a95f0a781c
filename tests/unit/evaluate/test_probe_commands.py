"""The commands of the tasks that train a classifier."""

import json
import shlex
from pathlib import Path

import pytest

from dinoscale import cli
from dinoscale.errors import ConfigError, LaunchError
from tests.unit.evaluate.conftest import Colors


def _run(
    task: str, colors: Colors, capsys: pytest.CaptureFixture[str], *more: str
) -> dict[str, object]:
    sets = ("--train", colors.train, "--test", colors.test, "--num-workers", "0")
    cli.run(["evaluate", task, str(colors.weights), *sets, *more])
    report: dict[str, object] = json.loads(capsys.readouterr().out)
    return report


def test_linear_takes_both_protocols(colors: Colors, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("--no-augmentation", "--batch-size", "8", "--seed", "3")
    grid = _run("linear", colors, capsys, *short, "--iterations", "2")["protocol"]
    assert (grid["method"], grid["iterations"], grid["seed"]) == ("grid", 2, 3)  # type: ignore[index]  # nested report
    of_dino = ("--protocol", "dino", "--epochs", "1", "--lr", "0.5")
    dino = _run("linear", colors, capsys, *short, *of_dino)["protocol"]
    assert (dino["method"], dino["epochs"], dino["lr"]) == ("dino", 1, 0.5)  # type: ignore[index]  # nested report
    assert dino["batch_size"] == 8  # type: ignore[index]  # nested report
    assert "without augmentation" in dino["train_images"]  # type: ignore[index]  # nested report


@pytest.mark.parametrize(
    "wrong", [("--epochs", "1"), ("--lr", "1"), ("--protocol", "dino", "--iterations", "1")]
)
def test_a_number_of_the_other_protocol_is_refused(
    colors: Colors, capsys: pytest.CaptureFixture[str], wrong: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match=wrong[-2]):
        _run("linear", colors, capsys, *wrong)


def test_logistic_and_finetune_print_their_reports(
    colors: Colors, capsys: pytest.CaptureFixture[str]
) -> None:
    logistic = _run("logistic", colors, capsys, "--c", "1", "10")
    assert logistic["task"] == "logistic"
    assert logistic["protocol"]["cs"] == [1, 10]  # type: ignore[index]  # nested report
    tuned = _run("finetune", colors, capsys, "--epochs", "1", "--batch-size", "36")
    assert tuned["task"] == "finetune"
    assert tuned["protocol"]["precision"] == "fp32"  # type: ignore[index]  # nested report


def test_score_and_baselines_are_said_in_words(
    colors: Colors, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        _run("knn", colors, capsys, "--pixels", "--k", "3")  # pixels tell colors apart too
        *_, score, caution = [record.getMessage() for record in caplog.records]
        assert score == "top1_k3 100.0 %; without a network 100.0 %"
        assert caution.startswith("a baseline is as good")
        caplog.clear()
        cli.run(["evaluate", "retrieve", str(colors.weights), "--data", colors.test])
    assert "mAP 100.0 %; without a network" in caplog.text
    assert "a baseline is as good" not in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        "linear {w} --train {i} --test {i}",
        *("finetune {w} --train {i} --test {i}", "attention {w} {i} --out {o}"),
        *("attention {w} {i} {o}/sheet.png", "segment {w} {i} --out {o}", "pca {w} {i} --out {o}"),
        *("video {w} {i} --out {o}", "retrieve {w} --images {i} --ground-truth x"),
        "segmentation {w} --train {i} --test {i} --out {o}",
        "depth {w} --train {i} --test {i} --out {o}",
        "compare {w} --out {o} --task 'retrieve --data {i}'",
    ],
)
def test_several_processes_are_refused_once_and_before_anything_is_written(
    colors: Colors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str
) -> None:
    out = tmp_path / "out"
    words = shlex.split(line.format(w=colors.weights, i=colors.train, o=out))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    reason = r"\. Measure under" if words[0] == "compare" else r": \w.*\. Start it as"
    refused = rf"evaluate {words[0]} runs in one process, not in 2{reason}"
    with pytest.raises(LaunchError, match=refused):
        cli.run(["evaluate", *words])
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        cli.run(["evaluate", *words])
    assert not out.exists()


@pytest.mark.parametrize(
    "line",
    [
        *("export w {o}/w.safetensors", "convert w {o}/w.pth --to dino", "report w"),
        *(
            "data build-shards i {o}",
            "checkpoint prune w --keep-last 1",
            "quickstart --run-dir {o}",
        ),
    ],
)
def test_commands_of_one_process_are_refused_likewise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str
) -> None:
    words = shlex.split(line.format(o=tmp_path / "out"))
    for rank, error in (("0", LaunchError), ("1", SystemExit)):
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(error, match=rf"{words[0]} runs in one process" if rank == "0" else "2"):
            cli.run(words)
    assert not (tmp_path / "out").exists()
