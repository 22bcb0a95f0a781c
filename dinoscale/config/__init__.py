"""Configuration of a run: what it may say, how it is read, and what it means for N ranks."""

from dinoscale.config.load import dump_config, list_presets, load_config, parse_config
from dinoscale.config.schema import (
    AugmentConfig,
    CheckpointConfig,
    CropsConfig,
    DataConfig,
    DinoConfig,
    EngineConfig,
    EvalConfig,
    HeadConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "AugmentConfig",
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
    "RunConfig",
    "TrainConfig",
    "dump_config",
    "list_presets",
    "load_config",
    "parse_config",
]
