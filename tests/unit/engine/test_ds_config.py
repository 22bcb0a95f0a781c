"""What DeepSpeed makes of the dictionaries it is told: every field, so that no default acts."""

from collections.abc import Mapping
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from dinoscale.config import RunConfig, RunPlan, parse_config, resolve
from dinoscale.engine.ds_config import student_config, teacher_config
from dinoscale.errors import ConfigError

# Fields of DeepSpeed's that no run of ours reaches, as the release that was tested has them: its
# own checkpoints and warnings, layouts of long ago, names of before, layers of other models.
_OUT_OF_REACH = {
    "load_from_fp32_weights": True,
    "elastic_checkpoint": False,
    "pipeline_loading_checkpoint": False,
    "legacy_stage1": False,
    "override_module_apply": True,
    "log_trace_cache_warnings": False,
    "enable_sanity_checks": False,
    "save_muon_momentum_buffer_in_memory": False,
    "cpu_offload": None,
    "cpu_offload_param": None,
    "cpu_offload_use_pin_memory": None,
    "stage3_gather_fp16_weights_on_model_save": False,
}
# How stages and settings resolve; the rest is written as it is.
_ZERO = {
    "overlap_comm": False,
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "use_multi_rank_bucket_allreduce": True,
    "allgather_partitions": True,
    "reduce_bucket_size": 2**24,
    "allgather_bucket_size": 2**24,
    "ignore_unused_parameters": True,
    "round_robin_gradients": False,
    "parameter_alignment": False,
    "sub_group_size": 10**12,
    "offload_param": None,
    "zenflow": None,
    "memory_efficient_linear": False,
    "param_persistence_threshold": 0,
    "model_persistence_threshold": 0,
    "max_live_parameters": 50_000_000,
    "max_reuse_distance": 50_000_000,
    "prefetch_bucket_size": 25_000_000,
    "module_granularity_threshold": 0,
    "use_all_reduce_for_fetch_params": False,
    "allgather_sequential": False,
    "gather_16bit_weights_on_model_save": False,
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
}
_BESIDE = {
    "gradient_clipping": 0.0,
    "gradient_allreduce_op": "mean",
    "gradient_predivide_factor": 1.0,
    "prescale_gradients": False,
    "managed_gradient_accumulation": True,
    "disable_allgather": False,
    "torch_autocast_enabled": False,
    "param_dtype": None,
    "buffer_dtype": None,
    "keep_in_fp32_modules": [],
    "zero_allow_untested_optimizer": True,
    "wall_clock_breakdown": False,
    "memory_breakdown": False,
    "steps_per_print": None,
}
_BF16 = {
    "check_grad_overflow": False,
    "immediate_grad_update": False,
    "bf16_master_weights_and_grads": False,
    "bf16_optimizer_states": False,
}


def _run(
    *, world_size: int = 1, accumulation: int = 1, **engine: object
) -> tuple[RunConfig, RunPlan]:
    train = {"batch_size": 2 * world_size * accumulation, "micro_batch_size": 2}
    config = parse_config({"train": train, "optim": {"min_lr": 0}, "engine": engine})
    return config, resolve(config, world_size=world_size, num_images=100)


def _zero(told: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed's own model makes of the ZeRO section, after everything else agreed."""
    found = DeepSpeedConfig(told)
    assert {name: getattr(found, name) for name in _BESIDE} == _BESIDE
    assert not found.timers_config.enabled
    assert not found.float16_config.enabled
    bf16 = found.bfloat16_config.model_dump()
    assert bf16 == _BF16 | {"enabled": told["bf16"]["enabled"]}
    written = found.zero_config.model_fields_set | _OUT_OF_REACH.keys() | {"leaf_module"}
    assert written == {*type(found.zero_config).model_fields}
    zero = found.zero_config.model_dump()
    del zero["leaf_module"]  # of models that are not ours
    return zero


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_student_and_teacher_leave_no_field_to_deepspeed(stage: int, offload: bool) -> None:
    offload = offload and stage > 0
    run = _run(zero_stage=stage, offload_optimizer=offload)
    zero = _zero(student_config(*run))
    offloaded = zero.pop("offload_optimizer")
    norm = {"compute_grad_norm": stage in (0, 3) or offload}
    assert zero == _ZERO | _OUT_OF_REACH | {"stage": stage} | norm
    assert (offloaded is not None) == offload
    if offload:
        acting = ("device", "pin_memory", "ratio", "super_offload")
        assert [offloaded[name] for name in acting] == ["cpu", True, 1.0, False]
    at_stage_3 = {"stage": 3, "compute_grad_norm": True, "offload_optimizer": None}
    assert _zero(teacher_config(*run)) == _ZERO | _OUT_OF_REACH | at_stage_3


@pytest.mark.parametrize(
    ("world_size", "accumulation", "kept", "sent"),
    [(1, 1, None, "bf16"), (1, 2, "fp32", "bf16"), (2, 1, "fp32", "fp32")],
)
def test_gradients_are_float32_where_they_are_summed(
    world_size: int, accumulation: int, kept: str | None, sent: str
) -> None:
    told = student_config(*_run(world_size=world_size, accumulation=accumulation))
    assert told["data_types"]["grad_accum_dtype"] == kept
    assert told["communication_data_type"] == sent


def test_recomputing_part_of_no_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="checkpoint_every_k_blocks=1"):
        parse_config({"engine": {"recompute": "pointwise"}})
