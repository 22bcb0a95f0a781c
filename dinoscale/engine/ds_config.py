"""RunConfig and RunPlan -> the DeepSpeed configuration, with every value that can change numbers.

DeepSpeed's defaults move between releases (gradient clipping went from 0 to 1), so nothing that
touches a number is left to them.
"""

from typing import Any

from dinoscale.config.resolve import RunPlan
from dinoscale.config.schema import RunConfig


def student_config(config: RunConfig, plan: RunPlan) -> dict[str, Any]:
    """The dictionary `deepspeed.initialize` takes for the student."""
    engine = config.engine
    derived = _shared(config, plan)
    derived["gradient_accumulation_steps"] = plan.accumulation_steps
    derived["train_batch_size"] = plan.batch_size
    derived["gradient_clipping"] = 0.0  # gradients.py clips, at every stage
    # One rank sums nothing: DeepSpeed would copy its gradients into this type and back.
    alone = plan.world_size == 1
    derived["communication_data_type"] = engine.precision if alone else engine.communication_dtype
    # A gradient that is neither accumulated nor summed over ranks is no better in float32.
    summed = plan.accumulation_steps > 1 or plan.world_size > 1
    if engine.precision == "bf16" and engine.zero_stage >= 2 and summed:
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    derived["zero_optimization"] |= {
        "stage": engine.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "round_robin_gradients": False,  # keeps the flat order that shards.py reads
        "overlap_comm": False,  # has changed results before; its gain is not proven here
    }
    if engine.zero_stage in (1, 2) and not engine.offload_optimizer:
        derived["zero_optimization"]["compute_grad_norm"] = False  # gradients.py has it
    if engine.offload_optimizer:
        derived["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        derived["zero_force_ds_cpu_optimizer"] = False
    return derived


def teacher_config(config: RunConfig, plan: RunPlan) -> dict[str, Any]:
    """The dictionary for the stage 3 teacher, an engine without optimizer."""
    derived = _shared(config, plan)
    derived["gradient_accumulation_steps"] = 1
    derived["zero_optimization"]["stage"] = 3
    return derived


def _shared(config: RunConfig, plan: RunPlan) -> dict[str, Any]:
    engine = config.engine
    # F.linear is replaced process-wide unless this is false, and the replacement rounds twice in
    # bf16; false keeps gathered weights alive for backward unless every block is checkpointed.
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        # The host would wait for the device to look for bad gradients; gradients.py does, on it.
        "bf16": {"enabled": engine.precision == "bf16", "check_grad_overflow": False},
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # they wait for the device twice a step
        "zero_optimization": {
            "memory_efficient_linear": False,
            "reduce_bucket_size": engine.bucket_elements,
            "allgather_bucket_size": engine.bucket_elements,
            "sub_group_size": 10**12,  # one sub-group an optimizer group, as at stages 1 and 2
            # 0: a gathered copy that outlives the step would hide updates written to the shards.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": engine.live_elements,
            "stage3_max_reuse_distance": engine.live_elements,
            "stage3_prefetch_bucket_size": engine.live_elements // 2,
            "stage3_gather_16bit_weights_on_model_save": False,
            "zero_hpz_partition_size": engine.hpz_ranks,
        },
    }
