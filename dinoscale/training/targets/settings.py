"""What decides the stored outputs of a frozen teacher, beside its weights.

They are those of the crops of each step, so everything that images, crops and chosen patches are
drawn from. Shape letter: B images.
"""

import json
import zlib
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dinoscale.config import RunConfig
from dinoscale.config.resolve import RunPlan
from dinoscale.data.augmentation.crop_params import Params
from dinoscale.data.augmentation.multi_crop import NUM_GLOBAL
from dinoscale.errors import ConfigError
from dinoscale.runtime.fingerprint import differences
from dinoscale.training.resume import order_of_stream

HEADS, FEATURES = "heads", "features"  # what is stored
_OF_IMAGES = ("subset_size", "color_ops_on", "channels", "max_pixel_value", "mean", "std")
_OF_MASKS = ("mask_prob", "mask_ratio", "mask_rule", "mask_group")
# Of the teacher's network, which only runs: what acts in training alone.
_OF_TRAINING = {"drop_path_rate", "drop_path_uniform", "drop_path_mode", "local_norm"}
_ROPE_OF_TRAINING = {"shift", "jitter", "rescale"}
_OF_PATCHES = ("ibot", "model")  # sections that matter where outputs of patches do


def learned_of(config: RunConfig) -> str:
    """Which outputs of its frozen teacher a run learns."""
    return HEADS if config.distill.by_heads else FEATURES


def learns_patches(config: RunConfig) -> bool:
    """Whether they are of patches, too."""
    if config.distill.by_heads:
        return config.ibot.loss_weight > 0 and config.model.effective_patch_size is not None
    return config.distill.patch_feature_weight > 0


def deciding_settings(config: RunConfig, plan: RunPlan, images: str) -> dict[str, Any]:
    """What decides them, named as in a configuration, in the form that JSON gives back.

    Args:
        config: of a run.
        plan: of it, for any number of ranks.
        images: identity of its images.
    """
    settings = known_settings(config)
    settings["data"]["train"] = images
    settings["images drawn from each source an epoch"] = plan.quotas
    settings |= order_of_stream(config.model_dump(mode="json"), asdict(plan))
    loaded: dict[str, Any] = json.loads(json.dumps(settings))
    return loaded


def known_settings(config: RunConfig) -> dict[str, Any]:
    """Those of them that are known before the images are opened."""
    run = config.model_dump(mode="json")
    settings: dict[str, Any] = {
        "seed": config.seed,
        "data": {key: run["data"][key] for key in _OF_IMAGES},
        "crops": run["crops"],
        "augment": run["augment"],
        "train": {"batch_size": config.train.batch_size},
        "engine": {"precision": config.engine.precision},
    }
    if learns_patches(config):
        settings["model"] = {"patch_size": config.model.effective_patch_size}
        if config.distill.by_heads:
            settings["ibot"] = {key: run["ibot"][key] for key in _OF_MASKS}
    return settings


def teacher_settings(config: RunConfig) -> dict[str, Any]:
    """What decides how the teacher's weights are used, of a configuration; students need not agree.

    Args:
        config: of a run with a frozen teacher.
    """
    teacher = config.of_teacher
    left_out: dict[str, Any] = {**dict.fromkeys(_OF_TRAINING, True), "rope": _ROPE_OF_TRAINING}
    distill = {"model": teacher.model.model_dump(mode="json", exclude=left_out)}
    if config.distill.by_heads:
        distill |= teacher.model_dump(mode="json", include={"head", "patch_head"})
    return {"distill": distill, "engine": {"compile": config.engine.compile}}


def changed_settings(stored: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """Names of those that differ, of which a run without patches has fewer."""
    unused = [name for name in _OF_PATCHES if name in stored and name not in own]
    return differences({key: stored[key] for key in stored.keys() - unused}, own)


def crop_sums(global_crops: Tensor, params: Params) -> Tensor:
    """A CRC-32 of the global crops of each image and of what was drawn for them, (B,) int64.

    The pixels are those before colours are augmented on the device. An image of other contents, or
    in place of an unreadable one, has another.

    Args:
        global_crops: uint8 (2, B, H, H, C).
        params: records of all crops (2 + n, B).
    """
    sums = []
    for image in range(params.shape[1]):
        found = zlib.crc32(params[:NUM_GLOBAL, image].tobytes())
        for view in global_crops[:, image]:
            found = zlib.crc32(view.contiguous().numpy(), found)
        sums.append(found)
    return torch.tensor(sums, dtype=torch.int64)


def require_storable(config: RunConfig) -> None:
    """Refuse to store the outputs of a teacher for a run that cannot learn from stored ones.

    Raises:
        ConfigError: there is no frozen teacher, the run has several phases, or it has settings that
            stored outputs do not go with.
    """
    if config.phases:
        names = ", ".join(phase.name for phase in config.phases)
        raise ConfigError(f"phases: targets are those of one of them; add phase=NAME, of {names}")
    if config.distill.teacher is None:
        raise ConfigError("distill.teacher: there is nothing to store; give a frozen teacher")
    stored = config.distill.model_copy(update={"teacher": None, "targets": "OUT"})
    mistakes = stored.stored_mistakes(
        gram=config.gram.loss_weight > 0,
        micro_batch=config.train.micro_batch_size,
        rollbacks=config.train.max_rollbacks,
    )
    if mistakes:
        raise ConfigError("\n".join(mistakes))
