"""A recorded run followed by the step of this package, on ranks under DeepSpeed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dinoscale.config import RunConfig
from dinoscale.config.resolve import RunPlan, resolve
from tests.golden.test_trajectory import resume, save
from tests.golden23.compare import Record, parts_of
from tests.golden23.distillation import GENERATION, distillation_run
from tests.golden23.recorded import CENTERS, RecordedRun, recorded_run
from tests.golden23.reference_names import our_tensors
from tests.harness import run_distributed

WITHOUT_KOLEO = {"koleo": {"loss_weight": 0.0}}


@dataclasses.dataclass(frozen=True)
class Way:
    """Which run is followed, and how.

    Attributes:
        case: of the recorded run.
        recorded_ranks: of the recorded run.
        stage: of ZeRO.
        accumulation: micro-batches of a step and rank.
        koleo: false leaves its loss out.
        steps: the first one, and the one after the last; None for all.
        generation: of the recorded run.
        run_dir: the checkpoint from which `steps` go on, and where one is saved after them.
    """

    case: str
    recorded_ranks: int
    stage: int
    accumulation: int = 1
    koleo: bool = True
    steps: tuple[int, int] | None = None
    run_dir: str | None = None
    generation: str = "dinov2"

    @property
    def run(self) -> RecordedRun:
        """The recorded run."""
        if self.generation == GENERATION:
            return distillation_run(self.recorded_ranks)
        return recorded_run(self.case, self.recorded_ranks, self.generation)

    @property
    def changes(self) -> Mapping[str, Mapping[str, Any]]:
        """Settings that are not the recorded ones."""
        return {} if self.koleo else WITHOUT_KOLEO


def follow(ways: Sequence[Way], *, world_size: int) -> dict[Way, Record]:
    """What the ranks find; they take one way after the other, from one start."""
    per_rank = run_distributed(
        "tests.golden23.follow:follow_all",
        world_size=world_size,
        timeout_s=580,
        ways=[dataclasses.asdict(way) for way in ways],
    )
    return {way: joined([rank[i] for rank in per_rank], way) for i, way in enumerate(ways)}


def follow_all(ways: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On every rank: what it finds on each way."""
    return [Follower(Way(**way)).follow() for way in ways]


def plan_of(run: RecordedRun, config: RunConfig, world_size: int) -> RunPlan:
    """The plan of a recorded run on so many ranks."""
    images = run.facts["batch_size"] * run.facts["config"]["train"]["OFFICIAL_EPOCH_LENGTH"]
    return resolve(config, world_size=world_size, num_images=images)


class Follower:
    """Takes the steps, and notes what this rank sees of them."""

    def __init__(self, way: Way) -> None:
        from dinoscale.engine.build import build_pair, schedules_of
        from dinoscale.runtime import distributed

        world_size, self._rank = distributed.world_size(), distributed.rank()
        self._run = way.run
        self._config = self._run.config(
            stage=way.stage,
            world_size=world_size,
            accumulation=way.accumulation,
            changes=way.changes,
        )
        self._plan = plan_of(self._run, self._config, world_size)
        self._schedules = schedules_of(self._config, self._plan)
        self._student, self._teacher = build_pair(self._config, self._plan)
        initial = _initial(way)
        assert initial.keys() == self._student.shapes.keys()

        def read(name: str, start: int, count: int) -> Tensor:
            return initial[name].flatten()[start : start + count]

        self._student.restore_master(read)
        self._teacher.restore(read)  # centers start at zero
        if way.run.gram:
            assert self._teacher.gram is not None
            self._teacher.gram.load(our_tensors(way.run.gram, "backbone."))
        if way.run.frozen:
            assert self._teacher.frozen is not None
            self._teacher.frozen.load(our_tensors(way.run.frozen), identity=None)
        self._steps, self._run_dir = range(*(way.steps or (0, len(self._run.steps)))), way.run_dir
        if way.run_dir is not None:
            resume(way.run_dir, self._student, self._teacher, step=self._steps.start)

    def follow(self) -> dict[str, Any]:
        """Take the steps."""
        from dinoscale.engine.build import loss_weights_of
        from dinoscale.engine.step import train_step

        student, teacher = self._student, self._teacher
        kinds = ("losses", "grad", "student", "teacher", "centers")
        found: dict[str, Any] = {kind: [] for kind in kinds}
        for step in self._steps:
            result = train_step(
                self._micro_batches(step),
                student,
                teacher,
                self._schedules.at(step),
                loss_weights=loss_weights_of(self._config),
            )
            found["losses"].append(self._as_logged(result.terms))
            found["grad"].append(student.grad_norms())
            found["student"].append(self._squares(student.master))
            found["teacher"].append(self._squares(teacher.ema))
            found["centers"].append({k: float(c.norm()) for k, c in self._centers().items()})
        found["last_centers"] = {kind: c.clone() for kind, c in self._centers().items()}
        fragments = zip(student.layout.fragments, student.master, teacher.ema, strict=True)
        found["pieces"] = [
            {"name": f.name, "start": f.start, "student": mine.clone(), "teacher": average.clone()}
            for f, mine, average in fragments
        ]
        if self._run_dir is not None:
            save(self._run_dir, student, teacher, step=self._steps.stop)
        teacher.wait()
        student.close()
        return found

    def _micro_batches(self, step: int) -> list[Any]:
        """This rank's images, in order; a rank has neighbours, as in the recording."""
        from dinoscale.engine.micro_batch import MicroBatch

        crops, masks = self._run.crops(step), self._run.masks(step)
        gram_crops = self._run.gram_crops(step)
        size, batches = self._plan.micro_batch_size, []
        for micro in range(self._plan.accumulation_steps):
            first = self._rank * self._plan.images_per_rank + micro * size
            part = slice(first, first + size)
            drawn = _masks(masks[:, part])
            drawn = drawn.seen() if self._run.frozen else drawn
            batch = MicroBatch(*(views[:, part] for views in crops), None, drawn)
            if gram_crops is not None:
                batch = dataclasses.replace(batch, gram_crops=gram_crops[:, part])
            batches.append(batch)
        return batches

    def _as_logged(self, terms: dict[str, float]) -> dict[str, float]:
        """Our means as the reference logs them.

        DINOv2: KoLeo weighted, and halves of the last two. DINOv3: means over pairs and views.
        """
        if self._run.generation == "dinov3":
            crops = self._config.crops.num_local
            pairs = 2 + 2 * crops
            local = terms["dino_loss"] - terms["dino_global_loss"]
            return {
                "dino_local_crops_loss": local * pairs / (2 * crops),
                "dino_global_crops_loss": terms["dino_global_loss"] * pairs / 2,
                "koleo_loss": terms["koleo_loss"] / 2,
                "ibot_loss": terms["ibot_loss"],
                **({"gram_loss": terms["gram_loss"]} if self._run.gram else {}),
            }
        koleo = self._config.koleo.loss_weight * terms.get("koleo_loss", 0.0)
        return {
            "dino_local_crops_loss": terms["dino_loss"] - terms["dino_global_loss"],
            "dino_global_crops_loss": terms["dino_global_loss"],
            "koleo_loss": koleo / 2,
            "ibot_loss": terms["ibot_loss"] / 2,
        }

    def _centers(self) -> dict[str, Tensor]:
        if self._config.dino.targets == "sinkhorn_knopp":
            return {}  # of this step only
        patch_center = self._teacher.patch_center
        assert patch_center is not None
        return dict(zip(CENTERS, (self._teacher.center, patch_center), strict=True))

    def _squares(self, parts: list[Tensor]) -> dict[str, float]:
        """Of each tensor, the squares in this rank's fragment, added."""
        fragments = self._student.layout.fragments
        return {
            fragment.name: float(part.double().square().sum())
            for fragment, part in zip(fragments, parts, strict=True)
        }


def _masks(masks: Tensor) -> Any:
    """Of a micro-batch, from (2, B, P) bool."""
    from dinoscale.data.augmentation.masks import Masks

    flat = masks.flatten(0, 1)
    counts = flat.sum(1, keepdim=True).expand_as(flat)
    rows = flat.flatten().nonzero().flatten()
    return Masks(flat, rows, 1 / counts[flat].float(), chosen=flat.any(1))


def _initial(way: Way) -> dict[str, Tensor]:
    return our_tensors(way.run.initial)


def joined(of_ranks: list[dict[str, Any]], way: Way) -> Record:
    """The record of a run from what its ranks found."""
    first = of_ranks[0]
    record: Record = {kind: first[kind] for kind in ("losses", "grad", "centers")}
    record["parts"] = [parts_of(norms) for norms in first["grad"]]
    record["last"] = {"centers": first["last_centers"]}
    for which in ("student", "teacher"):
        record[which] = [
            _norms(squares) for squares in zip(*(rank[which] for rank in of_ranks), strict=True)
        ]
        whole = {name: torch.full_like(value, torch.nan) for name, value in _initial(way).items()}
        for piece in (piece for rank in of_ranks for piece in rank["pieces"]):
            values, start = piece[which], piece["start"]
            whole[piece["name"]].view(-1)[start : start + len(values)] = values
        record["last"][which] = whole
    return record


def _norms(squares: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each tensor, from the squares on each rank."""
    names = {name for of_rank in squares for name in of_rank}
    return {name: sum(of_rank.get(name, 0.0) for of_rank in squares) ** 0.5 for name in names}
