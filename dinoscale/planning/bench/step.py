"""Time and memory of a run's training step, compared with a literal reference step.

Ours and the reference take turns in one process on the same crops, so that other programs slow both
alike: trust the ratios within a turn, not the rates of different runs.
"""

import gc
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from dinoscale.config import RunConfig, split_batch, without_auto
from dinoscale.config.resolve import RunPlan, resolve
from dinoscale.config.sections.backbones import RESNET50
from dinoscale.data.sources.mixture import source_sizes
from dinoscale.data.sources.source import Source
from dinoscale.engine.model_sizes import dims_of, flops_of
from dinoscale.errors import ConfigError
from dinoscale.models.cpu_bf16 import LACKS_BFLOAT16
from dinoscale.planning.bench.budget import Budget, fit_to_time, in_turns, largest_size, say
from dinoscale.planning.bench.ceiling import matmul_rates
from dinoscale.planning.bench.our_step import OurStep, RandomPictures
from dinoscale.planning.bench.step_report import as_text
from dinoscale.planning.bench.tensor_memory import live_bytes, with_peak_bytes
from dinoscale.planning.bench.timeline import INPUT, OTHER, PARTS, Timeline
from dinoscale.planning.plan.dropped_branches import dropped_flops
from dinoscale.runtime import distributed
from dinoscale.runtime.launcher_env import Process
from dinoscale.runtime.memory import NO_MEMORY
from dinoscale.runtime.opening import open_once_per_node
from dinoscale.runtime.outputs import atomic_write
from dinoscale.training.feed import open_images

_WARM_UP = {"cpu": 1, "cuda": 3}  # steps that allocate optimizer state and compile kernels
_TRACED = 2  # steps in a trace
LIMIT_S = 360.0  # default limit for all turns
_STEPS_PER_EPOCH = 10  # of random pictures

CHECKOUT = Path(__file__).parents[3]  # root of the checkout, unless the package is installed

Step = Callable[[], dict[str, float]]  # takes a step; seconds by part


@dataclass(frozen=True)
class Turn:
    """Measurements of ours or the reference in one turn, on this rank.

    Attributes:
        parts: seconds of each part, one dict per step.
        cpu_s: mean CPU seconds of a step, over all threads.
        peak_bytes: peak bytes of tensors in a step, less those before the build; most of any rank.
    """

    parts: list[dict[str, float]]
    cpu_s: float
    peak_bytes: int

    @property
    def step_s(self) -> float:
        """Mean seconds of a step."""
        return statistics.fmean(sum(parts.values()) for parts in self.parts)

    @property
    def trained_s(self) -> float:
        """Mean seconds of a step without the input: from crops on the device to its end."""
        return self.step_s - sum(self.mean(part) for part in INPUT)

    def mean(self, part: str) -> float:
        """Mean seconds of a part of a step."""
        return statistics.fmean(parts.get(part, 0.0) for parts in self.parts)


def bench_step(
    config: RunConfig,
    process: Process,
    *,
    seconds: float,
    turns: int,
    with_reference: bool,
    trace_dir: Path | None,
    limit_s: float = LIMIT_S,
) -> dict[str, Any]:
    """Measure the optimizer step of a run on its ranks; all call it after `distributed.start`.

    To keep within `limit_s`, a slow machine measures fewer images per step, so that ours and the
    reference have half of the time each. If one turn of the reference is too long even then, it is
    omitted and ours has all the time. A turn that would exceed the limit does not begin, except the
    first. Messages report all of this.

    Args:
        config: of the run; without data.train, random pictures are cut once.
        process: this one.
        seconds: of steps, for ours and the reference in each turn; at least one step.
        turns: in each, ours and then the reference are built, warmed up, measured and freed.
        with_reference: measure the literal reference too, which only a checkout has.
        trace_dir: folder for chrome traces of some of our steps, one file per rank.
        limit_s: seconds for all turns together.

    Returns:
        JSON-able; sentences and a table go to stderr.

    Raises:
        ConfigError: a number is out of range, the backbone is not a ViT, or memory does not
            suffice.
        RunFailedError: a step was skipped.
    """
    if not (0 < seconds <= 3600 and 1 <= turns <= 1000 and 0 < limit_s <= 86400):
        raise ConfigError(
            "need 0 < --seconds <= 3600, 1 <= --turns <= 1000 and 0 < --minutes <= 1440, got"
            f" {seconds}, {turns} and {limit_s / 60:g}"
        )
    if config.model.backbone == RESNET50:
        raise ConfigError(f"model.backbone: bench step measures ViTs only, not {RESNET50}")
    config = largest_size(config)
    rates = _rates(config, process)
    budget = Budget(
        limit_s=limit_s,
        seconds=seconds,
        turns=turns,
        image_flops=flops_of(dims_of(config)).total,
        our_flops_per_s=max(rates.values()) if LACKS_BFLOAT16 else rates[_dtype(config)],
        their_flops_per_s=rates[_dtype(config)],
        device=process.device.type,
        with_reference=with_reference,
    )
    config, changed = fit_to_time(config, budget, world_size=process.world_size)
    plan, source = _input_of(config, process)
    bench = _Bench(config, plan, process, source, seconds=seconds, ceiling=max(rates.values()))
    reference, why_not = (
        find_reference(config, plan, CHECKOUT) if with_reference else (None, "not asked for")
    )
    if reference is not None and not budget.fits_once(plan.images_per_rank):
        reference, why_not = None, too_slow(config, limit_s)
    if changed:
        say(changed)
    if why_not and with_reference:
        say(f"the reference is not measured: {why_not}")
    expected_s = budget.expected_s(plan.images_per_rank, theirs=reference is not None)
    limit = "at most" if expected_s <= limit_s else "for one turn, which exceeds the limit of"
    say(f"this takes about {expected_s:.0f} s, {limit} {limit_s / 60:g} minutes")
    try:
        for turn in in_turns(turns, limit_s=limit_s):
            bench.turn(reference)
            say(f"turn {turn + 1} of {turns}: {bench.last_turn()}")
        if trace_dir is not None:
            bench.trace(trace_dir)
        result = bench.result() | {"no_reference": why_not or None, "changed": changed or None}
    except RuntimeError as error:
        if not NO_MEMORY.search(str(error)):
            raise
        raise ConfigError(
            f"train.micro_batch_size: {plan.micro_batch_size} images do not fit into memory"
            f" ({str(error).splitlines()[0][:150]}); take fewer, more ranks, a higher"
            " engine.zero_stage, or engine.checkpoint_every_k_blocks=1"
        ) from error
    if process.rank == 0:
        print(as_text(result), file=sys.stderr, flush=True)
    return result


def _dtype(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.engine.precision == "bf16" else torch.float32


def _rates(config: RunConfig, process: Process) -> dict[torch.dtype, float]:
    """FLOP/s of large products in the run's precision and in float32, measured on rank 0."""
    dims = dims_of(config)
    size = split_batch(without_auto(config), world_size=process.world_size).micro_batch_size
    kinds = dict.fromkeys((_dtype(config), torch.float32))
    return distributed.broadcast_object(
        matmul_rates(process.device, kinds, tokens=size * dims.tokens, embed_dim=dims.embed_dim)
    )


def too_slow(config: RunConfig, limit_s: float) -> str:
    """Why the literal reference is not measured, and the remedy."""
    remedy = "fewer images (train.batch_size, train.micro_batch_size) or more --minutes"
    if config.engine.precision == "bf16":
        remedy = f"engine.precision=fp32, {remedy}"
    return (
        f"one turn of it in {config.engine.precision} would take longer than"
        f" {limit_s / 60:g} minutes on this machine; set {remedy}"
    )


def _input_of(config: RunConfig, process: Process) -> tuple[RunPlan, Source]:
    if config.data.sources:
        source = open_once_per_node(partial(open_images, config))
        sizes = source_sizes(source)
        return resolve(config, world_size=process.world_size, num_images=sizes), source
    data = config.data
    wanted = max(data.subset_size or 0, data.images_per_epoch or 0)
    count = max(config.train.batch_size, wanted) * _STEPS_PER_EPOCH
    pictures = RandomPictures(count, config.data.channels)
    return resolve(config, world_size=process.world_size, num_images=count), pictures


def find_reference(config: RunConfig, plan: RunPlan, checkout: Path) -> tuple[Any, str]:
    """The class of the literal reference, or None and the reason; only a checkout has it."""
    if not (checkout / "tests" / "reference.py").is_file():
        return None, "it is tests/reference.py, which only a checkout has"
    others = (config.ibot.loss_weight, config.koleo.loss_weight, config.dino.same_view_pairs)
    if any(others) or config.dino.targets != "centering" or config.schedules.curves:
        return None, (
            "it is the step of DINO v1; set ibot.loss_weight=0, koleo.loss_weight=0,"
            " dino.targets=centering and dino.same_view_pairs=false, without curves in schedules"
        )
    if plan.accumulation_steps > 1:
        return None, (
            f"it cannot accumulate {plan.accumulation_steps} micro-batches; set"
            f" train.batch_size={plan.micro_batch_size * plan.world_size}"
        )
    return importlib.import_module("tests.reference").ReferenceStep, ""


class _Bench:
    """Measures turns, and keeps their results."""

    def __init__(
        self,
        config: RunConfig,
        plan: RunPlan,
        process: Process,
        source: Source,
        *,
        seconds: float,
        ceiling: float,
    ) -> None:
        self.ceiling = ceiling
        self.config, self.plan, self.process, self.source = config, plan, process, source
        self.device, self.seconds = process.device, seconds
        self.ours: list[Turn] = []
        self.theirs: list[Turn] = []
        self.communication: list[float] = []

    def last_turn(self) -> str:
        """The latest turn, in words."""
        ours = self.ours[-1]
        images = self.plan.batch_size
        text = f"{ours.step_s:.3g} s per step, {images / ours.step_s:.3g} images/s"
        if not self.theirs:
            return text
        theirs = self.theirs[-1]
        return (
            f"{text}; reference {theirs.step_s:.3g} s per step; without the input ours is"
            f" {theirs.trained_s / ours.trained_s:.2f} x as fast"
        )

    def turn(self, reference: Any) -> None:
        """Build, measure and free ours, then the reference."""
        before = _held_bytes()
        step = OurStep(self.config, self.plan, self.process, self.source)
        self.ours.append(self._measured(step, before))
        if self.process.world_size > 1:
            self.communication.append(_communication_s(step))
        now, crops = step.now, step.crops
        step.close()
        del step
        if reference is not None:
            before = _held_bytes() - sum(crop.nbytes for crop in crops)
            theirs = self._reference_step(reference, crops, now)
            self.theirs.append(self._measured(theirs, before))

    def _reference_step(self, reference: Any, crops: Sequence[torch.Tensor], now: Any) -> Step:
        """A step of the reference, called like `OurStep`."""
        theirs, timeline = reference(self.config, self.device), Timeline(self.device)

        def step() -> dict[str, float]:
            timeline.mark(OTHER)
            theirs(crops, now)
            return timeline.take()

        return step

    def _measured(self, step: Step, held_before: int) -> Turn:
        for _ in range(_WARM_UP[self.device.type]):
            took = sum(step().values())
        count = distributed.broadcast_object(max(1, round(self.seconds / took)))
        begin = time.process_time()
        parts = [step() for _ in range(count)]
        cpu_s = (time.process_time() - begin) / count
        _, peak = with_peak_bytes(step)
        return Turn(parts, cpu_s, max(distributed.gather_objects(peak - held_before)))

    def trace(self, folder: Path) -> None:
        """Write the profiler's trace of some steps.

        Raises:
            ConfigError: the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--profile: cannot write {folder}: {error.strerror}") from error
        step = OurStep(self.config, self.plan, self.process, self.source)
        for _ in range(_WARM_UP[self.device.type]):
            step()
        with profile() as profiler:
            for _ in range(_TRACED):
                step()
        with atomic_write(folder / f"rank{self.process.rank}.json") as beside:
            profiler.export_chrome_trace(str(beside))

    def result(self) -> dict[str, Any]:
        """Medians and spreads over turns."""
        config, plan = self.config, self.plan
        dims, ceiling = dims_of(config), self.ceiling
        flops = flops_of(dims)
        computed = flops.total - dropped_flops(dims, micro_batch_size=plan.micro_batch_size)
        of_rank = computed * plan.images_per_rank  # FLOPs of a step on one device
        step_s = statistics.median(turn.step_s for turn in self.ours)
        split = {part: _median([turn.mean(part) for turn in self.ours]) for part in PARTS}
        return {
            "device": _name_of(self.device),
            "backbone": config.model.backbone,
            "sizes": config.sizes_text,
            "precision": config.engine.precision,
            "zero_stage": config.engine.zero_stage,
            "world_size": plan.world_size,
            "micro_batch_size": plan.micro_batch_size,
            "accumulation_steps": plan.accumulation_steps,
            "steps": [len(turn.parts) for turn in self.ours],
            **_side(self.ours, images=plan.batch_size),
            "split_s": split,
            "communication_s": _median(self.communication) if self.communication else 0.0,
            "flops_per_image": asdict(flops) | {"total": flops.total},
            "flops_per_s": _rounded(of_rank / step_s),
            "matmul_ceiling_flops_per_s": _rounded(ceiling),
            "utilisation": _rounded(of_rank / step_s / ceiling),
            "reference": _side(self.theirs, images=plan.batch_size) if self.theirs else None,
            "ratio": _ratios(self.ours, self.theirs) if self.theirs else None,
        }


def _held_bytes() -> int:
    """Bytes of all tensors, after unused ones are freed."""
    gc.collect()
    if not torch.cuda.is_available():
        return live_bytes()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def _communication_s(step: Step) -> float:
    """Seconds of a step during which this rank runs a collective, by the profiler.

    These are NCCL's kernels on a GPU, else gloo's calls; waiting for other ranks is included.
    """
    with profile() as profiler:
        step()
    assert profiler.profiler is not None
    spans = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profiler.profiler.kineto_results.events()
        if event.name().startswith("gloo:")
        or (event.device_type().name == "CUDA" and event.name().startswith("nccl"))
    ]
    covered = reached = 0
    for begin, end in sorted(spans):
        covered += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return covered / 1e9


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _side(turns: Sequence[Turn], *, images: int) -> dict[str, Any]:
    return {
        "images_per_s": _spread([images / turn.step_s for turn in turns]),
        "seconds_per_step": _spread([turn.step_s for turn in turns]),
        "seconds_without_input": _spread([turn.trained_s for turn in turns]),
        "cpu_seconds_per_step": _spread([turn.cpu_s for turn in turns]),
        "peak_memory_bytes": max(turn.peak_bytes for turn in turns),
    }


def _ratios(ours: Sequence[Turn], theirs: Sequence[Turn]) -> dict[str, dict[str, float]]:
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "throughput": _spread([b.trained_s / a.trained_s for a, b in pairs]),
        "cpu_time": _spread([a.cpu_s / b.cpu_s for a, b in pairs]),
        "peak_memory": _spread([a.peak_bytes / b.peak_bytes for a, b in pairs]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": _median(values), "min": _rounded(min(values)), "max": _rounded(max(values))}


def _median(values: Sequence[float]) -> float:
    return _rounded(statistics.median(values))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
