"""RunConfig and RunPlan -> the DeepSpeed configuration, with every value that can change numbers.

DeepSpeed's defaults change between releases (gradient clipping went from 0 to 1) and depend on
other values (at stage 3 communication overlaps by default), so every value that affects a number, a
stream or a wait is set here.
"""

from typing import Any

from dinoscale.config.resolve import RunPlan
from dinoscale.config.schema import RunConfig


def student_config(config: RunConfig, plan: RunPlan) -> dict[str, Any]:
    """The configuration that `deepspeed.initialize` takes for the student."""
    engine = config.engine
    derived = _shared(config, plan)
    derived["gradient_accumulation_steps"] = plan.accumulation_steps
    derived["train_batch_size"] = plan.batch_size
    # A single rank sums nothing, yet DeepSpeed would cast its gradients to this type and back.
    alone = plan.world_size == 1
    derived["communication_data_type"] = engine.precision if alone else engine.communication_dtype
    # Float32 helps only where gradients are accumulated or summed over ranks.
    summed = plan.accumulation_steps > 1 or plan.world_size > 1
    if engine.precision == "bf16" and engine.zero_stage >= 2 and summed:
        derived["data_types"]["grad_accum_dtype"] = "fp32"
    zero = derived["zero_optimization"]
    zero["stage"] = engine.zero_stage
    if engine.zero_stage in (1, 2) and not engine.offload_optimizer:
        zero["compute_grad_norm"] = False  # gradients.py computes it
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": True,  # else every copy waits; no effect without a GPU
            "ratio": 1.0,
            "super_offload": False,
        }
        derived["zero_force_ds_cpu_optimizer"] = False
    return derived


def teacher_config(config: RunConfig, plan: RunPlan) -> dict[str, Any]:
    """The configuration of the teacher at stage 3, an engine without optimizer."""
    derived = _shared(config, plan)
    derived["gradient_accumulation_steps"] = 1
    derived["train_batch_size"] = plan.micro_batch_size * plan.world_size
    derived["zero_optimization"]["stage"] = 3
    return derived


def _shared(config: RunConfig, plan: RunPlan) -> dict[str, Any]:
    engine = config.engine
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        # DeepSpeed's overflow check makes the host wait; gradients.py checks on the device.
        "bf16": {
            "enabled": engine.precision == "bf16",
            "check_grad_overflow": False,
            "immediate_grad_update": False,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "data_types": {
            "grad_accum_dtype": None,
            "param_dtype": None,
            "buffer_dtype": None,  # statistics of batch norm stay float32
            "keep_in_fp32_modules": [],
        },
        "gradient_clipping": 0.0,  # gradients.py clips, at every stage
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean",
        "managed_gradient_accumulation": True,
        "disable_allgather": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
        "zero_optimization": {
            # Uses a second stream, which at stage 3 gathers weights without waiting for the kernels
            # that write them: the teacher would be gathered while it is averaged.
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "use_multi_rank_bucket_allreduce": True,
            "allgather_partitions": True,
            "reduce_bucket_size": engine.reduce_bucket_size,
            "allgather_bucket_size": engine.reduce_bucket_size,
            "compute_grad_norm": True,
            "ignore_unused_parameters": True,
            # Keeps the flat order that shards.py reads.
            "round_robin_gradients": False,
            "parameter_alignment": False,
            "sub_group_size": 10**12,  # one sub-group per optimizer group, as at stages 1 and 2
            "offload_param": None,
            "offload_optimizer": None,
            "zenflow": None,
            # True replaces F.linear in the whole process by a version that rounds twice in bf16.
            # False has autograd keep what is gathered; blocks do not (models/block.py).
            "memory_efficient_linear": False,
            # 0: a gathered copy that outlives the step would hide updates written to the shards.
            "stage3_param_persistence_threshold": 0,
            "stage3_model_persistence_threshold": 0,
            "stage3_max_live_parameters": engine.stage3_max_live_parameters,
            "stage3_max_reuse_distance": engine.stage3_max_live_parameters,
            "stage3_prefetch_bucket_size": engine.stage3_max_live_parameters // 2,
            "stage3_module_granularity_threshold": 0,  # student.py chooses the leaf modules
            "stage3_use_all_reduce_for_fetch_params": False,
            "stage3_allgather_sequential": False,
            "stage3_gather_16bit_weights_on_model_save": False,
            "zero_hpz_partition_size": engine.zero_hpz_partition_size,
            "zero_quantized_weights": False,
            "zero_quantized_nontrainable_weights": False,
            "zero_quantized_gradients": False,
        },
    }
