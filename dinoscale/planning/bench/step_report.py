"""The result of `bench_step` as text."""

from typing import Any

from dinoscale.planning.bench.timeline import (
    AUGMENTATION,
    BACKWARD,
    DATA,
    EMA,
    LOSS,
    OPTIMIZER,
    OTHER,
    STUDENT,
    TEACHER,
    TO_DEVICE,
)

_TEXTS = {
    DATA: "waiting for the loader",
    TO_DEVICE: "crops to the device",
    AUGMENTATION: "augmentation on the device",
    TEACHER: "teacher forward, targets",
    STUDENT: "student forward, backbone",
    LOSS: "head, prototypes, loss",
    BACKWARD: "backward, gradient reduction",
    OPTIMIZER: "clipping, optimizer",
    EMA: "EMA, teacher weights, center",
    OTHER: "other",
}


def as_text(result: dict[str, Any]) -> str:
    """A table of the step, then rates, memory, utilisation and the ratios to the reference."""
    whole = result["seconds_per_step"]["median"]
    head = (
        f"{result['backbone']}, {result['precision']}, ZeRO {result['zero_stage']} on"
        f" {result['world_size']} x {result['device']}; {result['micro_batch_size']} images x"
        f" {result['accumulation_steps']} micro-batches per rank"
    )
    lines = [head, f"{'part of a step':<40}{'ms':>10}{'share':>8}"]
    for part, seconds in result["split_s"].items():
        lines.append(f"  {_TEXTS[part]:<38}{1e3 * seconds:>10.2f}{seconds / whole:>8.1%}")
    if result["world_size"] > 1:
        seconds = result["communication_s"]
        lines.append(
            f"  {'(communication, included above)':<38}{1e3 * seconds:>10.2f}"
            f"{seconds / whole:>8.1%}"
        )
    rate, flops = result["images_per_s"], result["flops_per_s"] / 1e12
    ceiling = result["matmul_ceiling_flops_per_s"] / 1e12
    lines.append(
        f"{rate['median']:.4g} images/s ({rate['min']:.4g} to {rate['max']:.4g}),"
        f" at most {result['peak_memory_bytes'] / 2**20:.0f} MiB of tensors per rank"
    )
    lines.append(
        f"{flops:.3g} TFLOP/s per device, {result['utilisation']:.1%} of the {ceiling:.3g} that"
        " large matrix products reach"
    )
    ratio, theirs = result["ratio"], result["reference"]
    if ratio is None:
        return "\n".join([*lines, f"the reference was not measured: {result['no_reference']}"])
    speed, work, memory = ratio["throughput"], ratio["cpu_time"], ratio["peak_memory"]
    lines.append(
        f"literal reference: {1e3 * theirs['seconds_per_step']['median']:.4g} ms,"
        f" {theirs['peak_memory_bytes'] / 2**20:.0f} MiB; ours without the input is"
        f" {speed['median']:.2f} x as fast ({speed['min']:.2f} to {speed['max']:.2f}) in"
        f" {memory['median']:.2f} x the memory; with it, {work['median']:.2f} x the CPU time"
    )
    return "\n".join(lines)
