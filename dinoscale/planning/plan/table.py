"""The plan as text."""

from typing import Any

from dinoscale.planning.plan.memory_model import PARTS

_WORDS = {
    "parameters": "weights of the student",
    "gradients": "gradients",
    "optimizer": "master weights and moments",
    "teacher": "teacher: EMA and weights",
    "activations": "activations and crops",
    "loss": "targets, logits",
    "buffers": "communication buffers",
}


def as_text(plan: dict[str, Any]) -> str:
    """Format the result of `report.make_plan`; ends with a line break."""
    sections = [_head(plan), _options(plan["options"])]
    shown = plan["recommended"] or plan["configured"]
    if shown:
        sections += [_memory(shown), _communication(shown)]
        if plan["gpus"] > plan["node_gpus"]:
            sections.append(_durability(plan["durability"], shown))
    sections += [["assumed:", *(f"  {text}" for text in plan["assumptions"])], _conclusion(plan)]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def text_of_phases(plan: dict[str, Any]) -> str:
    """Format the result of `report.plan_of_phases`; ends with a line break."""
    texts = [f"phase {name}\n\n{as_text(of_phase)}" for name, of_phase in plan["phases"].items()]
    hours = plan["hours"]
    together = "not known, as nothing fits one of them" if hours is None else f"{hours:,.0f} h"
    return "\n".join([*texts, f"all phases, as recommended: {together}\n"])


def _head(plan: dict[str, Any]) -> list[str]:
    counts, flops = plan["parameters"], plan["flops_per_image"]
    giga = {name: f"{value / 1e9:.1f}" for name, value in flops.items()}
    of_teacher = "the teacher has as many"
    if counts["trained"] < counts["total"]:
        of_teacher = f"{_million(counts['trained'])} M train, and the teacher shares the others"
    if counts["frozen_teacher"]:
        frozen_teacher = _million(counts["frozen_teacher"])
        of_teacher = f"its average has as many, and the frozen teacher {frozen_teacher} M"
    frozen = "".join(
        f" + {name} {giga[key]}"
        for key, name in (
            ("gram", "Gram network"),
            ("anchor", "anchor"),
            ("followed", "frozen teacher"),
            ("average", "average, for its batch norm"),
        )
        if flops[key]
    )
    return [
        f"{plan['backbone']} on {plan['gpus']} x {plan['gpu']}, {_gb(plan['gpu_memory_bytes'])} GB"
        f" each, {plan['precision']}",
        f"weights: {_million(counts['total'])} M = backbone {_million(counts['backbone'])} M"
        f" + head {_million(counts['head'])} M; {of_teacher}",
        f"GFLOPs per image: {giga['total']} = teacher {giga['teacher_backbone']}"
        f" + its head {giga['teacher_head']}{frozen};"
        f" student forward {giga['student_global']} global crops"
        f" + {giga['student_local']} local crops + {giga['student_head']} head;"
        f" backward {giga['student_backward']}",
        *_sizes(plan["sizes"]),
        f"steps: {plan['steps']:,} of {plan['images_per_step']:,} images,"
        f" {plan['steps_per_epoch']:,} per epoch",
    ]


def _sizes(sizes: list[dict[str, Any]]) -> list[str]:
    """The mixture of sizes, if there is one."""
    if len(sizes) == 1:
        return []
    return [
        "sizes of the crops, drawn for each step: memory is that of the steps with most, FLOPs and"
        " times are means over the steps",
        *(
            f"  {of['weight']:.4g} of the steps: {of['sizes']}, {of['flops_per_image'] / 1e9:.1f}"
            f" GFLOPs per image{', the largest' if of['largest'] else ''}"
            for of in sizes
        ),
    ]


def _options(options: list[dict[str, Any]]) -> list[str]:
    lines = [
        "largest micro-batch that fits:",
        f"  {'stage':>5}  {'recomputed':<17}{'micro-batch':>11}{'passes':>8}{'GB needed':>11}"
        f"{'images/s':>10}{'hours':>8}{'GB sent':>9}{'s waited':>10}",
    ]
    for option in options:
        sent = option["communication"]
        row = f"  {option['zero_stage']:>5}  {option['recompute']:<17}"
        if option["fits"]:
            row += (
                f"{option['micro_batch_size']:>11}{option['accumulation_steps']:>8}"
                f"{_gb(option['needed_bytes']):>11}{option['images_per_s']:>10,.0f}"
                f"{option['hours']:>8,.0f}{_gb(sent['sent_bytes']):>9}{sent['waited_s']:>10.3f}"
            )
        else:
            row += f"{'none':>11}{'':>8}{_gb(option['needed_bytes']):>11}  for {_images(option)}"
        lines.append(row)
    return lines


def _memory(option: dict[str, Any]) -> list[str]:
    rest = option["needed_bytes"] - option["peak_bytes"]
    return [
        f"peak memory of a GPU, at '{option['peak_moment']}', {_named(option)}:",
        *(f"  {_WORDS[part]:<40}{_gb(option['bytes'][part]):>8} GB" for part in PARTS),
        f"  {'CUDA, NCCL and fragmentation, assumed':<40}{_gb(rest):>8} GB",
    ]


def _communication(option: dict[str, Any]) -> list[str]:
    sent, offload_s = option["communication"], option["offload_s"]
    offloaded = [f"a step waits {offload_s:.3f} s for the offloaded optimizer"] if offload_s else []
    if not sent["transfers"]:
        return ["no communication: there is one GPU", *offloaded]
    lines = ["communication of a GPU in a step:"]
    for transfer in sent["transfers"]:
        how = "overlaps compute" if transfer["beside_compute"] else "waited for"
        if transfer["between_bytes"]:
            how += f", {transfer['between_bytes'] / 1e9:.2f} GB to other nodes"
        lines.append(
            f"  {transfer['what']:<20}{transfer['collective']:<16}{transfer['times']:>3} x"
            f"{_gb(transfer['sent_bytes']):>8} GB in total, {how}"
        )
    busy = option["step_s"] - sent["waited_s"] - offload_s
    waits = sent["waited_s"] / option["step_s"]
    could = "could" if sent["seconds"] <= busy else "could not"
    lines.append(
        f"  {sent['seconds']:.3f} s, which {busy:.3f} s of compute {could} hide; as the engine"
        f" overlaps them, a step waits {sent['waited_s']:.3f} s ({waits:.0%})"
    )
    return lines + offloaded


def _durability(found: dict[str, Any], option: dict[str, Any]) -> list[str]:
    steps = max(1, round(found["interval_s"] / option["step_s"]))
    return [
        f"start: {found['build_s']:.0f} s to draw the weights, with {_gb(found['host_bytes'])} GB"
        f" of host memory per rank; {found['write_s']:.0f} s to read a checkpoint",
        f"checkpoints: {_gb(found['checkpoint_bytes'])} GB, {found['write_s']:.0f} s to write"
        f" during training; {found['failures_per_day']:.2f} failures expected per day",
        f"  save every {found['interval_s'] / 60:.0f} minutes, checkpoint.every_steps={steps}:"
        f" saving, failures and restarts of {found['restart_s'] / 60:.0f} minutes cost"
        f" {found['lost_share']:.1%} of the time; at most {found['most_lost_share']:.1%} with this"
        " number of failures",
    ]


def _conclusion(plan: dict[str, Any]) -> list[str]:
    lines, configured = [], plan["configured"]
    if configured:
        fits = "fits" if configured["fits"] else "does not fit"
        lines.append(
            f"configured: {_named(configured)} {fits}: {_gb(configured['needed_bytes'])} of"
            f" {_gb(plan['gpu_memory_bytes'])} GB, {configured['images_per_s']:,.0f} images/s,"
            f" {configured['hours']:,.0f} h"
        )
    lines.append(sentence(plan))
    return lines


def sentence(plan: dict[str, Any]) -> str:
    """The recommendation, as a sentence."""
    best, memory = plan["recommended"], _gb(plan["gpu_memory_bytes"])
    if best is None:
        least = min(plan["options"], key=lambda option: option["needed_bytes"])
        return (
            f"nothing fits: even {_named(least)} needs {_gb(least['needed_bytes'])} of {memory} GB;"
            " take larger GPUs or more of them, or engine.offload_optimizer=true"
        )
    settings = [
        f"engine.zero_stage={best['zero_stage']}",
        f"engine.checkpoint_every_k_blocks={best['checkpoint_every_k_blocks']}",
        f"train.micro_batch_size={best['micro_batch_size']}",
    ]
    if best["checkpoint_every_k_blocks"]:
        settings.insert(2, f"engine.recompute={best['recompute']}")
    return (
        f"recommended: {_named(best)}: {_gb(best['needed_bytes'])} of {memory} GB,"
        f" {best['images_per_s']:,.0f} images/s, {best['hours']:,.0f} h: {' '.join(settings)}"
    )


def _named(option: dict[str, Any]) -> str:
    """Stage, recomputation, micro-batch and accumulation, in words."""
    every = option["checkpoint_every_k_blocks"]
    level = "nothing" if option["recompute"] == "none" else f"'{option['recompute']}'"
    if every > 1:
        level += f" of every {every} blocks"
    return (
        f"stage {option['zero_stage']}, {level} recomputed, {_images(option)}"
        f" x {option['accumulation_steps']}"
    )


def _images(option: dict[str, Any]) -> str:
    return f"micro-batch {option['micro_batch_size']}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def _million(count: int) -> str:
    return f"{count / 1e6:.1f}"
