"""Non-finite numbers, errors on one rank, ranks that die: no rank hangs, and no weight changes."""

import signal
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from dinoscale.checkpoint.progress import Progress
from dinoscale.checkpoint.save import SaveResult
from dinoscale.config import dump_config
from dinoscale.runtime.launcher_env import Process
from dinoscale.runtime.watchdog import Watchdog
from tests.distributed.tiny_run import (
    BATCH,
    dinov2,
    micro_batches,
    take_step,
    tiny_config,
    tiny_plan,
)
from tests.forked import Forked, start_module
from tests.harness import RankFailedError, environment_of, run_distributed
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

RUNS = [  # stage 0 in float32 is below, stage 2 in it in faults/test_bad_steps.py
    {"stage": stage, "precision": precision, "accumulation": 1}
    for stage, precision in ((0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"))
]
RUNS.append({"stage": 2, "precision": "bf16", "accumulation": 3})
RUNS += [
    {"stage": stage, "precision": "fp32", "accumulation": 1, "batch_norm": True} for stage in (0, 3)
]
RUNS += [  # DINOv2's objective
    {"stage": 3, "precision": "fp32", "accumulation": 2, "targets": "sinkhorn_knopp"},
    {"stage": 2, "precision": "bf16", "accumulation": 1, "targets": "centering"},
    {"stage": 0, "precision": "fp32", "accumulation": 1, "targets": "sinkhorn_knopp"},
]
POISONS = {
    "gradient": "a gradient is not finite",
    "pixel": "the loss is not finite",
    "global pixel": "the loss is not finite",  # which the teacher sees, too
}


def poison_all(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On every rank: two good steps, those that rank 1 poisons, a good one; reasons and changes."""
    return [_poison(**run) for run in runs]


def _poison(
    stage: int,
    precision: str,
    accumulation: int,
    batch_norm: bool = False,
    targets: str | None = None,
) -> dict[str, Any]:
    from dinoscale.engine.build import build_pair, loss_weights_of, schedules_of
    from dinoscale.engine.step import train_step
    from dinoscale.runtime import distributed

    objective = dinov2(targets, patch_head=stage > 0) if targets else {}
    batch = 2 * BATCH if targets else BATCH  # KoLeo needs two images in a micro-batch
    config = tiny_config(
        **objective,
        head={"batch_norm": batch_norm},
        engine={"zero_stage": stage, "precision": precision},
        train={
            "epochs": 5,
            "batch_size": batch,
            "micro_batch_size": batch // 2 // accumulation,
        },
    )
    plan = tiny_plan(config)
    spared = build_pair(config, plan)
    for step in (0, 1, 3):
        take_step(*spared, config, plan, step)
    student, teacher = build_pair(config, plan)
    for step in range(2):
        take_step(student, teacher, config, plan, step)
    before, now = _state(student, teacher), schedules_of(config, plan).at(2)
    results: dict[str, Any] = {"num_tensors": len(before)}
    for poison in POISONS:
        batches, hook = micro_batches(config, plan, 2), None
        if distributed.rank() == 1 and poison != "gradient":
            value = torch.nan if precision == "fp32" else torch.inf
            crops = batches[0].local_crops if poison == "pixel" else batches[0].global_crops
            crops[1, 0, 2, 3, 3] = value
        if distributed.rank() == 1 and poison == "gradient":
            head = student.network.patch_head or student.network.head
            hook = head.last_layer.register_forward_hook(_poison_gradient)
        result = train_step(batches, student, teacher, now, loss_weights=loss_weights_of(config))
        if hook is not None:
            hook.remove()
        moved = _different(before, _state(student, teacher))
        numbers = [value for part in result.parts for value in part.values()]
        parts = bool(torch.tensor(numbers).isfinite().all())
        results[poison] = {"skipped": result.skipped, "moved": moved, "finite": parts}
    take_step(student, teacher, config, plan, 3)
    results["different_later"] = _different(_state(*spared), _state(student, teacher))
    return results


def _different(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


def _poison_gradient(_module: Any, _inputs: Any, logits: Tensor) -> None:
    if logits.requires_grad:
        logits.register_hook(lambda gradient: gradient * torch.nan)


def _state(student: Any, teacher: Any) -> dict[str, Tensor]:
    """Copies of everything a step changes, and of the weights that the forwards use."""
    kinds = {"master": student.master, "ema": teacher.ema, **student.optimizer_state()}
    state = {
        f"{kind} {fragment.name}": view.clone()
        for kind, views in kinds.items()
        for fragment, view in zip(student.layout.fragments, views, strict=True)
        if view is not None
    }
    state |= {name: center.clone() for name, center in teacher.centers().items()}
    for name in ("mean_target", "mean_patch_target"):
        if getattr(teacher, name) is not None:
            state[name] = getattr(teacher, name).clone()
    for name, parameter in teacher.plain_network().named_parameters():
        state[f"teacher {name}"] = parameter.detach().clone()
    held = {fragment.name: fragment.numel for fragment in student.layout.fragments}
    for name, parameter in student.network.named_parameters():
        shown = parameter.detach()
        if hasattr(parameter, "ds_tensor"):  # stage 3: this rank's part, without its padding
            shown = parameter.ds_tensor.detach()[: held.get(name, 0)]
        state[f"student {name}"] = shown.clone()
    state |= {f"student {k}": value.clone() for k, value in student.buffers().items()}
    state |= {f"teacher {k}": value.clone() for k, value in teacher.buffers().items()}
    state |= {f"steps {k}": torch.tensor(n) for k, n in student.optimizer_steps().items()}
    return state


@pytest.fixture(scope="module")
def poisoned() -> list[list[dict[str, Any]]]:
    """Of each rank, the results of `RUNS`."""
    function = "tests.distributed.test_failures:poison_all"
    return run_distributed(function, world_size=2, timeout_s=580, runs=RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("index", range(len(RUNS)), ids=lambda i: str(list(RUNS[i].values())))
def test_non_finite_step_of_one_rank_is_skipped_by_all_and_changes_nothing(
    poisoned: list[list[dict[str, Any]]], index: int, poison: str
) -> None:
    for of_rank in poisoned:
        result = of_rank[index][poison]
        assert result["skipped"] == POISONS[poison]
        assert result["moved"] == []
        assert of_rank[index]["num_tensors"] > 100
    poisoning_rank = poisoned[1][index][poison]
    assert poisoning_rank["finite"] == (poison == "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(RUNS)), ids=lambda i: str(list(RUNS[i].values())))
def test_skipped_steps_leave_no_trace_in_later_ones(
    poisoned: list[list[dict[str, Any]]], index: int
) -> None:
    for of_rank in poisoned:
        assert of_rank[index]["different_later"] == []


def fail_on_one(failing: int) -> list[tuple[str, str]]:
    """On every rank: type and text of the error if a check fails on `failing`, or on all."""
    from dinoscale.data.decoding.decode import BadSampleError
    from dinoscale.errors import DataError, PreemptedError
    from dinoscale.runtime import distributed

    rank = distributed.rank()

    def said(error: Exception, *, bad: bool) -> tuple[str, str]:
        def check() -> str:
            if bad:
                raise error
            return f"fine on {rank}"

        try:
            return "", distributed.together(check)
        except Exception as caught:
            return type(caught).__name__, str(caught)

    empty = DataError(f"no image in folder {rank}")
    kinds: list[Exception] = [empty, BadSampleError("a.jpg", "cut off"), OSError(28, "full")]
    return [
        said(empty, bad=False),
        said(empty, bad=True),
        *(said(error, bad=rank == failing) for error in kinds),
        said(PreemptedError("asked") if rank == failing else empty, bad=True),
    ]


class OneSidedSaver:
    """Two saves, the first of which failed on this rank."""

    def __init__(self, error: str | None) -> None:
        self.results, self.begun = [SaveResult(Path("run"), 7, error, 0.0, 0.0, 0)], 0

    def busy(self) -> bool:
        return False

    def wait_for_own_files(self, _heartbeat: object) -> None:
        pass

    def begin(self, step: int, *_: Any, **__: Any) -> None:
        self.begun += 1
        self.results.append(SaveResult(Path("run"), step, None, 0.0, 0.0, 0))

    def wait(self, _heartbeat: object = None) -> SaveResult | None:
        return self.results.pop() if self.results else None


def save_after_a_lost_contact(failing: int) -> int:
    """On every rank: end a run whose last save failed on `failing` only; count new saves."""
    from dinoscale.runtime import distributed
    from dinoscale.training.loop import Run

    run: Any = Run.__new__(Run)
    run.config, run.plan, run.versions = tiny_config(), tiny_plan(tiny_config()), {}
    run.progress, run.process = Progress(step=7), Process(1, 2, 1, 2)
    run.saved, run.saved_step, run.run_dir = None, 7, Path("run")
    run.images, run.student, run.watchdog, run.teacher = "", None, MagicMock(), MagicMock()
    run.licence = None
    error = "rank 0, where the ranks meet, cannot be reached"
    run.saver = OneSidedSaver(error if distributed.rank() == failing else None)
    run._save_and_wait()
    return int(run.saver.begun)


class NoRoom:
    """Rows for which there is no memory on this rank."""

    shape, device = (3, 2), torch.device("cpu")

    def new_empty(self, *_: Any, **__: Any) -> Tensor:
        raise MemoryError("no room for the rows")


def gather_without_memory(failing: int) -> str:
    from dinoscale.runtime import distributed

    rows: Any = NoRoom() if distributed.rank() == failing else torch.zeros(3, 2)
    try:
        distributed.gather_rows(rows)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def diverge_from_the_other_rank(failing: int) -> str:
    from dinoscale.runtime import distributed

    try:
        if distributed.rank() == failing:
            distributed.gather_objects((3, 2))
        else:
            distributed.together(lambda: None)
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition(" where ")[0]
    return ""


class NoCopy(torch.nn.Module):
    """A network for whose copy there is no memory."""

    def __deepcopy__(self, _memo: object) -> "NoCopy":
        raise torch.OutOfMemoryError("no room for it")


def knn_that_fails(failing: int) -> tuple[bool, list[str]]:
    """On every rank: one runs out of memory in k-NN, one was asked to stop; whether all stop.

    Then the backbone of stage 3 does not fit, either; and what is said of both. An error of one
    rank while all gather it is none that they share, and ends the run.
    """
    from dinoscale.engine.frozen.weights import Partitioned
    from dinoscale.engine.teacher import Teacher
    from dinoscale.errors import OutOfStepError, PreemptedError
    from dinoscale.runtime import distributed
    from dinoscale.training.hooks.measuring import Measuring

    amiss = distributed.rank() == failing

    def measure(*_: Any) -> float:
        raise torch.OutOfMemoryError("no room") if amiss else PreemptedError("asked to stop")

    events, stop = MagicMock(), MagicMock(asked=not amiss)
    measuring = Measuring(Process(1, 2, 1, 2), MagicMock(), stop, events)
    assert measuring.attempt("k-NN", measure, MagicMock(), 7) is None
    weights: Any = Partitioned.__new__(Partitioned)
    backbone = NoCopy() if amiss else torch.nn.Linear(2, 2)
    weights._skeleton = weights.network = SimpleNamespace(head=NoCopy(), backbone=backbone)
    teacher: Any = Teacher.__new__(Teacher)
    teacher._weights = weights
    assert measuring.attempt("k-NN", measure, teacher, 8) is None
    weights._skeleton = SimpleNamespace(backbone=torch.nn.Linear(3, 3))
    weights.network = SimpleNamespace(backbone=torch.nn.Linear(2, 2))
    with pytest.raises(OutOfStepError, match="cannot gather"):
        measuring.attempt("k-NN", measure, teacher, 9)
    return measuring.asked_to_stop, [each.kwargs["reason"] for each in events.write.mock_calls]


def fail_in_all_ways(failing: int) -> dict[str, Any]:
    return {
        "checks": fail_on_one(failing),
        "begun": save_after_a_lost_contact(failing),
        "gather": gather_without_memory(failing),
        "elsewhere": diverge_from_the_other_rank(failing),
        "knn": knn_that_fails(failing),
    }


def test_error_on_one_rank_is_raised_on_all_and_a_save_repeated_by_all() -> None:
    function = "tests.distributed.test_failures:fail_in_all_ways"
    of_rank = run_distributed(function, world_size=2, timeout_s=120, failing=1)
    first, second = (told["checks"] for told in of_rank)
    said = "MemoryError: no room for the rows"
    assert [told["gather"] for told in of_rank] == [f"RunFailedError: rank 1: {said}", said]
    elsewhere = "RunFailedError: ranks are out of step: rank 1 sent tuple"
    assert [told["elsewhere"] for told in of_rank] == [elsewhere, ""]
    assert [told["knn"] for told in of_rank] == [
        (True, ["asked to stop", "rank 1: OutOfMemoryError: no room for it"]),
        (True, ["rank 0: asked to stop", "no room for it"]),
    ]
    begun = tuple(told["begun"] for told in of_rank)
    assert begun == (1, 1)
    assert first == [
        ("", "fine on 0"),
        ("DataError", "no image in folder 0"),
        ("DataError", "rank 1: no image in folder 1"),
        ("DataError", "rank 1: a.jpg: cut off"),
        ("RunFailedError", "rank 1: OSError: [Errno 28] full"),
        ("DataError", "no image in folder 0"),
    ]
    assert second == [
        ("", "fine on 1"),
        ("DataError", "no image in folder 1"),
        ("DataError", "no image in folder 1"),
        ("BadSampleError", "a.jpg: cut off"),
        ("OSError", "[Errno 28] full"),
        ("DataError", "rank 0: no image in folder 0"),
    ]


def fail_beside_a_rank_that_waits(failing: int) -> None:
    """One rank fails; as in NCCL no socket closes, so the other hangs in a collective."""
    from dinoscale.runtime import distributed

    watchdog = Watchdog(timeout_s=600, hosts=["a", "b"], launched=False, ask_to_stop=print)
    with suppress(ValueError), watchdog.sharing_failure():
        if distributed.rank() == failing:
            raise ValueError("no room")
        time.sleep(100)
    time.sleep(100)  # so that its end tells the other nothing either


def test_reason_of_a_rank_that_failed_ends_the_others_at_once() -> None:
    said = "error: rank 1 (b) ends with the others: rank 0 (a) ended: ValueError: no room"
    function = "tests.distributed.test_failures:fail_beside_a_rank_that_waits"
    with pytest.raises(RankFailedError, match="rank 1: exit 1") as failed:
        run_distributed(function, world_size=2, timeout_s=90, failing=0)
    assert said in str(failed.value)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_death_of_a_rank_ends_the_others_with_a_sentence(tmp_path: Path, stage: int) -> None:
    config = tiny_config(
        run_dir=str(tmp_path / "run"),
        train={"epochs": 10_000, "batch_size": 6, "micro_batch_size": 3},
        data={"train": "synthetic:shapes?images=24&size=16", "num_workers": 0},
        engine={"zero_stage": stage, "precision": "bf16"},
        checkpoint={"every_epochs": 10_000},
    )
    (tmp_path / "run.yaml").write_text(dump_config(config))
    port = free_port()
    ranks = [_start_rank(tmp_path, rank, port) for rank in range(2)]
    try:
        _wait_for_steps(tmp_path / "run" / "metrics.jsonl", 2, ranks)
        ranks[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        assert ranks[0].wait(timeout=200) == 1  # the watchdog would wait for half an hour
        assert time.monotonic() - killed < 100  # a second or two where nothing else runs
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    said = (tmp_path / "output_0.txt").read_text()
    assert "error: rank 0 lost contact with another rank" in said
    assert "Traceback" not in said


def _start_rank(folder: Path, rank: int, port: int) -> Forked:
    return start_module(
        *("dinoscale", "train", folder / "run.yaml"),
        environment=environment_of(rank, world_size=2, port=port),
        output=folder / f"output_{rank}.txt",
    )


def _wait_for_steps(path: Path, steps: int, ranks: list[Forked]) -> None:
    end = time.monotonic() + 240
    while not (path.exists() and len(path.read_text().splitlines()) >= steps):
        assert all(process.poll() is None for process in ranks), "a rank ended by itself"
        assert time.monotonic() < end, "training did not begin"
        time.sleep(0.1)


def _open_own(folder: str) -> list[str]:
    """The rank's own folder; the error that every rank gets."""
    from dinoscale.data.sources.source import open_source
    from dinoscale.errors import DataError
    from dinoscale.runtime import distributed
    from dinoscale.training.trainer import require_same_images

    try:
        require_same_images(open_source(f"{folder}/{distributed.rank()}"))
    except DataError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("a.png", "b.png"), []),
        (("a.png",), ["data.train: rank 0 found 2 images and rank 1 1."]),
        (("a.png", "c.png"), ["data.train: rank 0 found 2 images and rank 1 2 different ones."]),
    ],
)
def test_ranks_that_found_other_images_do_not_begin(
    tmp_path: Path, names: tuple[str, ...], says: list[str]
) -> None:
    for rank, files in enumerate((("a.png", "b.png"), names)):
        (tmp_path / str(rank)).mkdir()
        for name in files:
            (tmp_path / str(rank) / name).write_bytes(b"")
    told = run_distributed(
        f"{__name__}:_open_own", world_size=2, timeout_s=180, folder=str(tmp_path)
    )
    assert [[text.partition(" Train on")[0] for text in texts] for texts in told] == [says, says]
