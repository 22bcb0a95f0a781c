"""What `tests.gpu.check` runs: `python -m tests.gpu.measures NAME`, JSON last.

The function of that name returns what to print and whether it is right; else the exit code is 1.
Those that begin with `on_ranks_` run in a started process group, by `tests.harness`.
"""

import gc
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from tests.distributed.tiny_run import tiny_config, tiny_plan
from tests.harness import RankFailedError, run_distributed

Shown = tuple[dict[str, Any], bool]

STEPS = 20
LATE_CYCLES = 50_000_000  # of a GPU, some 30 ms: longer than a step of the tiny run
MOST_ERROR = 0.15  # of predicted memory, as promised in tests/benchmarks/README.md
CAREFUL = 0.85  # of a GPU's memory: what a size may need that `auto` passes over
SYNTHETIC = "synthetic:shapes?images=256&size=256"


def stage_3_twice() -> Shown:
    """Digests of the average: twice, and with the teacher's weights published late."""
    return _averages(ranks=2, late=(False, False, True))


def alone_twice() -> Shown:
    """Digests of the average of one rank, for which DeepSpeed gathers nothing."""
    return _averages(ranks=1, late=(False, False))


def _averages(*, ranks: int, late: tuple[bool, ...]) -> Shown:
    digests = [_on_ranks("on_ranks_average", ranks=ranks, late=each) for each in late]
    return {"ranks": ranks, "digests": digests}, len({str(digest) for digest in digests}) == 1


def on_ranks_average(*, late: bool) -> str:
    """Digest of this rank's part of the average after some steps at stage 3."""
    from dinoscale.engine.build import build_pair

    # Local crops have other position embeddings, whose gradient CUDA adds up in any order.
    config = tiny_config(
        crops={"global_size": 16, "local_size": 16, "num_local": 2},
        engine={"zero_stage": 3, "precision": "bf16", "compile": False},
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    plan = tiny_plan(config)
    student, teacher = build_pair(config, plan)
    assert not student._engine.zero_overlap_comm()  # its stream does not wait for what was written
    if late:
        weights = teacher._weights
        publish = weights.publish

        def publish_late(ema: Any) -> None:
            torch.cuda._sleep(LATE_CYCLES)
            publish(ema)

        weights.publish = publish_late  # type: ignore[method-assign] # on this one only
    for step in range(STEPS):
        _take(student, teacher, config, plan, step)
    digest = hashlib.sha256()
    for part in teacher.ema:
        digest.update(part.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _take(student: Any, teacher: Any, config: Any, plan: Any, step: int) -> None:
    """`take_step` with its batch on the device."""
    from dinoscale.engine.build import loss_weights_of, schedules_of
    from dinoscale.engine.gradients import compute_device
    from dinoscale.engine.step import train_step
    from tests.distributed.tiny_run import micro_batches, on_device

    device = compute_device()
    batches = (  # each when it is asked for, as in a run
        on_device(batch, device) for batch in micro_batches(config, plan, step)
    )
    now = schedules_of(config, plan).at(step)
    train_step(batches, student, teacher, now, loss_weights=loss_weights_of(config))


def host_waits() -> Shown:
    """Who reads from the device within a step, by run; torch itself raises where a step waits."""
    from tests.distributed.test_host_waits import CONSTANT, RUNS

    (found, *_) = run_distributed(
        "tests.distributed.test_host_waits:watch_steps",
        world_size=_ranks(),
        timeout_s=80,
        runs=RUNS,
    )
    right = all(callers == CONSTANT[run["stage"]] for run, callers in zip(RUNS, found, strict=True))
    return {"callers": found}, right


def input_waits() -> Shown:
    """Whether moving, colouring, masks and stochastic depth of a step wait for the device."""
    return {"prepared": _on_ranks("on_ranks_prepare")}, True


def on_ranks_prepare() -> int:
    """Prepare steps of a run; torch raises where the third waits. Returns their micro-batches."""
    from dinoscale.planning.bench.our_step import RandomPictures
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.feed import Feed

    config = tiny_config(
        model={"drop_path_rate": 0.1},
        crops={"global_size": 96, "local_size": 48, "num_local": 4},
        ibot={"loss_weight": 1.0, "mask_group": 1},
    )
    plan, process = tiny_plan(config), read_process(os.environ)
    feed = Feed(config, plan, process, RandomPictures(64, config.data.channels), depth=2)
    count = 0
    for step, batches in enumerate(feed.steps(0, offset=0)):
        if step == 2 and torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
        count += len(list(feed.prepare(step, batches)))
        if step == 3:
            break
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
    return count


def bench_data() -> Shown:
    """`dinoscale bench data`: the transfer is among its rates."""
    result = _dinoscale("bench", "data", "vit_s16", f"data.train={SYNTHETIC}", "--seconds", "1")
    return result, all(rate and rate > 0 for rate in result["images_per_s"].values())


def bench_step(*arguments: str) -> Shown:
    """`dinoscale bench step`: the literal reference is beside it."""
    result = _dinoscale("bench", "step", *arguments)
    return result, result["ratio"] is not None and not result["changed"]


def plan_memory() -> Shown:
    """The allocator's peak in a step of ViT-S/16 at each stage, and what `plan` says of it."""
    rows = _on_ranks("on_ranks_peaks", stages=list(range(4)))
    return {"stages": rows}, all(abs(row["error"]) <= MOST_ERROR for row in rows)


def on_ranks_peaks(*, stages: list[int]) -> list[dict[str, Any]]:
    """Bytes at the peak of a step beyond those before the run, predicted and measured."""
    return [_peak(stage) for stage in stages]


def _peak(stage: int) -> dict[str, Any]:
    from dinoscale.config import resolve
    from dinoscale.engine.build import build_pair
    from dinoscale.engine.model_sizes import dims_of
    from dinoscale.planning.plan.memory_model import peak
    from dinoscale.planning.plan.partition import setup_of

    config, ranks = _vit_s16(f"engine.zero_stage={stage}"), torch.distributed.get_world_size()
    plan = resolve(config, world_size=ranks, num_images=config.train.batch_size * 4)
    gc.collect()  # what was closed is gone, engines and their hooks hold each other
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    student, teacher = build_pair(config, plan)
    for step in range(3):
        torch.cuda.reset_peak_memory_stats()
        _take(student, teacher, config, plan, step)
        torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - before
    reserved = torch.cuda.max_memory_reserved()
    student.close()
    told = peak(dims_of(config), setup_of(config, plan, on_gpu=True))
    return {
        "stage": stage,
        "predicted_bytes": told.total,
        "measured_bytes": measured,
        "reserved_bytes": reserved,
        "error": round(told.total / measured - 1, 4),
        "moment": told.moment,
    }


def _vit_s16(*overrides: str) -> Any:
    from dinoscale.config import load_config

    plain = ["model.drop_path_rate=0", "optim.min_lr=0", "engine.compile=false"]
    batch = ["train.batch_size=32", "train.micro_batch_size=32"]
    return load_config("vit_s16", [*plain, *batch, *overrides])


def auto() -> Shown:
    """The micro-batch that `auto` takes, and whether the next size really does not fit.

    It keeps a margin: the next size may fit where its peak is above what a trial may take.
    """
    told = _on_ranks("on_ranks_auto")
    return told, told["next"] is None or not told["next_fits"] or told["peak_share"] > CAREFUL


def on_ranks_auto() -> dict[str, Any]:
    """Search as a run does, then take a step of the next size in this process."""
    from dinoscale.config import micro_batch_sizes
    from dinoscale.engine.build import build_pair
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.micro_batch.search import find_micro_batch

    # Few sizes, the largest of which no GPU of today holds: each trial is a start of Python.
    batch = ["train.batch_size=16384", "train.micro_batch_size=auto", "optim.warmup_epochs=0"]
    config, process = _vit_s16(*batch), read_process(os.environ)
    found = find_micro_batch(config, process, moved=lambda _: None, stop_asked=lambda: False)
    sizes = micro_batch_sizes(config, world_size=process.world_size)
    told = {"size": found.size, "peak_bytes": found.peak_bytes, "trials": found.trials}
    if found.size == sizes[-1]:
        return told | {"next": None}
    larger, plan = trial_run(
        config, sizes[sizes.index(found.size) + 1], world_size=process.world_size
    )
    try:
        student, teacher = build_pair(larger, plan)
        for step in range(2):
            _take(student, teacher, larger, plan, step)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    total = torch.cuda.get_device_properties(0).total_memory
    peak = torch.cuda.max_memory_allocated()
    return told | {"next": plan.micro_batch_size, "next_fits": fits, "peak_share": peak / total}


def trial_run(config: Any, size: int, *, world_size: int) -> tuple[Any, Any]:
    """The run that a trial of a micro-batch takes steps of, on as many ranks, and its plan."""
    from dinoscale.config import resolve, split_batch, with_micro_batch
    from dinoscale.training.micro_batch.trial import _PASSES, _shortened

    split = split_batch(with_micro_batch(config, size), world_size=world_size)
    passes = min(_PASSES, split.accumulation_steps)
    run = _shortened(config, size, world_size=world_size, passes=passes)
    return run, resolve(run, world_size=world_size, num_images=run.train.batch_size)


def _ranks() -> int:
    return min(2, torch.cuda.device_count())


def _on_ranks(function: str, *, ranks: int | None = None, **kwargs: Any) -> Any:
    """What rank 0 found."""
    name = f"{__name__ if __name__ != '__main__' else 'tests.gpu.measures'}:{function}"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # else its products are not deterministic
    return run_distributed(name, world_size=ranks or _ranks(), timeout_s=110, **kwargs)[0]


def _dinoscale(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "dinoscale", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


MEASURES: dict[str, Callable[..., Shown]] = {
    measure.__name__: measure
    for measure in (
        *(stage_3_twice, alone_twice, host_waits, input_waits),
        *(bench_data, bench_step, plan_memory, auto),
    )
}


def main() -> int:
    """Run the function that the command line names, with the rest of it."""
    name, *arguments = sys.argv[1:]
    try:
        found, right = MEASURES[name](*arguments)
    except (RankFailedError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found), flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
