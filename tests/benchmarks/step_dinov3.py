"""`python -m tests.benchmarks.step_dinov3`: a step of DINOv3, ours and the literal reference's.

With --parts not against the reference: what the rotation of queries and keys costs, and a Gram
loss, in steps of ours with and without it, in turn.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dinoscale.config import RunConfig
from dinoscale.planning.bench.budget import in_turns, say
from tests.benchmarks.literal_step import (
    Ours,
    Recipe,
    Setting,
    measure,
    parser_of,
    run,
    seconds_of,
    spread,
)
from tests.reference_dinov3 import ReferenceStep3, weights_of


def _loss_of(losses: Mapping[str, float], config: RunConfig) -> float:
    """From means over pairs, of which there are 2 of global crops and 2 n of local ones."""
    local = config.crops.num_local
    of_class = losses["dino_global_crops_loss"] + local * losses["dino_local_crops_loss"]
    return of_class / (1 + local) + losses["ibot_loss"]


RECIPE = Recipe(
    "dinov3_vitl16_in1k",
    ("model.backbone=vit_small_patch16_224",),
    ReferenceStep3,
    weights_of,
    _loss_of,
)
LATE = 1000  # steps, more than the run has: the Gram network is refreshed before, not by the steps


def measure_parts(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of steps with and without rotation and Gram loss, and of the Gram network alone.

    Returns:
        JSON-able; `step` is that with rotation and without Gram loss, `Gram network` its forward.
        Ratios are those within a turn.
    """
    setting = Setting.of(config)
    step, batch = Ours(setting), setting.batch
    backbones = step.student.network.backbone, step.teacher.plain_backbone()
    rope, with_gram = backbones[0].rope, setting.now.with_gram()
    without_gram = replace(with_gram, gram_weight=0.0)

    def plain() -> None:
        step.now = without_gram
        step()

    def unrotated() -> None:
        for backbone in backbones:
            backbone.rope = None
        plain()
        for backbone in backbones:
            backbone.rope = rope

    def anchored() -> None:
        step.now = with_gram
        step()

    def gram_network() -> None:
        step.teacher.gram.features(batch)

    works: dict[str, Callable[[], None]] = {"step": plain, "without rotation": unrotated}
    if config.gram.loss_weight:
        works |= {"with Gram loss": anchored, "Gram network": gram_network}
    for work in works.values():
        work()  # allocates, and compiles on a GPU
    turns: list[dict[str, tuple[float, float]]] = []
    for _ in in_turns(options.turns, limit_s=options.limit_s):
        turns.append(
            {
                name: seconds_of(work, setting.device, options.seconds)
                for name, work in works.items()
            }
        )
        say(", ".join(f"{name} {took:.3g} s" for name, (took, _) in turns[-1].items()))
    step.close()
    by_clock, by_cpu = (
        _shares([{name: times[kind] for name, times in turn.items()} for turn in turns])
        for kind in (0, 1)
    )
    return {"precision": config.engine.precision, "seconds": by_clock, "cpu_seconds": by_cpu}


def _shares(turns: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Of each work, and the ratios within a turn."""
    found = {name: spread([turn[name] for turn in turns]) for name in turns[0]}
    found["rotation / step"] = spread(
        [1 - turn["without rotation"] / turn["step"] for turn in turns]
    )
    if "Gram network" in turns[0]:
        for name in ("step", "Gram network"):
            found[f"added by Gram loss / {name}"] = spread(
                [(turn["with Gram loss"] - turn["step"]) / turn[name] for turn in turns]
            )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("step_dinov3", __doc__, RECIPE)
    parser.add_argument("--parts", action="store_true", help="the rotation, and with --gram Gram")
    parser.add_argument(
        "--gram", type=int, metavar="SIDE", help="pixels of the Gram network's crops, with --parts"
    )

    def measured(options: argparse.Namespace, precision: str) -> dict[str, Any]:
        if not options.parts:
            return measure(RECIPE, RECIPE.config(options, precision), options)
        gram = (f"gram.crop_size={options.gram}",) if options.gram else ()
        if gram:
            gram += ("gram.loss_weight=1", f"gram.refresh_every_steps={LATE}")
        return measure_parts(RECIPE.config(options, precision, *gram), options)

    run(parser, arguments, measured)


if __name__ == "__main__":
    main()
