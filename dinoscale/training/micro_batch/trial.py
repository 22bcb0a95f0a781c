"""One trial: steps of a run with one micro-batch size, in a process that may run out of memory.

Run `python -m dinoscale.training.micro_batch.trial` on every rank, with the variables of a
launcher; one line of JSON on stdin says what to try. It ends when stdin closes, and so with its
parent. It prints lines of JSON: `limit_bytes` before the steps, `peak_bytes` after them.
"""

import contextlib
import json
import os
import resource
import sys
import threading
import traceback
from pathlib import Path

import numpy as np
import torch

from dinoscale.config import (
    RunConfig,
    RunPlan,
    parse_config,
    resolve,
    split_batch,
    with_micro_batch,
)
from dinoscale.data.augmentation.crop_params import draw_params
from dinoscale.data.augmentation.masks import Masks
from dinoscale.data.loader import Batch
from dinoscale.engine.build import build_pair, loss_weights_of, schedules_of
from dinoscale.engine.micro_batch import MicroBatch
from dinoscale.engine.step import train_step
from dinoscale.engine.student import Student
from dinoscale.engine.teacher import Teacher
from dinoscale.errors import DinoscaleError
from dinoscale.runtime import distributed
from dinoscale.runtime.launcher_env import Process, read_process
from dinoscale.runtime.memory import available_memory, private_bytes
from dinoscale.runtime.watchdog import collectives_timeout_s
from dinoscale.training.feed import (
    MicroBatches,
    coordinates_of,
    finish_batch,
    finish_gram_crops,
    keep_of,
    masks_of,
    multi_crop_of,
)
from dinoscale.training.hooks.metrics import peak_memory_bytes

# Fraction of the free memory. The rest is for needs that a few steps do not show: an allocator's
# fragments grow over days, k-NN copies the backbone, data workers and other processes vary.
USABLE = 0.92
_STEPS = 2  # the first allocates the moments; the second begins with them
_PASSES = 2  # micro-batches per step: the second one accumulates
_PICTURE = 256  # pixels; places the crops in a picture, which affects no size


def main() -> None:
    """Run the trial and exit at once: waiting for other ranks at exit could hang."""
    _raise_oom_score()
    code = 0
    try:
        request = json.loads(sys.stdin.buffer.readline())
        threading.Thread(target=_end_with_parent, daemon=True).start()
        config = parse_config(request["config"], origin="the run")
        _try(config, request["micro_batch_size"], read_process(os.environ))
    except DinoscaleError as error:
        print(f"error: {error}")
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def _raise_oom_score() -> None:
    """Make the kernel's OOM killer choose this process first."""
    with contextlib.suppress(OSError):  # only a hint
        Path("/proc/self/oom_score_adj").write_text("1000")


def _end_with_parent() -> None:
    sys.stdin.buffer.read()  # ends when the parent is gone, however it went
    os._exit(1)


def _try(config: RunConfig, size: int, process: Process) -> None:
    distributed.start(process, timeout_s=collectives_timeout_s(config.train.hang_timeout_s))
    distributed.gather_objects(None)  # all ranks have started, and NCCL has its buffers
    limit = _free_bytes(process)
    taken = 0 if limit is None else private_bytes()
    distributed.gather_objects(limit)  # no rank allocates before all have measured
    short, plan = _short_run(config, size, world_size=process.world_size)
    student, teacher = build_pair(short, plan, values=False)
    if limit is not None:  # after DeepSpeed's groups: Gloo hangs where a thread finds no stack
        _limit_memory(limit, taken, process.device)
    print(json.dumps({"limit_bytes": limit}), flush=True)
    _take_steps(short, plan, student, teacher, process.device)
    print(json.dumps({"peak_bytes": peak_memory_bytes()}), flush=True)
    distributed.gather_objects(None)


def _free_bytes(process: Process) -> int | None:
    """Memory that this rank may still allocate; None if unknown."""
    if process.device.type == "cuda":
        return int(USABLE * torch.cuda.mem_get_info()[0])
    at_hand = available_memory()
    if at_hand is None:
        return None
    room = at_hand // process.local_world_size
    allowed, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if allowed != resource.RLIM_INFINITY:
        room = min(room, allowed - private_bytes())
    return int(USABLE * room)


def _limit_memory(limit: int, taken: int, device: torch.device) -> None:
    """Make allocations fail beyond a limit, before the machine swaps or kills processes.

    Args:
        limit: bytes.
        taken: private bytes of this process before, which do not count.
        device: whose memory is limited.
    """
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1], device)
    else:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (taken + limit, hard))


def _take_steps(
    config: RunConfig, plan: RunPlan, student: Student, teacher: Teacher, device: torch.device
) -> None:
    if teacher.gram is not None:
        teacher.gram.refresh(teacher.ema)  # as late in the run
    for run in config.of_sizes:  # of several sizes of crops, any may need the most
        _take_steps_of_size(run, plan, student, teacher, device)


def _take_steps_of_size(
    config: RunConfig, plan: RunPlan, student: Student, teacher: Teacher, device: torch.device
) -> None:
    now = schedules_of(config, plan).at(plan.total_steps - 1).with_gram()
    batch, depth = _batch(config, plan.micro_batch_size), student.network.backbone.depth
    for _ in range(_STEPS):
        prepared = MicroBatches(
            plan.accumulation_steps, lambda _: _prepared(batch, config, device, depth=depth)
        )
        train_step(prepared, student, teacher, now, loss_weights=loss_weights_of(config))


def _short_run(config: RunConfig, size: int, *, world_size: int) -> tuple[RunConfig, RunPlan]:
    """The run with just enough micro-batches per step to reach its peak memory."""
    passes = split_batch(with_micro_batch(config, size), world_size=world_size).accumulation_steps
    short = _shortened(config, size, world_size=world_size, passes=min(passes, _PASSES))
    return short, resolve(short, world_size=world_size, num_images=short.train.batch_size)


def _shortened(config: RunConfig, size: int, *, world_size: int, passes: int) -> RunConfig:
    """The run with `passes` micro-batches per step and one step per epoch."""
    train = {
        "batch_size": size * world_size * passes,
        "micro_batch_size": size,
        "steps_per_epoch": None,
        "epochs": max(config.train.epochs, 2),  # a Gram network is there after the first step
    }
    data = {"train": None, "images_per_epoch": None, "subset_size": None}
    gram = {"first_refresh_step": 0, "refresh_every_steps": config.gram.refresh_every_steps and 1}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=train),
            "data": config.data.model_copy(update=data),
            "gram": config.gram.model_copy(update=gram),
        }
    )


def _batch(config: RunConfig, size: int) -> Batch:
    """Noise in place of the crops from data workers."""
    rng, multi_crop = np.random.default_rng(config.seed), multi_crop_of(config)
    crops = multi_crop.arrays(count=size)
    crops.params[:] = draw_params(
        rng,
        width=_PICTURE,
        height=_PICTURE,
        specs=multi_crop.specs,
        color=multi_crop.color,
        colored=multi_crop.colored,
    )[:, None]
    global_crops, local_crops, gram_crops = (
        torch.from_numpy(rng.integers(0, 256, views.shape, dtype=np.uint8))
        for views in (crops.global_crops, crops.local_crops, crops.gram_crops)
    )
    ids = torch.arange(size)
    return Batch(global_crops, local_crops, gram_crops, crops.params, ids, [])


def _prepared(batch: Batch, config: RunConfig, device: torch.device, *, depth: int) -> MicroBatch:
    keep = None
    if config.model.drop_path_rate:
        keep = keep_of(torch.rand(depth, 2, batch.params.size), config.model).to(device)
    compiled = config.engine.compile is not False
    crops = finish_batch(batch, config.data, device, compiled=compiled)
    coordinates = coordinates_of(config, step=0, depth=depth)
    if coordinates is not None:
        coordinates = coordinates.to(device)
    gram_crops = finish_gram_crops(batch, config, device, compiled=compiled)
    masks = _masks(config, len(batch.sample_ids), device)
    return MicroBatch(*crops, keep, masks, coordinates, gram_crops)


def _masks(config: RunConfig, size: int, device: torch.device) -> Masks | None:
    """As many masked patches as the run has at most: `dinov2` draws up to those of `dinov3`."""
    ibot = config.ibot.model_copy(update={"mask_rule": "dinov3"})
    most = config.model_copy(update={"ibot": ibot})
    masks = masks_of(most, step=0, first_image=0, images=size)
    return None if masks is None else Masks(*(tensor.to(device) for tensor in masks))


if __name__ == "__main__":
    main()
