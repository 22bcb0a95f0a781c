"""What the manifest of a folder of stored targets has to say, checked before anything relies on it.

Nothing else reads it unchecked: a folder may have been copied in part, or its manifest edited.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoscale.training.targets.replaced import KEY as UNREADABLE
from dinoscale.training.targets.settings import FEATURES, HEADS


def require_whole(manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest that says too little, or of which shards do not make up the steps.

    Args:
        manifest: as it was loaded, of our format.

    Raises:
        LookupError, TypeError, AttributeError: an entry is missing or of another kind.
        ValueError: an entry says what no command of ours writes.
    """
    settings, teacher = manifest["settings"], manifest["teacher"]
    _require(isinstance(settings["run"]["data"], dict), "settings.run.data")
    _require(isinstance(teacher["identity"], str), "teacher.identity")
    _require(teacher["licence"] is None or isinstance(teacher["licence"], str), "teacher.licence")
    outputs = settings["outputs"]
    _require(outputs["of"] in (HEADS, FEATURES), "settings.outputs.of")
    _require(isinstance(outputs["patches"], bool), "settings.outputs.patches")
    _require("width" in outputs, "settings.outputs.width")
    if outputs["of"] == HEADS:
        _require_file(manifest["prototypes"], "prototypes")
    _require_unreadable(manifest[UNREADABLE], UNREADABLE)
    _require_shards(manifest["shards"], settings)


def _require_shards(shards: list[Any], settings: Mapping[str, Any]) -> None:
    """Each step once, and of each its slots."""
    steps = _count(settings["steps"], "settings.steps")
    of_shard = _count(settings["shard_steps"], "settings.shard_steps")
    of_slot = _count(settings["train"]["micro_batch_size"], "settings.train.micro_batch_size")
    images = _count(settings["run"]["train"]["batch_size"], "settings.run.train.batch_size")
    _require(images % of_slot == 0, "settings.train.micro_batch_size")
    slots = {str(slot) for slot in range(images // of_slot)}
    firsts = range(0, steps, of_shard)
    _require(len(shards) == len(firsts), "the number of shards")
    for shard, first in zip(shards, firsts, strict=True):
        stop = min(first + of_shard, steps)
        name = f"the shard of the steps {first}..{stop - 1}"
        _require((shard["first"], shard["stop"]) == (first, stop), name)
        _require(shard["arrays"].keys() == slots, f"the slots of {name}")
        for slot, entry in shard["arrays"].items():
            _require_file(entry, f"slot {slot} of {name}")
        _require_unreadable(shard[UNREADABLE], f"{UNREADABLE} of {name}")


def _require_unreadable(entries: list[Any], name: str) -> None:
    """Each names an image."""
    for entry in entries:
        _require(isinstance(entry["number"], int) and entry["number"] >= 0, name)
        _require(isinstance(entry["path"], str) and isinstance(entry["error"], str), name)


def _require_file(entry: Mapping[str, Any], name: str) -> None:
    """Its file lies in the folder itself."""
    file = entry["file"]
    _require(isinstance(file, str) and "\0" not in file, f"the file of {name}")
    if Path(file).name != file or file == "..":
        raise ValueError(f"{file!r}, the file of {name}, is not in the folder")
    _require(isinstance(entry["bytes"], int), f"the bytes of {name}")
    _require(isinstance(entry["sha256"], str), f"the sha256 of {name}")


def _count(value: Any, name: str) -> int:
    _require(isinstance(value, int) and value > 0, name)
    return int(value)


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise ValueError(f"{name} cannot be right")
