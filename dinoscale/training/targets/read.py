"""Stored outputs of a frozen teacher, read ahead of the steps that learn them.

Whether they are those of a run is asked three times: of the settings, before it starts; of the
bytes of a file, by its checksum, when the first of its steps comes near; and of each micro-batch,
by the numbers of its images, the pixels of their global crops and the chosen patches.
"""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from dinoscale.config import RunConfig
from dinoscale.config.resolve import RunPlan
from dinoscale.convert.fitted_heads import fitted_teacher_heads
from dinoscale.data.loader import Batch
from dinoscale.data.transfer import to_device
from dinoscale.engine.build import InitialWeights
from dinoscale.engine.frozen.stored import LAST_LAYER
from dinoscale.engine.micro_batch import StoredTargets
from dinoscale.errors import DataError, UnavailableError
from dinoscale.evaluate.embedding.folder import MANIFEST
from dinoscale.runtime.launcher_env import Process
from dinoscale.runtime.opening import on_first_rank
from dinoscale.runtime.retry import RetryBudget
from dinoscale.training.targets.folder import (
    AGAIN,
    ANEW,
    KEY,
    TargetFolder,
    read_error,
    restored,
)
from dinoscale.training.targets.settings import crop_sums, learns_patches
from dinoscale.training.targets.stripes import Stored, joined, stored_of

_DRAWN = "another version of dinoscale or of a decoder drew them"
_AHEAD = 2  # steps that are read before they are asked for
_REMOVED = f"remove that folder and {ANEW}"  # which is left as it is while it is whole


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
    given: dict[str, dict[str, Tensor]] = {}
    for name, value in _tensors(path, entry["sha256"]).items():
        head, _, key = name.partition(".")
        given.setdefault(head, {})[key] = value
    layer = LAST_LAYER.removeprefix(".")
    heads = fitted_teacher_heads(
        config, given, path=str(folder.path), key=KEY, remedy=ANEW, layer=layer
    )
    return begun({}, *heads)


def _tensors(path: Path, digest: str) -> dict[str, Tensor]:
    """Those of a file, of the very bytes that its checksum is of."""
    try:
        data = RetryBudget().read(path.read_bytes, path)
    except OSError as error:
        raise read_error(path, error) from None
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise DataError(
            f"{KEY}: {path} is damaged: its SHA-256 is {found[:12]}, and {MANIFEST} says "
            f"{digest[:12]}; remove it, and {AGAIN}"
        )
    return load(data)


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
        self._open: dict[tuple[int, str], dict[str, Tensor]] = {}  # by shard and file
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
            UnavailableError: a file, or an image, cannot be read now.
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
                why, kind = f"{_DRAWN}; {_REMOVED}", DataError
                if name == "crops":
                    changed = batch.sample_ids[there != here].tolist()
                    why, kind = self._why_crops_differ(step, batch, changed)
                raise kind(
                    f"{KEY}: the {name} of step {step} are others than those of "
                    f"{self._folder.path}, though the settings agree: {why}"
                )

    def _why_crops_differ(
        self, step: int, batch: Batch, changed: list[int]
    ) -> tuple[str, type[DataError]]:
        """What may have changed the crops of some images, what to do, and the kind of error."""
        then, now = self._folder.unreadable(step), {bad.sample_id for bad in batch.bad}
        for bad in batch.bad:
            if bad.sample_id not in then:
                why = (
                    f"{bad.path} cannot be read now ({bad.error}), and another image takes its "
                    "place; make it readable and start again"
                )
                return why, UnavailableError if bad.unavailable else DataError
        for number in changed:
            if number in then and number not in now:
                shard, _ = self._folder.stripe(step, 0)
                return restored(self._folder.path, then[number], shard), DataError
        why = (
            f"files of data.train have other contents, or {_DRAWN}; restore what has changed and "
            f"start again, or {_REMOVED}"
        )
        return why, DataError

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
            self._open[shard, entry["file"]] = _tensors(path, entry["sha256"])
        begin = slot * self._of_slot
        if self._slot[0] != (step, slot):  # smaller micro-batches take several parts of it
            tensors = self._open[shard, entry["file"]]
            stored = stored_of(tensors, step, patches=self._patches)
            self._slot = (step, slot), stored
        _, stored = self._slot
        return stored.part(max(first - begin, 0), min(stop - begin, self._of_slot))
