"""A folder of stored targets, and whether it is one of a run's."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoscale.config import RunConfig
from dinoscale.config.resolve import RunPlan
from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.shards.stream import StreamSource
from dinoscale.data.sources.source import Source
from dinoscale.errors import ConfigError, DataError, UnavailableError
from dinoscale.evaluate.embedding.folder import MANIFEST, said
from dinoscale.runtime import distributed
from dinoscale.runtime.opening import on_first_rank
from dinoscale.runtime.retry import RetryBudget, is_permanent
from dinoscale.training.targets.manifest import require_whole
from dinoscale.training.targets.replaced import KEY as UNREADABLE
from dinoscale.training.targets.replaced import Entry
from dinoscale.training.targets.settings import (
    HEADS,
    changed_settings,
    deciding_settings,
    known_settings,
    learned_of,
    learns_patches,
)
from dinoscale.training.targets.stripes import FORMAT, stripe_names

KEY = "distill.targets"
ANEW = "compute them with `dinoscale embed --targets`"
AGAIN = "start the `dinoscale embed --targets` that wrote it again"


@dataclass(frozen=True)
class TargetFolder:
    """A folder of `dinoscale embed --targets` that fits a run.

    Attributes:
        path: of the folder.
        manifest: what it says of itself.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def teacher(self) -> str:
        """Digest of the weights of the teacher whose outputs they are."""
        return str(self.manifest["teacher"]["identity"])

    def stripe(self, step: int, slot: int) -> tuple[int, dict[str, Any]]:
        """The shard of a step, and the entry of its file for a slot."""
        shard = step // int(self.manifest["settings"]["shard_steps"])
        entry: dict[str, Any] = self.manifest["shards"][shard]["arrays"][str(slot)]
        return shard, entry

    def unreadable(self, step: int) -> dict[int, Entry]:
        """The images that others replaced in the shard of a step, by their numbers."""
        shard, _ = self.stripe(step, 0)
        return {entry["number"]: entry for entry in self.manifest["shards"][shard][UNREADABLE]}


def open_targets(
    config: RunConfig,
    plan: RunPlan,
    source: Source,
    images: str,
    heartbeat: Callable[[], None] = lambda: None,
) -> TargetFolder | None:
    """Open `distill.targets`, the same on every rank; None without them. Collective.

    Args:
        config: of the run.
        plan: of the run.
        source: its images.
        images: identity of them, on rank 0.
        heartbeat: called regularly meanwhile.

    Raises:
        ConfigError: on every rank, if they are of other settings, or of fewer steps.
        DataError: on every rank, if the folder is unfinished, lacks a file, or its manifest is not
            as it was written; or an image can be read now that could not when they were stored.
        UnavailableError: on every rank, if it cannot be read now.
    """
    if config.distill.targets is None:
        return None
    opened = on_first_rank(lambda beat: _folder(config, plan, source, images, beat), heartbeat)
    return distributed.broadcast_object(opened)


def _folder(
    config: RunConfig,
    plan: RunPlan,
    source: Source,
    images: str,
    heartbeat: Callable[[], None],
) -> TargetFolder:
    disk = RetryBudget()
    path, manifest = _opened(config, disk)
    settings = manifest["settings"]
    _require_run(path, settings["run"], deciding_settings(config, plan, images))
    if settings["steps"] < plan.stop_step:
        raise ConfigError(
            f"{KEY}: {path} holds the targets of {settings['steps']} steps, and this run takes "
            f"{plan.stop_step} (train.epochs, train.stop_after_steps); train for fewer, or {ANEW}"
        )
    if settings["outputs"]["of"] == HEADS:
        _require_size(path, manifest["prototypes"], disk)
    for record in manifest["shards"]:
        if record["first"] < plan.stop_step:
            for entry in record["arrays"].values():
                _require_size(path, entry, disk)
        heartbeat()
    if not isinstance(source, StreamSource):  # which would be read up to each of them
        _require_unreadable(path, manifest, source, plan.stop_step, heartbeat)
    return TargetFolder(path, manifest)


def require_settings(config: RunConfig) -> None:
    """Refuse `distill.targets` that cannot be those of a run, whatever its images are.

    Args:
        config: of the run, which has some.

    Raises:
        ConfigError, DataError, UnavailableError: as `open_targets` raises them.
    """
    path, manifest = _opened(config, RetryBudget())
    then, own = manifest["settings"]["run"], known_settings(config)
    _require_run(path, then, {**then, **own, "data": {**then["data"], **own["data"]}})


def _opened(config: RunConfig, disk: RetryBudget) -> tuple[Path, dict[str, Any]]:
    """A folder of the outputs that a run learns, and its manifest."""
    assert config.distill.targets is not None
    path = Path(config.distill.targets)
    manifest = _manifest(path, disk)
    _require_outputs(path, manifest["settings"]["outputs"], config)
    return path, manifest


def _manifest(path: Path, disk: RetryBudget) -> dict[str, Any]:
    """That of a folder, checked.

    Raises:
        DataError: there is none, or it is not as it was written.
        UnavailableError: it cannot be read now.
    """
    file = path / MANIFEST
    try:
        data = disk.read(file.read_bytes, file)
    except FileNotFoundError:
        why = "is not finished: start the command that writes it again" if path.is_dir() else ""
        text = why or f"is not there; {ANEW}"
        raise DataError(f"{KEY}: {path} has no {MANIFEST} and {text}") from None
    except OSError as error:
        raise read_error(file, error) from None
    except ValueError as error:  # no name of a file
        raise DataError(f"{KEY}: {str(path)!r}: {error}; {ANEW}") from None
    try:
        manifest: dict[str, Any] = json.loads(data)
        if manifest["format"] != FORMAT:
            raise DataError(f"{KEY}: {path} holds something else than targets ({FORMAT!r}); {ANEW}")
        require_whole(manifest)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        text = f"is not as it was written ({type(error).__name__}: {error})"
        raise DataError(f"{KEY}: {file} {text}; copy the folder again, or {ANEW}") from None
    return manifest


def _require_outputs(path: Path, outputs: dict[str, Any], config: RunConfig) -> None:
    """Refuse what a run does not learn."""
    wanted = learned_of(config)
    if outputs["of"] != wanted:
        key = "distill.class_feature_weight"
        remedy = f"set {key} above 0.0" if wanted == HEADS else "set the weights of features to 0.0"
        raise ConfigError(
            f"{KEY}: {path} holds the outputs of {outputs['of']}, and this run learns those of "
            f"{wanted} ({key}); {remedy}, or {ANEW}"
        )
    if learns_patches(config) and not outputs["patches"]:
        key = "ibot.loss_weight" if wanted == HEADS else "distill.patch_feature_weight"
        raise ConfigError(
            f"{KEY}: {path} holds outputs of class tokens alone, and {key} is above 0.0; set it "
            f"to 0.0, or {ANEW}"
        )
    width = config.of_teacher.model.width
    if wanted != HEADS and outputs["width"] != width:
        raise ConfigError(
            f"{KEY}: {path} holds features of width {outputs['width']}, and distill.model says "
            f"{width}; give the model whose features they are"
        )


def _require_run(path: Path, then: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse targets of another run, naming what differs."""
    if changed := changed_settings(then, own):
        raise ConfigError(
            f"{KEY}: {path} holds the targets of another run: {said(changed, then, own)}. "
            f"Restore the old values, or {ANEW}"
        )


def _require_size(folder: Path, entry: dict[str, Any], disk: RetryBudget) -> None:
    file = folder / entry["file"]
    try:
        size = disk.read(file.stat, file).st_size
    except OSError as error:
        raise read_error(file, error) from None
    if size != entry["bytes"]:
        raise DataError(
            f"{KEY}: {file} is damaged: it has {size} bytes, and {MANIFEST} says "
            f"{entry['bytes']}; remove it, and {AGAIN}"
        )


def _require_unreadable(
    path: Path,
    manifest: dict[str, Any],
    source: Source,
    stop_step: int,
    heartbeat: Callable[[], None],
) -> None:
    """Refuse targets of another image where the image itself can be read now."""
    shards: dict[int, list[int]] = {}
    for shard, record in enumerate(manifest["shards"]):
        if record["first"] < stop_step:
            for entry in record[UNREADABLE]:
                shards.setdefault(entry["number"], []).append(shard)
    for entry in manifest[UNREADABLE]:
        heartbeat()
        of_image = shards.get(entry["number"], [])
        if of_image and _is_readable(source, entry["number"]):
            more = len(of_image) - 1
            others = f", those of {more} more shards that list it in {MANIFEST}," if more else ""
            raise DataError(f"{KEY}: {restored(path, entry, of_image[0], others)}")


def restored(folder: Path, entry: Entry, shard: int, others: str = "") -> str:
    """What is said of an image that another one replaced in a shard, and can be read now."""
    return (
        f"{entry['path']} could not be read when the targets were stored ({entry['error']}), and "
        f"can be read now; remove {folder / stripe_names(shard)}{others} and {AGAIN}"
    )


def _is_readable(source: Source, number: int) -> bool:
    try:
        source.picture(number).pixels()
    except BadSampleError:
        return False
    return True


def read_error(file: Path, error: OSError) -> DataError:
    """Of a file that cannot be read, after retries; what to do depends on why."""
    why = error.strerror or error
    if isinstance(error, FileNotFoundError):
        return DataError(f"{KEY}: {file} is missing ({why}); {AGAIN}")
    if is_permanent(error):
        return DataError(f"{KEY}: {file} cannot be read ({why}); make it readable")
    return UnavailableError(
        f"{KEY}: {file} cannot be read now ({why}). It may be intact: repair the file system, "
        "then start again"
    )
