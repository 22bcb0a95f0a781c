"""Memory that `dinoscale plan` predicts, against real steps on CPUs.

    python -m tests.benchmarks.plan

takes a few steps of each of `CASES` and prints the table of tests/benchmarks/README.md, then one
line of JSON. Buckets are smaller than in a run, in proportion to the networks, so that no constant
hides a term.
"""

import gc
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from dinoscale.config import RunConfig, resolve
from dinoscale.engine.model_sizes import dims_of
from dinoscale.planning.bench.budget import in_turns, say
from dinoscale.planning.plan.memory_model import Peak, peak
from dinoscale.planning.plan.partition import setup_of
from tests.distributed.tiny_run import (
    STEPS_PER_EPOCH,
    micro_batches,
    take_step,
    tiny_config,
    tiny_plan,
)
from tests.harness import run_distributed

LOCAL_SIZE = 48  # pixels

LIMIT_S = 330.0  # of all cases
STEPS = 2  # before the one that is measured: moments exist, stage 3 knows the order of its layers
TURNS = 6  # of the step that is measured, with several ranks


class Case(NamedTuple):
    """A run whose memory is measured; sizes as in the configuration."""

    stage: int
    ranks: int = 1
    precision: str = "fp32"
    micro_batch: int = 2
    accumulation: int = 1
    recompute: str = "none"
    every: int = 1  # with recomputation: of the blocks
    embed_dim: int = 192
    depth: int = 4
    global_size: int = 96
    num_local: int = 0
    num_prototypes: int = 8192
    unit_prototypes: bool = True
    reduce_bucket_size: int = 6_000_000
    rope: bool = False  # rotary positions, others in each block
    dinov2: bool = False  # layer scale, SwiGLU, registers; patch loss with its own head, KoLeo
    gram_size: int = 0  # of the crops of a Gram network
    dinov3: bool = False  # a norm for local crops, prototypes without lengths
    anchor: bool = False  # of patches
    lora_rank: int = 0
    teacher_dim: int = 0  # width of a frozen teacher of other heads and smaller patches; 0: none

    def config(self) -> RunConfig:
        """The configuration of the run."""
        return tiny_config(
            model={
                "patch_size": 16,
                "embed_dim": self.embed_dim,
                "depth": self.depth,
                "num_heads": self.embed_dim // 64,
                "drop_path_rate": 0.0,
                **({"rope": {"rescale": 2.0}} if self.rope else {}),
                **(DINOV2 if self.dinov2 else {}),
                "local_norm": self.dinov3,
            },
            **(PATCHES if self.dinov2 else {}),
            gram={
                "loss_weight": float(self.gram_size > 0),
                "refresh_every_steps": 1 if self.gram_size else None,
                "crop_size": self.gram_size or None,
            },
            anchor={"patch_weight": float(self.anchor)},
            lora={"rank": self.lora_rank},
            distill=self._distill() if self.teacher_dim else {},
            head={
                "num_prototypes": self.num_prototypes,
                "hidden_dim": 512,
                "bottleneck_dim": 256,
                "norm_last_layer": self.unit_prototypes,
                "weight_norm": not self.dinov3,
            },
            crops={
                "global_size": self.global_size,
                "local_size": LOCAL_SIZE,
                "num_local": self.num_local,
            },
            optim={"lr": 0.01, "warmup_epochs": 0},
            train={
                "batch_size": self.micro_batch * self.accumulation * self.ranks,
                "micro_batch_size": self.micro_batch,
                "init_from": "given",
            },
            engine={
                "zero_stage": self.stage,
                "precision": self.precision,
                "checkpoint_every_k_blocks": 0 if self.recompute == "none" else self.every,
                "recompute": "block" if self.recompute == "none" else self.recompute,
                "reduce_bucket_size": self.reduce_bucket_size,
                "stage3_max_live_parameters": self.reduce_bucket_size,
            },
            eval={"crop": 32, "resize": 32},
        )

    def _distill(self) -> dict[str, Any]:
        backbone = {"backbone": "vit_tiny_patch16_224", "patch_size": 8, "depth": 6}
        sizes = {"embed_dim": self.teacher_dim, "num_heads": self.teacher_dim // 64}
        head = {"hidden_dim": 768, "norm_last_layer": self.unit_prototypes}
        heads = {"head": {**head, "num_prototypes": self.num_prototypes}}
        if self.dinov2:
            prototypes = PATCHES["patch_head"]["num_prototypes"]
            heads["patch_head"] = {**head, "num_prototypes": prototypes}
        return {"teacher": "given", "model": backbone | sizes, **heads}


PATCHES: dict[str, dict[str, Any]] = {
    "ibot": {"loss_weight": 1.0, "mask_group": 2},
    "koleo": {"loss_weight": 0.1},
    "patch_head": {"num_prototypes": 4096, "hidden_dim": 512, "bottleneck_dim": 128},
}
DINOV2 = {"layer_scale": 1e-5, "ffn": "swiglu", "registers": 4}
WIDE = {"embed_dim": 384, "depth": 6, "num_prototypes": 4096, "reduce_bucket_size": 2_000_000}
NARROW = {"num_prototypes": 1024, "reduce_bucket_size": 600_000}
QUICK = [  # what the tests run
    Case(0),
    Case(1, ranks=2, accumulation=2),
    Case(2, micro_batch=4, global_size=224, dinov2=True, rope=True),
    Case(2, micro_batch=8, num_local=8, dinov2=True, **NARROW),
    Case(2, ranks=2, precision="bf16", accumulation=2, num_local=8, **WIDE),
    Case(2, ranks=2, micro_batch=1, accumulation=2),
    Case(3, ranks=2, **WIDE),
    Case(2, gram_size=448, **NARROW),
    Case(2, micro_batch=4, global_size=224, anchor=True, **NARROW),
    Case(2, embed_dim=384, depth=6, num_local=8, lora_rank=8, **NARROW),
]
CASES = [
    *QUICK,
    Case(0, precision="bf16"),
    Case(0, precision="bf16", ranks=2),
    Case(3, ranks=2, precision="bf16", micro_batch=4, recompute="block", **WIDE),
    Case(1, precision="bf16", micro_batch=8, num_prototypes=65536, reduce_bucket_size=20_000_000),
    Case(2, micro_batch=16, depth=12, num_local=8, unit_prototypes=False),
    Case(2, micro_batch=4, global_size=224, num_local=8),
    Case(2, micro_batch=8, global_size=224, recompute="all_but_attention"),
    Case(2, micro_batch=8, global_size=224, depth=8, recompute="block", every=2),
    Case(2, micro_batch=8, global_size=224, dinov2=True),
    Case(2, micro_batch=4, global_size=224),
    Case(2, micro_batch=8, num_local=8, **NARROW),
    Case(3),
    Case(2, micro_batch=4, global_size=224, gram_size=224, **NARROW),
    Case(2, global_size=448, gram_size=448, **NARROW),
    Case(2, micro_batch=4, global_size=224, gram_size=448, dinov2=True),
    Case(3, ranks=2, micro_batch=8, gram_size=192, precision="bf16", **WIDE),
    Case(2, ranks=2, micro_batch=4, precision="bf16", lora_rank=8, num_local=8, **WIDE),
]


def measure(cases: list[Any]) -> list[float]:
    """On a rank: bytes of tensors at the peak of a step of each case, the batch's included."""
    return [_peak(Case(*case)) for case in cases]


def _peak(case: Case) -> float:
    from dinoscale.engine.build import build_pair, loss_weights_of, schedules_of
    from dinoscale.engine.micro_batch import MicroBatch
    from dinoscale.engine.step import train_step
    from dinoscale.planning.bench.tensor_memory import live_bytes, with_peak_bytes

    config = case.config()
    plan = tiny_plan(config)
    drawn = micro_batches(config, plan, STEPS)  # views of all ranks' images
    before = live_bytes()  # of the cases before this one: engines stay until the process ends
    student, teacher = build_pair(config, plan)
    for step in range(STEPS):
        take_step(student, teacher, config, plan, step)
    gc.collect()
    now, weights = schedules_of(config, plan).at(STEPS), loss_weights_of(config)

    def step() -> None:
        batches = (
            MicroBatch(
                b.global_crops.clone(),
                b.local_crops.clone(),
                None,
                b.masks,
                b.coordinates,
                None if b.gram_crops is None else b.gram_crops.clone(),
            )
            for b in drawn
        )
        train_step(batches, student, teacher, now, loss_weights=weights)
        teacher.wait()  # a profiler that ends amid a collective crashes

    teacher.wait()
    turns = TURNS if case.ranks > 1 else 1
    peaks = [with_peak_bytes(step)[1] for _ in range(turns)]
    # The least: threads that gloo sends with let go of their copies when they get to it, which on
    # a busy machine is late in one turn of seven.
    return min(peaks) - before


def predict(case: Case) -> Peak:
    """What `plan` says of the same step."""
    config = case.config()
    images = config.train.batch_size * STEPS_PER_EPOCH
    run = resolve(config, world_size=case.ranks, num_images=images)
    setup = setup_of(config, run, on_gpu=False)
    return peak(dims_of(config), setup)


def measured(cases: Sequence[Case]) -> dict[Case, float]:
    """Bytes on the first rank, by case; one launch for each number of ranks."""
    found = {}
    for ranks in sorted({case.ranks for case in cases}):
        some = [case for case in cases if case.ranks == ranks]
        per_rank = run_distributed(
            "tests.benchmarks.plan:measure",
            world_size=ranks,
            timeout_s=280,
            cases=[tuple(case) for case in some],
        )
        found |= dict(zip(some, per_rank[0], strict=True))
    return found


def main() -> None:
    """Print a row of the table for each case as it comes, then JSON."""
    rows = []
    say(f"{len(CASES)} cases, each in processes of its own; at most {LIMIT_S / 60:g} minutes")
    print(
        "| stage | ranks | type | images x passes | recomputed | network, crops"
        " | predicted MB | measured MB | error | moment of the peak |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for turn in in_turns(len(CASES), limit_s=LIMIT_S):
        case = CASES[turn]
        (found,) = measured([case]).values()
        predicted = predict(case)
        error = predicted.total / found - 1
        rows.append({**case._asdict(), "error": round(error, 4)})
        level = case.recompute + (f", every {case.every}" if case.every > 1 else "")
        print(
            f"| {case.stage} | {case.ranks} | {case.precision}"
            f" | {case.micro_batch} x {case.accumulation} | {level}"
            f" | {case.depth} x {case.embed_dim}{' of DINOv2' if case.dinov2 else ''},"
            f" K {case.num_prototypes},"
            f" 2 x {case.global_size} + {case.num_local} x {LOCAL_SIZE}"
            f" | {predicted.total / 1e6:.0f} | {found / 1e6:.0f}"
            f" | {error:+.1%} | {predicted.moment} |",
            flush=True,
        )
    worst = max(abs(row["error"]) for row in rows)
    left_out = [case._asdict() for case in CASES[len(rows) :]]  # no time for them
    print(json.dumps({"worst_error": worst, "cases": rows, "left_out": left_out}))


if __name__ == "__main__":
    main()
