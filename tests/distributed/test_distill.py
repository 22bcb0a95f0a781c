"""A small student of a larger frozen teacher: interrupted, at several stages, with another one."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dinoscale.checkpoint.layout import directory, shard_file
from tests.distributed.tiny_run import dinov2, tiny_config
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]

STOP, LAST = 2, 4
BF16 = torch.finfo(torch.bfloat16).eps
LOGGED = ("loss", "dino_loss", "ibot_loss", "koleo_loss", "grad_norm")
# Wider, deeper, with registers, rotary positions and smaller patches than the student: 8 x 8 of
# them in a global crop, of which the student has 4 x 4.
LARGE = {"embed_dim": 24, "depth": 3, "patch_size": 4, "registers": 2, "rope": {"rescale": 2.0}}
HEADS = {
    "head": {"num_prototypes": 33, "hidden_dim": 26, "bottleneck_dim": 17, "batch_norm": True},
    "patch_head": {"num_prototypes": 29, "hidden_dim": 14, "bottleneck_dim": 11},
}

WITH_BATCH_NORM = (
    *("own-sinkhorn_knopp-0", "frozen-sinkhorn_knopp-0", "frozen-sinkhorn_knopp-3"),
    "frozen-centering-0",
)


def _run(run_dir: Path, stop: int, images: int = 2, **changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `tiny_config`; `images` of a micro-batch."""
    sections = dinov2("sinkhorn_knopp", patch_head=True) | changes
    sections["train"] = {"epochs": 2, "batch_size": 4, "micro_batch_size": images}
    sections["train"] |= {"stop_after_steps": stop}
    sections["data"] = {"train": "synthetic:shapes?images=8&size=40", "num_workers": 0}
    sections["checkpoint"] = {"every_steps": 1, "keep_last": 9}
    return {"run_dir": str(run_dir), **sections}


def _distilled(
    run_dir: Path,
    *,
    teacher: Path | None,
    stop: int = LAST,
    kind: str = "0_fp32",
    images: int = 2,
    **changes: dict[str, Any],
) -> dict[str, Any]:
    model = {"backbone": "vit_tiny_patch16_224", "num_heads": 2, **LARGE}
    networks = {"model": model, **HEADS} if teacher else {}
    stage, precision = kind.split("_")
    return _run(
        run_dir,
        stop,
        images,
        **changes,
        distill={"teacher": str(teacher) if teacher else None, **networks},
        engine={"zero_stage": int(stage), "precision": precision},
    )


def _with_batch_norm(root: Path, job: str, source: Path) -> dict[str, Any]:
    """One step of several micro-batches of a student with batch norm, by itself or distilled."""
    teacher, rule, stage = job.split("-")
    return _distilled(
        root / job,
        teacher=source if teacher == "frozen" else None,
        stop=1,
        kind=f"{stage}_fp32",
        images=1,
        head={"batch_norm": True},
        koleo={"loss_weight": 0.0},  # which needs two
        dino={"targets": rule},
    )


def _continued(root: Path, name: str, teacher: Path | None) -> dict[str, Any]:
    """One step from a distilled run's checkpoint, after which a center is nearly as before it."""
    dino = {"targets": "centering", "center_momentum": 0.999}
    run = _distilled(root / name, teacher=teacher, stop=1, head={"batch_norm": True}, dino=dino)
    run["train"]["continue_from"] = str(root / "frozen-centering-0")
    return run


def train_all(runs: list[dict[str, Any]]) -> list[str]:
    """On every rank: train each of `runs`, arguments of `tiny_config`, and say how it ended."""
    from dinoscale.errors import ConfigError
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.trainer import train

    ends = []
    for run in runs:
        try:
            train(tiny_config(**run), read_process(os.environ))
            ends.append("done")
        except ConfigError as error:  # noqa: PERF203  # other runs follow
            ends.append(str(error))
    return ends


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs; `ends.json` has what rank 0 says of the last ones, and all say."""
    root = tmp_path_factory.mktemp("distilled")
    source, resumed = root / "source", root / "resumed"
    runs = [
        _run(source, 2, model=LARGE, **HEADS, engine={"precision": "fp32"}),
        *(_with_batch_norm(root, job, source) for job in WITH_BATCH_NORM),
        *(_continued(root, name, teacher) for name, teacher in (("on", source), ("anew", None))),
        _distilled(root / "whole", teacher=source),
        _distilled(root / "3_fp32", teacher=source, kind="3_fp32"),
        _distilled(root / "3_bf16", teacher=source, kind="3_bf16", stop=1),
        _distilled(resumed, teacher=source, stop=STOP),
        _distilled(resumed, teacher=directory(source, 1)),
        _distilled(resumed, teacher=None),
        _distilled(resumed, teacher=directory(source, 2)),  # the same by another name
    ]
    function = "tests.distributed.test_distill:train_all"
    first, second = run_distributed(function, world_size=2, timeout_s=280, runs=runs)
    assert first == [end.removeprefix("rank 0: ") for end in second]
    assert first[:-3] == (len(runs) - 3) * ["done"]
    (root / "ends.json").write_text(json.dumps(first[-3:]))
    return root


def _logged(run_dir: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in LOGGED} for line in lines if "loss" in line]


def test_a_resumed_run_goes_on_bit_for_bit_with_the_same_teacher_only(root: Path) -> None:
    another, none, same = json.loads((root / "ends.json").read_text())
    assert another.startswith("distill.teacher: the run of ")
    assert "whose weights are others" in another
    assert "; got null" in none
    assert same == "done"
    assert _logged(root / "resumed") == _logged(root / "whole")
    for rank in (0, 1):
        files = [directory(root / name, LAST) / shard_file(rank) for name in ("whole", "resumed")]
        first, second = map(load_file, files)
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_a_run_goes_on_over_another_number_of_ranks(root: Path) -> None:
    alone = root / "alone"
    shutil.copytree(directory(root / "whole", STOP), directory(alone, STOP))
    run = _distilled(alone, teacher=root / "source")
    arguments: dict[str, Any] = {"world_size": 1, "timeout_s": 120, "runs": [run]}
    (ends,) = run_distributed("tests.distributed.test_distill:train_all", **arguments)
    assert ends == ["done"]
    found, expected = _logged(alone), _logged(root / "whole")[STOP:]
    assert len(found) == LAST - STOP
    for here, there in zip(found, expected, strict=True):
        for term in LOGGED[:3]:
            assert here[term] == pytest.approx(there[term], rel=1e-5), term


def test_checkpoints_hold_the_student_and_its_average_and_not_the_teacher(root: Path) -> None:
    held = load_file(directory(root / "whole", LAST) / shard_file(0))
    assert {key.split("/")[0] for key in held} == {"master", "ema", "exp_avg", "exp_avg_sq"}
    assert not any("reg_token" in key for key in held)  # which only the teacher has


@pytest.mark.parametrize("kind", ["3_fp32", "3_bf16"])
def test_a_teacher_in_partitions_gives_the_same_targets(root: Path, kind: str) -> None:
    found, whole = _logged(root / kind), _logged(root / "whole")
    assert len(found) == (LAST if kind == "3_fp32" else 1)
    rel = 1e-5 if kind == "3_fp32" else BF16
    for here, there in zip(found, whole, strict=False):
        for term in LOGGED[:3]:
            assert here[term] == pytest.approx(there[term], rel=rel)


@pytest.mark.parametrize("job", [job for job in WITH_BATCH_NORM if job.startswith("frozen")])
def test_the_averages_batch_norm_sees_the_images_though_another_network_teaches(
    root: Path, job: str
) -> None:
    stage = job[-1]
    own, found = (
        load_file(directory(root / name, 1) / "shared.safetensors")
        for name in (WITH_BATCH_NORM[0], job)
    )
    statistics = {name for name in own if name.startswith("teacher/head.") and "running" in name}
    assert len(statistics) == 4  # mean and variance of two layers
    for name in statistics:
        # In the first step both averages are the student as it began, and see the same crops,
        # whatever the rule of the targets.
        rtol = 0 if stage == "0" else 1e-5
        torch.testing.assert_close(found[name], own[name], rtol=rtol, atol=rtol)
    ends = ".num_batches_tracked"
    counts = [v for k, v in found.items() if k.startswith("teacher/") and k.endswith(ends)]
    assert len(counts) == 2
    assert all(int(count) == 2 for count in counts)  # each micro-batch once


def test_a_run_takes_the_centers_of_another_only_with_its_teacher(root: Path) -> None:
    jobs = ("frozen-centering-0", "on", "anew")
    before, on, anew = (
        load_file(directory(root / name, 1) / "shared.safetensors") for name in jobs
    )
    for name in ("center", "patch_center"):
        kept, begun = (float(held[name].norm() / before[name].norm()) for held in (on, anew))
        assert 0.9 < kept < 1.1, name
        assert 0 < begun < 0.1, name  # 0.001 of the mean of its own outputs
