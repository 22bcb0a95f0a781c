"""What the quickstart says of the end of its training."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoscale import cli
from dinoscale.config import load_config, phases_of
from dinoscale.convert.run_checkpoint import card_of
from dinoscale.convert.weights_file import save_backbone
from dinoscale.engine.build import build_networks
from dinoscale.errors import DinoscaleError, PreemptedError, RunFailedError
from dinoscale.training import quickstart


@pytest.mark.parametrize(
    ("code", "error"), [(75, PreemptedError), (1, RunFailedError), (2, RunFailedError)]
)
def test_exit_code_of_the_training_is_understood(
    monkeypatch: pytest.MonkeyPatch, code: int, error: type[DinoscaleError]
) -> None:
    command = [sys.executable, "-c", f"raise SystemExit({code})"]
    monkeypatch.setattr(quickstart, "on_this_node", lambda *_, **__: command)
    with pytest.raises(error):
        quickstart._pretrain("quickstart", [])


def test_signal_that_is_ignored_as_by_nohup_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getppid(), signal.SIGHUP)"]
    monkeypatch.setattr(quickstart, "on_this_node", lambda *_, **__: command)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        quickstart._pretrain("quickstart", [])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_reaches_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(100)"]
    monkeypatch.setattr(quickstart, "on_this_node", lambda *_, **__: command)
    before = signal.getsignal(signal.SIGTERM)

    def signal_once_it_is_heard() -> None:  # before that, it would end this process
        while signal.getsignal(signal.SIGTERM) is before:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signal_once_it_is_heard, daemon=True).start()
    with pytest.raises(PreemptedError, match="the same command goes on"):
        quickstart._pretrain("quickstart", [])
    assert signal.getsignal(signal.SIGTERM) is before


def test_its_words_say_how_to_find_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert quickstart._activated() == ". .venv/bin/activate && "
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / ".venv"))
    assert quickstart._activated() == ""


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ([], ("dino", None)),
        (["--recipe", "dinov2"], ("dinov2", None)),
        (["--recipe=dinov3", "--run-dir", "a"], ("dinov3", "a")),
    ],
)
def test_recipe_and_folder_reach_the_quickstart(
    monkeypatch: pytest.MonkeyPatch, words: list[str], asked: tuple[str, str | None]
) -> None:
    seen = []
    monkeypatch.setattr(quickstart, "quickstart", lambda *given: seen.append(given))
    cli.run(["quickstart", *words])
    assert seen == [asked]


def test_recipes_differ_in_the_objective_alone() -> None:
    first, second = (load_config(quickstart.PRESETS[name][0]) for name in ("dino", "dinov2"))
    changed = {name for name, value in first if value != getattr(second, name)}
    assert changed == {"run_dir", "patch_head", "dino", "ibot", "koleo", "optim"}
    # One clipping over a network is part of the recipe; rates and lengths are not.
    assert second.optim.model_copy(update={"clip_mode": first.optim.clip_mode}) == first.optim
    assert second.dino.model_copy(update={"targets": "centering"}) == first.dino


def test_both_last_phases_of_dinov3_differ_in_gram_anchoring_alone() -> None:
    begun, without, gram = phases_of(load_config("quickstart_dinov3"))
    assert without.train.continue_from == gram.train.continue_from == begun.run_dir
    assert {name for name, value in without if value != getattr(gram, name)} == {"run_dir", "gram"}
    assert not without.gram.loss_weight
    assert (gram.gram.steps_without, gram.gram.max_refreshes) == (1, 1)  # as the phase begins


@pytest.mark.parametrize(
    ("gram", "said"), [(61.5, "helps here, by 1.5 points"), (58.0, "not help here: -2.0 points")]
)
def test_its_words_say_whether_gram_anchoring_helped(
    tmp_path: Path, gram: float, said: str
) -> None:
    few = "synthetic:shapes?images=16&size=30&split="  # of which the pixels are measured
    sets = [f"eval.train={few}train", f"eval.test={few}test"]
    config = load_config("quickstart_dinov3", [f"run_dir={tmp_path}", *sets])
    measured = ((50.0, 59.0), (59.0, 60.0), (59.0, gram))
    for run, values in zip(phases_of(config), measured, strict=True):
        Path(run.run_dir).mkdir(parents=True)
        lines = [{"step": 0, "loss": 1.0}, *({"patch_knn_top1": value} for value in values)]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (Path(run.run_dir) / "metrics.jsonl").write_text(text)
    found = quickstart._patch_accuracies(config)
    assert {**found, "pixels": 0} == {
        "pixels": 0, "untrained": 50.0, "pretrain": 59.0, "without_gram": 60.0, "gram": gram
    }  # fmt: skip
    assert said in quickstart._patches_in_words(found)


@pytest.mark.parametrize(("recipe", "epochs"), [("dino", 25), ("dinov3", 12 + 6)])
def test_its_words_count_the_epochs_that_the_network_has_seen(recipe: str, epochs: int) -> None:
    assert quickstart._epochs_seen(load_config(quickstart.PRESETS[recipe][0])) == epochs


def test_patches_of_both_networks_are_drawn(tmp_path: Path) -> None:
    files = []
    for seed in range(2):
        config = load_config("quickstart_dinov2", [f"seed={seed}", "eval.batch_size=8"])
        files.append(tmp_path / f"{seed}.safetensors")
        state = build_networks(config)[0].backbone.state_dict()
        save_backbone(files[-1], state, card_of(config, source="untrained"))
    path = quickstart._draw_patches(config, files[1], files[0])
    drawn = np.asarray(Image.open(path))
    above, below = np.split(drawn, 2)
    assert (below[-100:, :200] == above[-100:, :200]).all()  # the same image, and beside it
    assert (below[-100:, 200:400] != above[-100:, 200:400]).any()  # other features
    assert not np.array_equal(above[:34], below[:34])  # under other words


def test_its_words_name_a_picture_that_was_drawn() -> None:
    config = load_config("quickstart_dinov2")
    result = {f"knn_top1_{name}": 1.0 for name in ("trained", "untrained", "pixels")}
    result |= dict.fromkeys(("training_s", "weights", "attention_image", "run_dir"), 0)
    said = quickstart._in_words(config, result, following="dinov2_vits16")
    assert "patch features" not in said
    assert "train dinov2_vits16 data.train" in said
    result["patches_image"] = "p.png"
    assert "patch features  p.png\n  curves" in quickstart._in_words(config, result, following="")
