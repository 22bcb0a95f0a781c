"""`python -m tests.benchmarks.step_dinov2`: a step of DINOv2, ours and the literal reference's."""

from collections.abc import Mapping, Sequence

from dinoscale.config import RunConfig
from tests.benchmarks.literal_step import Recipe, measure, parser_of, run
from tests.reference_dinov2 import ReferenceStep, weights_of


def _loss_of(losses: Mapping[str, float], _: RunConfig) -> float:
    of_class = losses["dino_local_crops_loss"] + losses["dino_global_crops_loss"]
    return of_class + 2 * losses["ibot_loss"]


RECIPE = Recipe("dinov2_vits16", (), ReferenceStep, weights_of, _loss_of)


def main(arguments: Sequence[str] | None = None) -> None:
    run(
        parser_of("step_dinov2", __doc__, RECIPE),
        arguments,
        lambda options, precision: measure(RECIPE, RECIPE.config(options, precision), options),
    )


if __name__ == "__main__":
    main()
