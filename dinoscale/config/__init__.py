"""The configuration of a run: its schema, how it is loaded, and its plan for a number of ranks."""

from dinoscale.config.load import (
    describe_presets,
    dump_config,
    list_presets,
    load_config,
    parse_config,
    phases_of,
    text_override,
)
from dinoscale.config.resolve import (
    BatchSplit,
    ParameterCounts,
    RunPlan,
    comments_on,
    count_parameters,
    describe,
    least_micro_batch,
    micro_batch_sizes,
    micro_batch_unit,
    require_groups_within_nodes,
    resolve,
    split_batch,
    with_micro_batch,
    without_auto,
)
from dinoscale.config.schema import DinoConfig, RunConfig
from dinoscale.config.sections.backbones import ModelConfig
from dinoscale.config.sections.crops import AugmentConfig, CropsConfig
from dinoscale.config.sections.data import DataConfig
from dinoscale.config.sections.engine import EngineConfig
from dinoscale.config.sections.heads import HeadConfig
from dinoscale.config.sections.monitoring import CheckpointConfig, EvalConfig, LogConfig
from dinoscale.config.sections.training import OptimConfig, TrainConfig

__all__ = [
    "AugmentConfig",
    "BatchSplit",
    "CheckpointConfig",
    "CropsConfig",
    "DataConfig",
    "DinoConfig",
    "EngineConfig",
    "EvalConfig",
    "HeadConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParameterCounts",
    "RunConfig",
    "RunPlan",
    "TrainConfig",
    "comments_on",
    "count_parameters",
    "describe",
    "describe_presets",
    "dump_config",
    "least_micro_batch",
    "list_presets",
    "load_config",
    "micro_batch_sizes",
    "micro_batch_unit",
    "parse_config",
    "phases_of",
    "require_groups_within_nodes",
    "resolve",
    "split_batch",
    "text_override",
    "with_micro_batch",
    "without_auto",
]
