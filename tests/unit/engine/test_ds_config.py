"""DeepSpeed is told to keep and send gradients in float32 only where they are summed."""

import pytest

from dinoscale.config import parse_config, resolve
from dinoscale.engine.ds_config import student_config
from dinoscale.errors import ConfigError


def _told(*, world_size: int, accumulation: int) -> dict[str, object]:
    train = {"batch_size": 2 * world_size * accumulation, "micro_batch_size": 2}
    config = parse_config({"train": train, "optim": {"min_lr": 0}})
    return student_config(config, resolve(config, world_size=world_size, num_images=100))


@pytest.mark.parametrize(
    ("world_size", "accumulation", "kept", "sent"),
    [(1, 1, None, "bf16"), (1, 2, "fp32", "bf16"), (2, 1, "fp32", "fp32")],
)
def test_gradients_are_float32_where_they_are_summed(
    world_size: int, accumulation: int, kept: str | None, sent: str
) -> None:
    told = _told(world_size=world_size, accumulation=accumulation)
    types = told.get("data_types", {})
    assert isinstance(types, dict)
    assert types.get("grad_accum_dtype") == kept
    assert told["communication_data_type"] == sent


def test_recomputing_part_of_no_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="checkpoint_every_k_blocks=1"):
        parse_config({"engine": {"recompute": "pointwise"}})
