"""A training step of ours and the literal reference's: what `step_dinov2` and `step_dinov3` share.

ViT-S/16 with 2 x 224 + 8 x 96 crops, half of the global crops masked by 0.1 to 0.5, and a head of
its own for patches; without stochastic depth, so that both sides have the same losses, which is
checked. Ours and the reference take turns in one process, on the same crops and masks, first in
fp32, then in bf16. Memory is that of tensors at the peak of a step, above what stays between steps
without gradients: weights, their averages and the optimizer's states. Utilisation is the share of
the machine's limit, its large matrix products, that the model's own FLOPs reach. JSON last.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoscale.config import RunConfig, load_config
from dinoscale.config.resolve import RunPlan, resolve
from dinoscale.data.augmentation.masks import Masks, draw_masks
from dinoscale.engine.build import build_networks, build_pair, loss_weights_of, schedules_of
from dinoscale.engine.frozen.gram import crop_size_of
from dinoscale.engine.micro_batch import MicroBatch
from dinoscale.engine.model_sizes import dims_of, flops_of
from dinoscale.engine.schedules import StepValues
from dinoscale.engine.step import train_step
from dinoscale.errors import ConfigError, DinoscaleError
from dinoscale.planning.bench.budget import in_turns, say
from dinoscale.planning.bench.ceiling import matmul_rates
from dinoscale.planning.bench.tensor_memory import live_bytes, with_peak_bytes
from dinoscale.runtime import distributed
from dinoscale.runtime.launcher_env import read_process
from tests.reference_dinov2 import ReferenceStep, Share

STEPS_PER_EPOCH = 10
CLOSE = {"fp32": 1e-3, "bf16": 3e-2}  # losses of the first step, relative

# Takes a step; its loss without KoLeo, which in an untrained network is the logarithm of rounding.
Step = Callable[[], float]


@dataclass(frozen=True)
class Recipe:
    """What both sides take a step of.

    Attributes:
        preset: by default.
        settings: that win over the preset.
        reference: the literal step.
        weights_of: our state dict with the reference's names.
        loss_of: DINO and iBOT as ours adds them, from the losses that the reference logs.
    """

    preset: str
    settings: tuple[str, ...]
    reference: type[ReferenceStep]
    weights_of: Callable[[Mapping[str, Tensor], RunConfig], dict[str, Tensor]]
    loss_of: Callable[[Mapping[str, float], RunConfig], float]

    def config(self, options: argparse.Namespace, precision: str, *more: str) -> RunConfig:
        """The run."""
        return load_config(
            options.preset,
            [
                f"train.batch_size={options.batch}",
                f"train.micro_batch_size={options.batch}",
                f"crops.num_local={options.local_crops}",
                f"head.num_prototypes={options.prototypes}",
                f"patch_head.num_prototypes={options.prototypes}",
                "patch_head.norm_last_layer=false",
                "model.drop_path_rate=0",
                f"engine.precision={precision}",
                "optim.min_lr=0",  # else a small batch peaks below it
                *self.settings,
                *more,
                *options.overrides,
            ],
        )


@dataclass(frozen=True)
class Setting:
    """A run on this machine, and what both sides see in every step.

    Attributes:
        config: of the run.
        plan: of the run.
        now: the scheduled values in the middle of the run.
        batch: crops and masks.
        device: of the run.
    """

    config: RunConfig
    plan: RunPlan
    now: StepValues
    batch: MicroBatch
    device: torch.device

    @classmethod
    def of(cls, config: RunConfig) -> "Setting":
        """On a GPU if there is one."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        images = config.train.batch_size * STEPS_PER_EPOCH
        plan = resolve(config, world_size=1, num_images=images)
        now = schedules_of(config, plan).at(plan.total_steps // 2)
        return cls(config, plan, now, _batch(config, device), device)

    def ceiling(self) -> float:
        """FLOP/s of the machine's large products, in the run's precision or float32."""
        dims = dims_of(self.config)
        low = self.config.engine.precision == "bf16"
        return max(
            matmul_rates(
                self.device,
                (torch.bfloat16 if low else torch.float32, torch.float32),
                tokens=self.config.train.batch_size * dims.tokens,
                embed_dim=dims.embed_dim,
            ).values()
        )


def measure(recipe: Recipe, config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, bytes and ratios of both sides.

    Returns:
        JSON-able; `throughput` is the reference's seconds over ours, `cpu_time` our CPU seconds
        over its, which depend less on the other load of the machine, `memory` our bytes over its,
        `utilisation` our FLOP/s over those of large matrix products, measured in each turn.

    Raises:
        ConfigError: the two sides differ in the first loss.
    """
    setting, precision = Setting.of(config), config.engine.precision
    results: dict[str, list[dict[str, float]]] = {"ours": [], "reference": []}
    flops, utilisation = flops_of(dims_of(config)).total * config.train.batch_size, []
    for _ in in_turns(options.turns, limit_s=options.limit_s):
        ceiling = setting.ceiling()
        for name in results:
            step = Ours(setting) if name == "ours" else _Reference(setting, recipe)
            results[name].append(_measured(step, setting.device, options.seconds))
            step.close()
            del step
        last = {name: of_side[-1] for name, of_side in results.items()}
        utilisation.append(flops / last["ours"]["seconds"] / ceiling)
        say(
            f"{precision}: "
            + ", ".join(
                f"{name} {of_side['seconds']:.3g} s and {of_side['bytes_above'] / 1e6:.4g} MB"
                for name, of_side in last.items()
            )
            + f"; ours at {utilisation[-1]:.0%} of the {ceiling / 1e12:.3g} TFLOP/s that large"
            " matrix products reach"
        )
        _require_equal(last, precision)
    pairs = list(zip(results["ours"], results["reference"], strict=True))
    return {
        "precision": precision,
        **{
            name: {
                "seconds": spread([turn["seconds"] for turn in of_side]),
                "bytes_above": max(turn["bytes_above"] for turn in of_side),
                "bytes_between_steps": max(turn["bytes_between"] for turn in of_side),
            }
            for name, of_side in results.items()
        },
        "throughput": spread([theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]),
        "cpu_time": spread([ours["cpu_seconds"] / theirs["cpu_seconds"] for ours, theirs in pairs]),
        "memory": spread([ours["bytes_above"] / theirs["bytes_above"] for ours, theirs in pairs]),
        "utilisation": spread(utilisation),
    }


def _batch(config: RunConfig, device: torch.device) -> MicroBatch:
    crops, images = config.crops, config.train.batch_size
    generator = torch.Generator().manual_seed(0)

    def pictures(views: int, side: int) -> Tensor:
        shape = (views, images, config.data.channels, side, side)
        return torch.randn(shape, generator=generator).to(device)

    side = crops.global_size // (config.model.effective_patch_size or 1)
    masks = draw_masks(
        seed=config.seed,
        step=0,
        first_image=0,
        images=images,
        grid=(side, side),
        prob=config.ibot.mask_prob,
        ratio=config.ibot.mask_ratio,
        rule=config.ibot.mask_rule,
        group=config.ibot.mask_group,
    )
    return MicroBatch(
        pictures(2, crops.global_size),
        pictures(crops.num_local, crops.local_size),
        None,
        Masks(*(part.to(device) for part in masks)),
        gram_crops=pictures(2, crop_size_of(config)) if config.gram.loss_weight else None,
    )


class Ours:
    """Our step.

    Attributes:
        student: of the run.
        teacher: of the run; its Gram network, if any, is a copy of the average.
        now: the scheduled values.
    """

    def __init__(self, setting: Setting) -> None:
        self.student, self.teacher = build_pair(setting.config, setting.plan)
        if self.teacher.gram is not None:
            self.teacher.gram.refresh(self.teacher.ema)
        self.now = setting.now
        self._batch, self._weights = setting.batch, loss_weights_of(setting.config)

    def __call__(self) -> float:
        """Take a step; its loss."""
        pair = self.student, self.teacher
        result = train_step([self._batch], *pair, self.now, loss_weights=self._weights)
        self.teacher.wait()
        return result.terms["dino_loss"] + result.terms["ibot_loss"]

    def close(self) -> None:
        """Free the memory."""
        self.student.close()


class _Reference:
    def __init__(self, setting: Setting, recipe: Recipe) -> None:
        config, batch = setting.config, setting.batch
        weights = recipe.weights_of(build_networks(config)[0].state_dict(), config)
        self._step, self._loss_of = (
            recipe.reference(config, setting.device, weights),
            recipe.loss_of,
        )
        assert batch.masks is not None
        masks = batch.masks.masks.unflatten(0, batch.global_crops.shape[:2])
        self._share = Share(batch.global_crops, batch.local_crops, masks)
        self._now, self._config = setting.now, config

    def __call__(self) -> float:
        return self._loss_of(self._step([self._share], self._now), self._config)

    def close(self) -> None:
        """Nothing holds it."""


def _measured(step: Step, device: torch.device, seconds: float) -> dict[str, float]:
    """First loss, mean seconds of a step, bytes between steps and those that a step adds."""
    loss = step()  # also allocates what the optimizer keeps
    took, cpu_took = seconds_of(step, device, seconds)
    _free_gradients()
    between = live_bytes() if device.type == "cpu" else _held_on_gpu()
    peak = with_peak_bytes(step)[1]
    return {
        "loss": loss,
        "seconds": took,
        "cpu_seconds": cpu_took,
        "bytes_between": between,
        "bytes_above": peak - between,
    }


def seconds_of(
    work: Callable[[], object], device: torch.device, seconds: float
) -> tuple[float, float]:
    """Mean seconds of a call, and CPU seconds of all threads, in a time of one call at least."""
    begin, cpu_begin, count = time.perf_counter(), time.process_time(), 0
    while not count or time.perf_counter() - begin < seconds:
        work()
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count, (time.process_time() - cpu_begin) / count


def _free_gradients() -> None:
    """Free those that a side keeps until its next step, which frees them before its peak.

    The profiler that measures a CPU's memory does not see that: they are older than it.
    """
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.is_leaf:
            thing.grad = None


def _held_on_gpu() -> int:
    gc.collect()
    return torch.cuda.memory_allocated()


def _require_equal(last: dict[str, dict[str, float]], precision: str) -> None:
    ours, theirs = last["ours"]["loss"], last["reference"]["loss"]
    if not abs(ours - theirs) <= CLOSE[precision] * abs(theirs):
        raise ConfigError(f"the losses differ, {ours:.6g} and {theirs:.6g}: nothing to compare")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def parser_of(name: str, about: str | None, recipe: Recipe) -> argparse.ArgumentParser:
    """The options of `python -m tests.benchmarks.NAME`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m tests.benchmarks.{name}", description=f"{about}\n{__doc__}"
    )
    parser.add_argument("--preset", default=recipe.preset, help=f"default {recipe.preset}")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="images (default 8)")
    parser.add_argument("--local-crops", type=int, default=8, metavar="n", help="default 8")
    parser.add_argument("--prototypes", type=int, default=65536, metavar="K", help="default 65536")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: both")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="default 3")
    parser.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="of each side in each turn"
    )
    parser.add_argument(
        "--minutes", type=float, default=6.0, metavar="M", help="for all turns (default 6)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="win over all")
    return parser


def run(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    measured: Callable[[argparse.Namespace, str], dict[str, Any]],
) -> None:
    """Print the results of each precision, `measured(options, precision)`."""
    options = parser.parse_args(arguments)
    kinds = ("fp32", "bf16") if options.precision is None else (options.precision,)
    options.limit_s = 60 * options.minutes / len(kinds)
    distributed.start(read_process(os.environ))
    try:
        results = [measured(options, precision) for precision in kinds]
    except DinoscaleError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    distributed.stop()
    print(json.dumps(results))
