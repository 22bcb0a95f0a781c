"""Stored outputs of a frozen teacher, read ahead of the steps that learn them.

Whether they are those of a run is asked three times: of the settings, before it starts; of the
bytes of a file, by its checksum, when the first of its steps comes near; and of each micro-batch,
by the numbers of its images, the pixels of their global crops and the chosen patches.
"""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dinoscale.config import RunConfig
from dinoscale.config.resolve import RunPlan
from dinoscale.convert.fitted_heads import fitted_teacher_heads
from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.loader import Batch
from dinoscale.data.shards.stream import StreamSource
from dinoscale.data.sources.source import Source
from dinoscale.data.transfer import to_device
from dinoscale.engine.build import InitialWeights
from dinoscale.engine.frozen.stored import LAST_LAYER
from dinoscale.engine.micro_batch import StoredTargets
from dinoscale.errors import ConfigError, DataError, UnavailableError
from dinoscale.evaluate.embedding.folder import MANIFEST, said
from dinoscale.runtime import distributed
from dinoscale.runtime.launcher_env import Process
from dinoscale.runtime.opening import on_first_rank
from dinoscale.runtime.outputs import sha256
from dinoscale.runtime.retry import RetryBudget, is_permanent
from dinoscale.training.targets.manifest import require_whole
from dinoscale.training.targets.replaced import KEY as UNREADABLE
from dinoscale.training.targets.replaced import Entry
from dinoscale.training.targets.settings import (
    HEADS,
    changed_settings,
    crop_sums,
    deciding_settings,
    learned_of,
    learns_patches,
)
from dinoscale.training.targets.stripes import FORMAT, Stored, StripeFile, joined, stripe_names

T = TypeVar("T")

KEY = "distill.targets"
_DRAWN = "another version of dinoscale or of a decoder drew them"
_AHEAD = 2  # steps that are read before they are asked for
_ANEW = "compute them with `dinoscale embed --targets`"
_AGAIN = "start the `dinoscale embed --targets` that wrote it again"
_REMOVED = f"remove that folder and {_ANEW}"  # which is left as it is while it is whole


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
    assert config.distill.targets is not None
    path, disk = Path(config.distill.targets), RetryBudget()
    manifest = _manifest(path, disk)
    _require_fitting(path, manifest, config, plan, images)
    if manifest["settings"]["outputs"]["of"] == HEADS:
        _require_size(path, manifest["prototypes"], disk)
    for record in manifest["shards"]:
        if record["first"] < plan.stop_step:
            for entry in record["arrays"].values():
                _require_size(path, entry, disk)
        heartbeat()
    if not isinstance(source, StreamSource):  # which would be read up to each of them
        _require_unreadable(path, manifest, source, plan.stop_step, heartbeat)
    return TargetFolder(path, manifest)


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
        text = why or f"is not there; {_ANEW}"
        raise DataError(f"{KEY}: {path} has no {MANIFEST} and {text}") from None
    except OSError as error:
        raise _read_error(file, error) from None
    try:
        manifest: dict[str, Any] = json.loads(data)
        if manifest["format"] != FORMAT:
            raise DataError(
                f"{KEY}: {path} holds something else than targets ({FORMAT!r}); {_ANEW}"
            )
        require_whole(manifest)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        text = f"is not as it was written ({type(error).__name__}: {error})"
        raise DataError(f"{KEY}: {file} {text}; copy the folder again, or {_ANEW}") from None
    return manifest


def _require_fitting(
    path: Path, manifest: dict[str, Any], config: RunConfig, plan: RunPlan, images: str
) -> None:
    """Refuse targets of another run, naming what differs."""
    settings = manifest["settings"]
    outputs, wanted = settings["outputs"], learned_of(config)
    if outputs["of"] != wanted:
        key = "distill.class_feature_weight"
        remedy = f"set {key} above 0.0" if wanted == HEADS else "set the weights of features to 0.0"
        raise ConfigError(
            f"{KEY}: {path} holds the outputs of {outputs['of']}, and this run learns those of "
            f"{wanted} ({key}); {remedy}, or {_ANEW}"
        )
    if learns_patches(config) and not outputs["patches"]:
        key = "ibot.loss_weight" if wanted == HEADS else "distill.patch_feature_weight"
        raise ConfigError(
            f"{KEY}: {path} holds outputs of class tokens alone, and {key} is above 0.0; set it "
            f"to 0.0, or {_ANEW}"
        )
    width = config.of_teacher.model.width
    if wanted != HEADS and outputs["width"] != width:
        raise ConfigError(
            f"{KEY}: {path} holds features of width {outputs['width']}, and distill.model says "
            f"{width}; give the model whose features they are"
        )
    own = deciding_settings(config, plan, images)
    if changed := changed_settings(settings["run"], own):
        raise ConfigError(
            f"{KEY}: {path} holds the targets of another run: "
            f"{said(changed, settings['run'], own)}. Restore the old values, or {_ANEW}"
        )
    if settings["steps"] < plan.stop_step:
        raise ConfigError(
            f"{KEY}: {path} holds the targets of {settings['steps']} steps, and this run takes "
            f"{plan.stop_step} (train.epochs, train.stop_after_steps); train for fewer, or {_ANEW}"
        )


def _require_size(folder: Path, entry: dict[str, Any], disk: RetryBudget) -> None:
    file = folder / entry["file"]
    try:
        size = disk.read(file.stat, file).st_size
    except OSError as error:
        raise _read_error(file, error) from None
    if size != entry["bytes"]:
        raise DataError(
            f"{KEY}: {file} is damaged: it has {size} bytes, and {MANIFEST} says "
            f"{entry['bytes']}; remove it, and {_AGAIN}"
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
            raise DataError(f"{KEY}: {_restored(path, entry, of_image[0], others)}")


def _restored(folder: Path, entry: Entry, shard: int, others: str = "") -> str:
    """Of an image that another one replaced in a shard."""
    return (
        f"{entry['path']} could not be read when the targets were stored ({entry['error']}), and "
        f"can be read now; remove {folder / stripe_names(shard)}{others} and {_AGAIN}"
    )


def _is_readable(source: Source, number: int) -> bool:
    try:
        source.picture(number).pixels()
    except BadSampleError:
        return False
    return True


def _read_error(file: Path, error: OSError) -> DataError:
    """Of a file that cannot be read, after retries; what to do depends on why."""
    why = error.strerror or error
    if isinstance(error, FileNotFoundError):
        return DataError(f"{KEY}: {file} is missing ({why}); {_AGAIN}")
    if is_permanent(error):
        return DataError(f"{KEY}: {file} cannot be read ({why}); make it readable")
    return UnavailableError(
        f"{KEY}: {file} cannot be read now ({why}). It may be intact: repair the file system, "
        "then start again"
    )


def read_prototypes(config: RunConfig, folder: TargetFolder) -> InitialWeights | None:
    """The last layers of the teacher's heads, and whose they are, on rank 0; collective.

    Raises:
        CheckpointError: on every rank, if their norms are others than `distill` says.
        ConfigError: on every rank, if they are not those of the heads of `distill`.
        DataError: on every rank, if their file is damaged.
    """
    return on_first_rank(lambda _: _prototypes(config, folder))


def _prototypes(config: RunConfig, folder: TargetFolder) -> InitialWeights:
    teacher = folder.manifest["teacher"]
    begun = partial(InitialWeights, licence=teacher["licence"], identity=teacher["identity"])
    if not config.distill.by_heads:
        return begun({})
    entry = folder.manifest["prototypes"]
    path = folder.path / entry["file"]
    _require_sum(path, entry["sha256"])
    given: dict[str, dict[str, Tensor]] = {}
    for name, value in _opened(path, load_file).items():
        head, _, key = name.partition(".")
        given.setdefault(head, {})[key] = value
    layer = LAST_LAYER.removeprefix(".")
    heads = fitted_teacher_heads(
        config, given, path=str(folder.path), key=KEY, remedy=_ANEW, layer=layer
    )
    return begun({}, *heads)


def _require_sum(path: Path, wanted: str) -> None:
    try:
        found = RetryBudget().read(lambda: sha256(path), path)
    except OSError as error:
        raise _read_error(path, error) from None
    if found != wanted:
        raise DataError(
            f"{KEY}: {path} is damaged: its SHA-256 is {found[:12]}, and {MANIFEST} says "
            f"{wanted[:12]}; remove it, and {_AGAIN}"
        )


class TargetReader:
    """Hands out what is stored of a rank's micro-batches; a thread reads some steps ahead."""

    def __init__(
        self, folder: TargetFolder, config: RunConfig, plan: RunPlan, process: Process
    ) -> None:
        """Read nothing yet."""
        self._folder, self._plan, self._process = folder, plan, process
        self._patches = learns_patches(config)
        self._patch_size = config.model.effective_patch_size or 1
        self._of_slot = int(folder.manifest["settings"]["train"]["micro_batch_size"])
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="targets")
        self._steps: dict[int, Future[list[Stored]]] = {}
        self._open: dict[tuple[int, str], StripeFile] = {}  # by shard and name; of the thread
        self._slot: tuple[tuple[int, int], Stored] | tuple[None, None] = None, None  # the last one

    def close(self) -> None:
        """Read no more; what is being read is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def of(self, step: int, index: int, batch: Batch, rows: Tensor | None) -> StoredTargets:
        """What is stored of micro-batch `index` of a step, on the device.

        Args:
            step: zero-based optimizer step.
            index: of the micro-batch.
            batch: its crops.
            rows: its chosen patches, as `Masks.rows` has them, on the CPU; None where all or none
                are learned.

        Raises:
            DataError: a file is damaged, or the crops are others.
        """
        for number in range(step, min(step + 1 + _AHEAD, self._plan.stop_step)):
            if number not in self._steps:
                self._steps[number] = self._thread.submit(self._read, number)
        for number in [number for number in self._steps if number < step]:
            del self._steps[number]
        stored = self._steps[step].result()[index]
        self._require_same(step, stored, batch, rows)
        device = self._process.device
        classes, patches = stored.classes.flatten(0, 1), stored.patches
        if patches is not None and stored.counts is None:
            patches = patches.flatten(0, 1)
        moved = None if patches is None else to_device(patches, device)
        return StoredTargets(to_device(classes, device), moved)

    def _require_same(self, step: int, stored: Stored, batch: Batch, rows: Tensor | None) -> None:
        pairs = {
            "images": (stored.images, batch.sample_ids),
            "crops": (stored.crops, crop_sums(batch.global_crops, batch.params)),
        }
        if rows is not None:
            grid = (batch.global_crops.shape[2] // self._patch_size) ** 2
            of_patches = stored.rows(grid)
            assert of_patches is not None
            pairs["patches"] = of_patches, rows
        for name, (there, here) in pairs.items():
            if not torch.equal(there, here):
                why = f"{_DRAWN}; {_REMOVED}"
                if name == "crops":
                    changed = batch.sample_ids[there != here].tolist()
                    why = self._why_crops_differ(step, batch, changed)
                raise DataError(
                    f"{KEY}: the {name} of step {step} are others than those of "
                    f"{self._folder.path}, though the settings agree: {why}"
                )

    def _why_crops_differ(self, step: int, batch: Batch, changed: list[int]) -> str:
        """What may have changed the crops of some images of a micro-batch, and what to do."""
        then, now = self._folder.unreadable(step), {bad.sample_id for bad in batch.bad}
        for bad in batch.bad:
            if bad.sample_id not in then:
                return (
                    f"{bad.path} cannot be read now ({bad.error}), and another image takes its "
                    "place; make it readable and start again"
                )
        for number in changed:
            if number in then and number not in now:
                shard, _ = self._folder.stripe(step, 0)
                return _restored(self._folder.path, then[number], shard)
        return (
            f"files of data.train have other contents, or {_DRAWN}; restore what has changed and "
            f"start again, or {_REMOVED}"
        )

    def _read(self, step: int) -> list[Stored]:
        """Of this rank's micro-batches of a step; runs in the thread."""
        plan, size = self._plan, self._plan.micro_batch_size
        shard, _ = self._folder.stripe(step, 0)
        for key in [key for key in self._open if key[0] < shard]:
            del self._open[key]
        found = []
        for index in range(plan.accumulation_steps):
            first = (index * plan.world_size + self._process.rank) * size
            slots = range(first // self._of_slot, -(-(first + size) // self._of_slot))
            stored = joined([self._part(step, slot, first, first + size) for slot in slots])
            found.append(stored.pinned() if self._process.device.type == "cuda" else stored)
        return found

    def _part(self, step: int, slot: int, first: int, stop: int) -> Stored:
        """What a slot holds of the images first..stop-1 of a step."""
        shard, entry = self._folder.stripe(step, slot)
        path = self._folder.path / entry["file"]
        if (shard, entry["file"]) not in self._open:
            _require_sum(path, entry["sha256"])
            self._open[shard, entry["file"]] = _opened(path, StripeFile)
        begin = slot * self._of_slot
        if self._slot[0] != (step, slot):  # smaller micro-batches take several parts of it
            stored = self._open[shard, entry["file"]].step(step, patches=self._patches)
            self._slot = (step, slot), stored
        _, stored = self._slot
        return stored.part(max(first - begin, 0), min(stop - begin, self._of_slot))


def _opened(path: Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of a file whose checksum was right."""
    try:
        return RetryBudget().read(lambda: read(path), path)
    except OSError as error:
        raise _read_error(path, error) from None
    except SafetensorError as error:
        raise DataError(
            f"{KEY}: {path} cannot be read ({error}); start again, and if it stays so, remove it, "
            f"and {_AGAIN}"
        ) from None
