"""Recorded runs of DINOv2 followed by the step of this package, at every ZeRO stage, in float32.

The bounds are those of the recording's notes: the reference's own float32 is within 2e-6 of the
losses and 1.1e-5 of the final tensors, and a single mistake, such as decay on biases, moves tensors
by more than 6e-4.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoscale.config.resolve import RunPlan, resolve
from tests.golden23.compare import Bounds, Record, parts_of, renamed, require
from tests.golden23.recorded import CASES, CENTERS, RANKS, RecordedRun, recorded_run
from tests.golden23.replay import replay
from tests.harness import run_distributed

STAGES = (0, 1, 2, 3)
FLOAT32 = Bounds(losses=1e-5, norms=1e-4, tensors=1e-4)
WITHOUT_KOLEO = {"koleo": {"loss_weight": 0.0}}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_schedules_are_the_recorded_ones(case: str, ranks: int) -> None:
    from dinoscale.engine.build import schedules_of

    run = recorded_run(case, ranks)
    config = run.config()
    schedules = schedules_of(config, plan_of(run, config, ranks))
    for step, recorded in enumerate(run.steps):
        now = schedules.at(step)
        found = {
            "lr": now.lr,
            "last_layer_lr": 0.0 if now.prototypes_frozen else now.lr,
            "weight_decay": now.weight_decay,
            "teacher_momentum": now.momentum,
            "teacher_temp": now.teacher_temp,
        }
        assert found == pytest.approx({key: recorded[key] for key in found}, rel=1e-12, abs=1e-15)


@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_every_stage_follows_the_recorded_run(case: str, ranks: int, stage: int) -> None:
    run = recorded_run(case, ranks)
    found = followed(ranks)[_key(case, ranks, stage=stage)]
    require(found, renamed(run.record()), FLOAT32, label=f"{run.name} at stage {stage}")


@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_change_nothing_without_koleo(
    case: str, world_size: int, accumulation: int
) -> None:
    expected = replay_without_koleo(case, world_size)
    key = _key(case, 1, stage=2, accumulation=accumulation, changes=WITHOUT_KOLEO)
    label = f"{case} without KoLeo, {world_size} ranks x {accumulation} micro-batches"
    require(followed(world_size)[key], renamed(expected), FLOAT32, label=label)


def test_without_koleo_ranks_change_nothing_in_sinkhorn_knopp() -> None:
    one, two = (replay_without_koleo("B", ranks) for ranks in RANKS)
    require(two, one, Bounds(losses=1e-9, norms=1e-9, tensors=1e-9), label="B on 2 ranks")


def test_without_koleo_ranks_change_only_the_center_of_patches() -> None:
    one, two = (replay_without_koleo("A", ranks) for ranks in RANKS)
    for kind in ("losses", "parts", "grad"):  # the first step does not know a center yet
        assert two[kind][0] == pytest.approx(one[kind][0], rel=1e-9)
    assert two["centers"][0]["dino"] == pytest.approx(one["centers"][0]["dino"], rel=1e-9)
    moved = {
        "center of patches after the first step": two["centers"][0]["ibot"]
        / one["centers"][0]["ibot"],
        **{
            f"last {name}": loss / one["losses"][-1][name]
            for name, loss in two["losses"][-1].items()
        },
    }
    print({name: f"{ratio - 1:.1e}" for name, ratio in moved.items()})


@functools.cache
def replay_without_koleo(case: str, ranks: int) -> Record:
    """The run that was recorded on one rank, on this many and without KoLeo, in float64."""
    return replay(recorded_run(case, 1), ranks=ranks, changes=WITHOUT_KOLEO)


@functools.cache
def followed(world_size: int) -> dict[str, Record]:
    """All runs that the ranks take, by `_key`; one start for all."""
    keys = [_key(case, world_size, stage=stage) for case in CASES for stage in STAGES]
    keys += [
        _key(case, 1, stage=2, accumulation=accumulation, changes=WITHOUT_KOLEO)
        for case in CASES
        for accumulation in (1, 2)
    ]
    per_rank = run_distributed(
        "tests.golden23.test_runs:follow_all", world_size=world_size, timeout_s=580, keys=keys
    )
    return {
        key: _joined([rank[index] for rank in per_rank], json.loads(key))
        for index, key in enumerate(keys)
    }


def _key(
    case: str,
    ranks: int,
    *,
    stage: int,
    accumulation: int = 1,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Which run: that recorded on so many ranks, and how it is followed."""
    return json.dumps(
        {
            "case": case,
            "ranks": ranks,
            "stage": stage,
            "accumulation": accumulation,
            "changes": changes or {},
        }
    )


def follow_all(keys: list[str]) -> list[dict[str, Any]]:
    """On every rank: follow the runs one after the other."""
    return [_Follower(**json.loads(key)).follow() for key in keys]


def plan_of(run: RecordedRun, config: Any, world_size: int) -> RunPlan:
    """The plan on so many ranks."""
    train = run.facts["config"]["train"]
    images = run.facts["batch_size"] * train["OFFICIAL_EPOCH_LENGTH"]
    return resolve(config, world_size=world_size, num_images=images)


class _Follower:
    """Takes the steps of a recorded run with DeepSpeed, and notes what this rank sees of them."""

    def __init__(
        self, *, case: str, ranks: int, stage: int, accumulation: int, changes: dict[str, Any]
    ) -> None:

        from dinoscale.engine.build import build_pair, schedules_of
        from dinoscale.runtime import distributed

        self.run, self.rank = recorded_run(case, ranks), distributed.rank()
        self.config = self.run.config(
            stage=stage,
            world_size=distributed.world_size(),
            accumulation=accumulation,
            changes=changes,
        )
        self.plan = plan_of(self.run, self.config, distributed.world_size())
        self.schedules = schedules_of(self.config, self.plan)
        self.student, self.teacher = build_pair(self.config, self.plan)
        initial = renamed_tensors(self.run.initial)
        assert initial.keys() == self.student.shapes.keys()

        def read(name: str, start: int, count: int) -> Tensor:
            return initial[name].flatten()[start : start + count]

        self.student.restore_master(read)
        self.teacher.restore(read)  # centers start at zero

    def follow(self) -> dict[str, Any]:
        from dinoscale.engine.build import loss_weights_of
        from dinoscale.engine.step import train_step

        record: dict[str, Any] = {
            kind: [] for kind in ("losses", "grad", "student", "teacher", "centers")
        }
        for step in range(len(self.run.steps)):
            result = train_step(
                self._micro_batches(step),
                self.student,
                self.teacher,
                self.schedules.at(step),
                loss_weights=loss_weights_of(self.config),
            )
            record["losses"].append(self._as_logged(result.terms))
            record["grad"].append(self.student.grad_norms())
            record["student"].append(self._squares(self.student.master))
            record["teacher"].append(self._squares(self.teacher.ema))
            centers = self._centers()
            record["centers"].append({kind: float(c.norm()) for kind, c in centers.items()})
        record["last_centers"] = centers
        record["pieces"] = [
            {"name": f.name, "start": f.start, "student": s.clone(), "teacher": t.clone()}
            for f, s, t in zip(
                self.student.layout.fragments, self.student.master, self.teacher.ema, strict=True
            )
        ]
        self.teacher.wait()
        self.student.close()
        return record

    def _micro_batches(self, step: int) -> list[Any]:
        """This rank's images, in order; each rank has neighbours, as in the recording."""
        from dinoscale.engine.micro_batch import MicroBatch

        crops, masks = self.run.crops(step), self.run.masks(step)
        size, batches = self.plan.micro_batch_size, []
        for micro in range(self.plan.accumulation_steps):
            first = self.rank * self.plan.images_per_rank + micro * size
            part = slice(first, first + size)
            batches.append(
                MicroBatch(*(views[:, part] for views in crops), None, _masks(masks[:, part]))
            )
        return batches

    def _as_logged(self, terms: dict[str, float]) -> dict[str, float]:
        """Our means as the reference logs them, see README.md."""
        koleo = self.config.koleo.loss_weight * terms.get("koleo_loss", 0.0)
        return {
            "dino_local_crops_loss": terms["dino_loss"] - terms["dino_global_loss"],
            "dino_global_crops_loss": terms["dino_global_loss"],
            "koleo_loss": koleo / 2,
            "ibot_loss": terms["ibot_loss"] / 2,
        }

    def _centers(self) -> dict[str, Tensor]:
        if self.config.dino.targets == "sinkhorn_knopp":
            return {}  # of this step only
        centers = self.teacher.center, self.teacher.patch_center
        return {kind: center.clone() for kind, center in zip(CENTERS, centers, strict=True)}

    def _squares(self, parts: list[Tensor]) -> dict[str, float]:
        """Of each tensor, the squares in this rank's fragment, added."""
        names = [fragment.name for fragment in self.student.layout.fragments]
        sums = dict.fromkeys(names, 0.0)
        for name, part in zip(names, parts, strict=True):
            sums[name] += float(part.double().square().sum())
        return sums


def renamed_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With our names."""
    from tests.golden23.compare import our_name

    return {our_name(name): value for name, value in tensors.items()}


def _masks(masks: Tensor) -> Any:
    """Of a micro-batch, from (2, B, P) bool."""
    from dinoscale.data.augmentation.masks import Masks

    flat = masks.flatten(0, 1)
    counts = flat.sum(1, keepdim=True).expand_as(flat)
    return Masks(flat, flat.flatten().nonzero().flatten(), 1 / counts[flat].float())


def _joined(of_ranks: list[dict[str, Any]], key: dict[str, Any]) -> Record:
    """The record of a run from those of its ranks."""
    first, steps = of_ranks[0], range(len(of_ranks[0]["losses"]))
    record: Record = {kind: first[kind] for kind in ("losses", "grad", "centers")}
    record["parts"] = [parts_of(norms) for norms in first["grad"]]
    for which in ("student", "teacher"):
        record[which] = [_norms([rank[which][step] for rank in of_ranks]) for step in steps]
    initial = renamed_tensors(recorded_run(key["case"], key["ranks"]).initial)
    record["last"] = {"centers": first["last_centers"]}
    for which in ("student", "teacher"):
        whole = {name: torch.full_like(value, torch.nan) for name, value in initial.items()}
        for rank in of_ranks:
            for piece in rank["pieces"]:
                values = piece[which]
                flat = whole[piece["name"]].view(-1)
                flat[piece["start"] : piece["start"] + len(values)] = values
        record["last"][which] = whole
    return record


def _norms(squares: list[dict[str, float]]) -> dict[str, float]:
    names = {name for of_rank in squares for name in of_rank}
    return {name: sum(of_rank.get(name, 0.0) for of_rank in squares) ** 0.5 for name in names}
