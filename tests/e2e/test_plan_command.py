"""`dinoscale plan` as a user calls it."""

import json
from pathlib import Path
from typing import Any

import pytest

from dinoscale import cli
from dinoscale.config import load_config
from dinoscale.errors import ConfigError
from dinoscale.planning.plan.report import IMAGENET
from tests.forked import run_module

_IN_GROUPS_OF_4 = ("vit_s16", "engine.zero_stage=3", "engine.zero_hpz_partition_size=4")


def _plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    cli.run(["plan", *arguments, "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_json_has_every_stage_and_level_and_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan(capsys, "vit_l16", "--gpus", "8", "--gpu-memory", "80GB")
    ways = {(option["zero_stage"], option["recompute"]) for option in plan["options"]}
    levels = ("none", "pointwise", "all_but_attention", "block")
    assert ways == {(stage, level) for stage in range(4) for level in levels}
    best = plan["recommended"]
    assert (best["zero_stage"], best["recompute"], best["fits"]) == (2, "none", True)
    share = load_config("vit_l16", []).train.batch_size // 8
    assert best["micro_batch_size"] * best["accumulation_steps"] == share
    assert best["peak_bytes"] == pytest.approx(sum(best["bytes"].values()), abs=10)
    assert plan["configured"]["micro_batch_size"] == 16
    assert plan["steps"] == 250 * (IMAGENET // 1024)
    assert any("ImageNet" in sentence for sentence in plan["assumptions"])


def test_text_ends_with_the_recommendation(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["plan", "vit_s16", "--gpus", "8", "--gpu", "a100"])
    out = capsys.readouterr().out
    assert "largest micro-batch that fits" in out
    last = out.splitlines()[-1]
    assert last.startswith("recommended: stage 2, nothing recomputed")
    assert "engine.zero_stage=2" in last
    assert "train.micro_batch_size=128" in last


def test_plan_says_if_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["plan", "vit_l16", "--gpus", "1", "--gpu-memory", "4GB"])
    assert "nothing fits: even stage" in capsys.readouterr().out


def test_auto_is_planned_too(capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan(capsys, "vit_s16", "train.micro_batch_size=auto", "--gpus", "8")
    assert plan["configured"] is None
    assert plan["recommended"]["micro_batch_size"] == 128


def test_images_are_counted_where_they_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = ("train.batch_size=8", "--gpus", "2")
    plan = _plan(capsys, "vit_s16", "data.train=synthetic:shapes?images=80&size=32", *small)
    assert plan["steps_per_epoch"] == 10
    chosen = ("vit_s16", "data.train=synthetic:shapes?images=80&size=32", *small)
    assert _plan(capsys, *chosen, "data.subset_size=40")["steps_per_epoch"] == 5
    with pytest.raises(ConfigError, match="81 images are more than the 80 in synthetic"):
        cli.run(["plan", *chosen, "data.subset_size=81"])
    nowhere = f"data.train={tmp_path}/none"
    assert _plan(capsys, "vit_s16", nowhere, "data.subset_size=40", *small)["steps_per_epoch"] == 5
    plan = _plan(
        capsys, "vit_s16", f"data.train={tmp_path}/none", "data.images_per_epoch=160", *small
    )
    assert plan["steps_per_epoch"] == 20


def test_a_run_that_would_not_start_for_want_of_a_gram_network_is_planned_and_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    weights = tmp_path / "weights.pth"
    plan = ["plan", "vit_s16", "gram.loss_weight=1", f"gram.teacher={weights}", "--json"]
    plan += ["--gpus", "1"]
    cli.run(plan)
    shown = capsys.readouterr()
    assert json.loads(shown.out)["gpus"] == 1
    said = f"a run here would not start: gram.teacher: {weights}: No such file or directory; give"
    assert shown.err.startswith(said)
    weights.touch()
    cli.run(plan)
    assert capsys.readouterr().err == ""


def test_on_several_nodes_the_plan_covers_links_failures_and_checkpoints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    many = (*_IN_GROUPS_OF_4, "--gpus", "16")
    plan = _plan(capsys, *many, "--node-gpus", "4", "--network", "10", "--storage", "2")
    sent = plan["configured"]["communication"]
    groups = {t["what"]: (t["group"], t["between_bytes"]) for t in sent["transfers"]}
    assert groups["weights in a node"] == (4, 0)
    assert sum(4 * between for _, between in groups.values()) == pytest.approx(
        sum(t["sent_bytes"] for t in sent["transfers"] if t["group"] == 16)
    )
    found = plan["durability"]
    assert found["checkpoint_bytes"] == 16 * plan["parameters"]["total"]
    assert found["write_s"] == pytest.approx(found["checkpoint_bytes"] / 2e9)
    mean_s = 86_400 / found["failures_per_day"]
    assert found["failures_per_day"] == pytest.approx(16 * 4.736e-4, rel=1e-3)
    assert found["interval_s"] ** 2 == pytest.approx(2 * found["write_s"] * mean_s)
    slow = _plan(
        capsys, *many, "--storage", "2", "--hang", "60", "--requeue", "7200", "--index", "600"
    )["durability"]
    restart_s = 7200 + 120 + 600 + found["write_s"]
    assert slow["restart_s"] == pytest.approx(restart_s)
    saving = found["write_s"] / found["interval_s"]
    per_failure_s = (slow["lost_share"] - saving) * mean_s
    assert per_failure_s == pytest.approx(found["interval_s"] / 2 + found["write_s"] + restart_s)
    most_s = (slow["most_lost_share"] - saving) * mean_s
    assert most_s == pytest.approx(found["interval_s"] + found["write_s"] + 60 + restart_s)
    cli.run(["plan", *many])
    said = capsys.readouterr().out
    assert "failures expected per day" in said
    assert "(--requeue)" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["vit_s16", "--gpus", "0"], "--gpus: need at least 1, got 0"),
        (["vit_s16", "--gpus", "8", "--gpu-memory", "80XB"], "--gpu-memory: need a size"),
        (["vit_s16", "--gpus", "8", "--gpu", "voodoo"], "unknown name 'voodoo'; known: a10, a100"),
        (["vit_s16", "--gpus", "7"], "cannot be shared equally by 7 ranks"),
        (["vit_s16", "train.micro_batch_size=60", "--gpus", "8"], "does not divide"),
        (["vit_s16", "--gpus", "8", "--utilization", "40"], "--utilization"),
        (["vit_s16", "--gpus", "8", "--network", "-1"], "--network"),
        (["vit_s16", "--gpus", "8", "--storage", "0"], "--storage: need GB/s above 0, got 0"),
        (["vit_s16", "--gpus", "8", "--requeue", "-1"], "--requeue: need seconds, got -1"),
        (["vit_s16", "--gpus", "8", "--node-gpus", "0"], "--node-gpus: need at least 1, got 0"),
        (
            [*_IN_GROUPS_OF_4, "--gpus", "8", "--node-gpus", "2"],
            "4 does not divide the 2 ranks of a node",
        ),
        (
            ["vit_s16", "model.backbone=resnet50", "model.drop_path_rate=0.0", "--gpus", "8"],
            "plan supports only ViTs",
        ),
    ],
)
def test_mistakes_are_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        cli.run(["plan", *arguments])
    assert caught.value.exit_code == 2
    assert capsys.readouterr().out == ""


def test_a_mistake_ends_the_command_with_a_sentence() -> None:
    done = run_module("dinoscale", "plan", "vit_s16", "--gpus", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "error: --gpus: need at least 1, got 0"
