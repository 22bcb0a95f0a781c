"""Runs in which a part of the weights trains: what moves, is restored, and is exported."""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoscale.config import RunConfig
from dinoscale.errors import CheckpointError
from tests.distributed.plain_run import EPS, NUMBERS, Plain, train_plainly
from tests.distributed.tiny_run import Gathering, dinov2, micro_batches, tiny_config, tiny_plan
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]

RANKS, STEPS, SAVED = 2, 4, 2
WHAT: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {"lora": {"rank": 3, "alpha": 6.0}},
    "lora+": {"lora": {"rank": 2, "norms": True, "patch_embed": True}},
    "last": {"optim": {"trained_blocks": 1}},
}
# What trains, the objective, stage and precision. DINO's steps are compared with plain torch.
MOVED = "lora+ dino 2 fp32"
PLAIN = ["lora dino 0 fp32", "lora+ dino 2 fp32", "last dino 1 fp32"]
JOBS = [*PLAIN, "lora dinov2 2 fp32", "lora dinov2 2 bf16"]


def _config(job: str, **changes: dict[str, Any]) -> RunConfig:
    what, objective, stage, precision = job.split(" ")
    sections: dict[str, dict[str, Any]] = {"model": {"layer_scale": 1.0}}
    if objective == "dinov2":
        sections = dinov2("sinkhorn_knopp", patch_head=True, **sections)
        sections |= {"koleo": {"loss_weight": 0.0}, "anchor": {"class_weight": 1.0}}
    sections["train"] = {"micro_batch_size": 1, "init_from": "given"}
    sections["engine"] = {"zero_stage": int(stage), "precision": precision}
    sections["optim"] = {"lr": 0.02, "warmup_epochs": 0}
    for name, values in (*WHAT[what].items(), *changes.items()):
        sections[name] = sections.get(name, {}) | values
    return tiny_config(**sections)


def _images(config: RunConfig) -> Tensor:
    size = config.crops.global_size
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def _given(config: RunConfig) -> Any:
    """Weights of backbone and heads without adapters."""
    from dinoscale.config.sections.lora import LoraConfig
    from dinoscale.engine.build import InitialWeights, build_networks

    plain = config.model_copy(update={"lora": LoraConfig()})
    network = build_networks(plain)[0]
    parts = (network.backbone, network.head, network.patch_head)
    return InitialWeights(*(None if part is None else part.state_dict() for part in parts))


def follow(root: str) -> dict[str, Any]:
    """On every rank: take the steps of each job, resume them, and count what the teacher holds."""
    found = {job: _follow(job, Path(root) / job) for job in JOBS}
    job = "lora dinov2 2 fp32"
    off = {"lora": {"rank": 0}, "anchor": {"class_weight": 0.0}}
    found["first"] = {
        "adapted": _first_loss(_config(job)),
        "whole": _first_loss(_config(job, **off)),
    }
    return found


def _first_loss(config: RunConfig) -> float:
    """Of weights that do not depend on whether there are adapters."""
    from dinoscale.engine.build import build_pair

    plan = tiny_plan(config)
    pair = build_pair(config, plan, _given(config))
    (loss,) = _steps(pair, config, plan, range(1), None)["losses"]
    pair[1].wait()
    pair[0].close()
    return loss


def _follow(job: str, run_dir: Path) -> dict[str, Any]:
    from dinoscale.engine.build import build_pair
    from tests.golden.test_trajectory import resume

    config = _config(job)
    plan = tiny_plan(config)
    pair = build_pair(config, plan)
    student, teacher = pair
    gather = Gathering(student)
    found: dict[str, Any] = {"start": _weights(pair), "bytes": teacher.num_bytes()}
    size = student.compute_dtype.itemsize
    own = sum(4 * n + size * n * RANKS for n in student.layout.shard_sizes)
    anchor = teacher.anchor.num_bytes() if teacher.anchor is not None else 0
    found["expected_bytes"] = own + anchor
    found["frozen"] = sorted(student.frozen.parameters)
    found |= _steps(pair, config, plan, range(STEPS), run_dir)
    found["end"] = _weights(pair)
    found["student"], found["teacher"] = gather(student.master), gather(teacher.ema)
    teacher.wait()
    network = teacher.plain_network()
    found["features"] = network.backbone.features(_images(config).to(student.compute_dtype)).float()
    shared = dict(network.named_parameters())
    for name, parameter in student.frozen.parameters.items():
        assert shared[name].data_ptr() == parameter.data_ptr(), name
        assert parameter.grad is None
    anew = build_pair(config, plan, values=False)
    resume(str(run_dir / str(SAVED)), *anew, step=SAVED)
    found["restored"] = _frozen(anew)
    found["resumed"] = _steps(anew, config, plan, range(SAVED, STEPS), None)["losses"]
    for each in (pair, anew):
        each[1].wait()
        each[0].close()
    return found


def _weights(pair: Any) -> dict[str, Tensor]:
    """The student's weights as the forward uses them."""
    return {n: p.detach().float().clone() for n, p in pair[0].network.named_parameters()}


def _frozen(pair: Any) -> dict[str, Tensor]:
    return {n: p.detach().float().clone() for n, p in pair[0].frozen.parameters.items()}


def _steps(
    pair: Any, config: RunConfig, plan: Any, steps: range, run_dir: Path | None
) -> dict[str, list[float]]:
    from dinoscale.engine.build import loss_weights_of, schedules_of
    from dinoscale.engine.step import train_step

    found: dict[str, list[float]] = {"losses": [], "norms": []}
    weights = loss_weights_of(config)
    for step in steps:
        batches = micro_batches(config, plan, step)
        now = schedules_of(config, plan).at(step)
        found["losses"].append(train_step(batches, *pair, now, loss_weights=weights).loss)
        found["norms"].append(float(pair[0].grad_norm()))
        if run_dir is not None and step + 1 in (SAVED, STEPS):
            _save(run_dir / str(step + 1), pair, config, plan, step=step + 1)
    return found


def _save(run_dir: Path, pair: Any, config: RunConfig, plan: Any, *, step: int) -> None:
    from dinoscale.checkpoint.retention import Keep
    from dinoscale.checkpoint.save import Saver
    from dinoscale.runtime import distributed

    about = {
        "config": config.model_dump(mode="json"),
        "plan": dataclasses.asdict(plan),
        "progress": {},
    }
    saver = Saver(run_dir, Keep(last=1))
    saver.begin(step, *pair, about)
    result = saver.wait()
    assert result is not None
    assert result.error is None
    distributed.gather_objects(None)


def move(root: str) -> dict[str, Any]:
    """On one rank at another stage: the rest of the steps of two ranks at stage 2."""
    from dinoscale.engine.build import build_pair
    from tests.golden.test_trajectory import resume

    config = _config(MOVED.replace("2", "0", 1))
    plan = tiny_plan(config)
    pair = build_pair(config, plan, values=False)
    resume(str(Path(root) / MOVED / str(SAVED)), *pair, step=SAVED)
    frozen, gather = _frozen(pair), Gathering(pair[0])
    found = _steps(pair, config, plan, range(SAVED, STEPS), None)
    whole = {"student": gather(pair[0].master), "teacher": gather(pair[1].ema)}
    without_norms = _config(MOVED, lora={"norms": False})
    other = build_pair(without_norms, tiny_plan(without_norms), values=False)
    with pytest.raises(CheckpointError) as refused:
        resume(str(Path(root) / MOVED / str(SAVED)), *other, step=SAVED)
    return {"frozen": frozen, **found, **whole, "refused": str(refused.value)}


def _trains(job: str, name: str) -> bool:
    if not name.startswith("backbone.") or name == "backbone.mask_token":
        return True
    more = ("norm" in name or "patch_embed" in name) and job.startswith("lora+")
    if job.startswith("lora"):
        return "lora_" in name or more
    return name.startswith(("backbone.blocks.1.", "backbone.norm."))


def _whole(found: dict[str, Any]) -> dict[str, Any]:
    """Weights of student and teacher, what does not train from the student's forward."""
    frozen = {name: found["start"][name] for name in found["frozen"]}
    return {which: found[which] | frozen for which in ("student", "teacher")}


@functools.cache
def _plain(job: str) -> Plain:
    return train_plainly(_config(job), steps=STEPS)


@pytest.mark.parametrize("job", PLAIN)
def test_the_steps_are_those_of_plain_torch(followed: dict[str, dict[str, Any]], job: str) -> None:
    found = followed[job]
    _plain(job).require(found | _whole(found))


@pytest.mark.parametrize("job", JOBS)
def test_what_trains_moves_and_the_rest_stays_to_the_bit(
    followed: dict[str, dict[str, Any]], job: str
) -> None:
    found = followed[job]
    start, end = found["start"], found["end"]
    assert set(found["frozen"]) == {name for name in start if not _trains(job, name)}
    averaged = {name for name, value in found["teacher"].items() if not value.isnan().any()}
    assert averaged == {name for name in start if _trains(job, name)}
    stayed = {name for name in start if torch.equal(start[name], end[name])}
    assert stayed == set(found["frozen"])
    _require_equal(found["restored"], {name: start[name] for name in found["frozen"]})


@pytest.mark.parametrize("job", JOBS)
def test_the_teacher_holds_only_what_trains_and_shares_the_rest(
    followed: dict[str, dict[str, Any]], job: str
) -> None:
    assert followed[job]["bytes"] == followed[job]["expected_bytes"]


def test_the_first_loss_is_that_of_the_network_without_adapters(
    followed: dict[str, dict[str, Any]],
) -> None:
    first = followed["first"]
    assert first["adapted"] == pytest.approx(first["whole"], rel=NUMBERS * EPS)


@pytest.mark.parametrize("job", JOBS)
def test_a_resume_changes_no_bit(followed: dict[str, dict[str, Any]], job: str) -> None:
    assert followed[job]["resumed"] == followed[job]["losses"][SAVED:]


def test_one_rank_at_another_stage_goes_on(root: Path, followed: dict[str, dict[str, Any]]) -> None:
    (moved,) = run_distributed(
        "tests.distributed.test_lora:move", world_size=1, timeout_s=120, root=str(root)
    )
    there = followed[MOVED]
    _require_equal(moved["frozen"], there["restored"])
    frozen = {name: there["start"][name] for name in there["frozen"]}
    run = moved | {which: moved[which] | frozen for which in ("student", "teacher")}
    _plain(MOVED).require(run, first=SAVED)
    assert "is of a run in which other tensors train" in moved["refused"]
    assert "keep lora.* and optim.trained_blocks" in moved["refused"]


def test_other_shard_files_hold_the_same(
    root: Path, followed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    from dinoscale.checkpoint.layout import START_FILE, directory
    from dinoscale.checkpoint.progress import read_measured, read_verdicts, write_measured
    from dinoscale.checkpoint.reshard import reshard
    from dinoscale.convert.run_checkpoint import read_run

    assert MOVED in followed  # it has been saved
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(root / MOVED / str(STEPS), run)
    verdicts = [_verdict("of other images"), _verdict("of these")]
    for verdict in verdicts:
        write_measured(directory(run, STEPS), 60.0, verdict)
    (run / START_FILE).write_bytes(b"neighbours")
    reshard(run, out, num_shards=3)
    here, there = (read_run(path, network="teacher") for path in (out, run))
    _require_equal(here.backbone, there.backbone)
    assert read_measured(directory(out, STEPS)) == 60.0
    assert read_verdicts(directory(out, STEPS)) == verdicts[::-1]
    assert (out / START_FILE).read_bytes() == b"neighbours"


def _verdict(images: str) -> Any:
    from dinoscale.checkpoint.progress import Guarded

    values = {"rankme": 5.0}
    return Guarded(images, "rankme", STEPS, values, 0, values, 0, values, "it fell", images)


@pytest.mark.parametrize("job", JOBS)
def test_the_exported_teacher_has_its_adapters_merged(
    root: Path, followed: dict[str, dict[str, Any]], job: str
) -> None:
    from dinoscale.convert.run_checkpoint import read_run
    from dinoscale.convert.weights_file import build
    from dinoscale.engine.build import build_networks

    weights = read_run(root / job / str(STEPS), network="teacher")
    assert not any("lora_" in name for name in weights.backbone)
    # Not as rounded for the forward.
    source = build_networks(_config(job))[0].state_dict()
    layers = {name.rpartition(".")[0] for name in source if "lora_" in name}
    stayed = [name for name in followed[job]["frozen"] if name.rpartition(".")[0] not in layers]
    found = {name: weights.backbone[name.removeprefix("backbone.")] for name in stayed}
    _require_equal(found, {name: source[name] for name in stayed})
    assert "backbone.cls_token" in found
    backbone, coverage = build(weights)
    assert coverage.complete
    features = backbone.features(_images(_config(job)))
    expected = followed[job]["features"]
    # In bf16 every operation of the run rounds, and those of the export do not.
    bound = 10 * torch.finfo(torch.bfloat16).eps if job.endswith("bf16") else 1e-6
    assert (features - expected).norm() <= bound * expected.norm()


def test_a_run_with_adapters_is_read_as_the_file_into_which_they_are_merged(
    root: Path, followed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    import dinoscale
    from dinoscale.convert.conversion import convert
    from dinoscale.evaluate.embedding.embed import EmbedOptions, embed
    from dinoscale.evaluate.frozen_backbone import ExtractionOptions
    from dinoscale.evaluate.label_free.rank import Samples, evaluate_rank

    run, file = root / MOVED / str(STEPS), tmp_path / "weights.safetensors"
    card = convert(run, file, to="dino")
    assert card["merged_adapters"]["max_difference"] <= 1e-6
    loaded = [dinoscale.load_backbone(path)[0] for path in (run, file)]
    _require_equal(*(model.state_dict() for model in loaded))
    expected = followed[MOVED]["features"]
    for model in loaded:
        tokens = model.forward_features(_images(_config(MOVED)))
        found = torch.cat([tokens.cls[:, None], tokens.patches], dim=1)
        assert (found - expected).norm() <= 1e-6 * expected.norm()
    spec = "synthetic:shapes?images=5&size=16"
    quietly: dict[str, Any] = {"num_workers": 0, "cache": False, "progress": False}
    scores = []
    for weights, out in ((run, tmp_path / "of_run"), (file, tmp_path / "of_file")):
        embed(weights, spec, out, EmbedOptions(**quietly))
        options = ExtractionOptions(**quietly)
        scores.append(evaluate_rank(weights, spec, samples=Samples(5, 5, 2), options=options))
    assert scores[0]["score"] == scores[1]["score"]
    arrays = [path.name for path in (tmp_path / "of_run").glob("*.npy")]
    assert len(arrays) == 2
    for name in arrays:
        here, there = (tmp_path / out / name for out in ("of_run", "of_file"))
        assert here.read_bytes() == there.read_bytes()


def _require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
