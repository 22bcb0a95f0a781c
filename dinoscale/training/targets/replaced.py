"""Images that cannot be read while targets are computed, each replaced by another one.

They count as they do in the training of which these are the steps. A record of a shard has those of
its steps, each image once, so that the list does not depend on interruptions.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dinoscale.config import RunConfig
from dinoscale.config.resolve import RunPlan
from dinoscale.data.sources.bad_samples import BadSample, BadSampleLog
from dinoscale.errors import UnavailableError
from dinoscale.runtime import distributed
from dinoscale.training.due import due_after

KEY = "unreadable"  # of records and the manifest
Entry = dict[str, Any]  # JSON: number, path, error, times


class Replaced:
    """Counts them over all ranks."""

    def __init__(self, config: RunConfig, plan: RunPlan, folder: Path) -> None:
        """Count from now.

        Args:
            config: of the run.
            plan: of it.
            folder: of the targets, which gets `bad_samples.jsonl`.
        """
        self._config, self._plan = config, plan
        self._log = BadSampleLog(folder / "bad_samples.jsonl", writes=distributed.rank() == 0)
        self._pending: list[BadSample] = []  # of this rank, which the others do not know
        self._of_shard: list[BadSample] = []
        self._steps = 0

    def add(self, samples: Iterable[BadSample]) -> None:
        """Note those of a micro-batch."""
        self._pending += samples

    def step_done(self, done: int, *, ends_shard: bool) -> None:
        """Count those of all ranks when a training would, and where a shard ends; collective.

        Args:
            done: steps of the run up to here.
            ends_shard: whether a record is to be written.

        Raises:
            DataError: on every rank, if there are more than `data.max_bad_fraction`.
            UnavailableError: on every rank, if one may be readable again when students are trained,
                who would take it itself.
        """
        self._steps += 1
        if not ends_shard and not due_after(done, self._config, self._plan).log:
            return
        for of_rank in distributed.gather_objects(self._pending):
            self._log.add(of_rank)
            self._of_shard += of_rank
        self._pending = []
        for bad in self._of_shard:
            if bad.unavailable:
                raise UnavailableError(
                    f"{bad.path}: {bad.error}. The image may be intact: make it readable first, "
                    "then start again; finished shards are kept"
                )
        self._log.check(
            max_fraction=self._config.data.max_bad_fraction,
            seen=self._steps * self._plan.batch_size,
            num_images=self._plan.num_images,
        )

    def of_shard(self) -> list[Entry]:
        """Those of the shard that has ended, the same on every rank."""
        found, self._of_shard = self._of_shard, []
        return _each_once(
            {"number": bad.sample_id, "path": bad.path, "error": bad.error, "times": 1}
            for bad in sorted(found, key=lambda bad: (bad.sample_id, bad.repeat))
        )


def of_records(records: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """Those of all shards."""
    return _each_once(entry for record in records for entry in record[KEY])


def warning(entries: list[Entry], manifest: Path) -> str:
    """What is to be known of them before students are trained; there are some."""
    times = sum(entry["times"] for entry in entries)
    first = entries[0]
    return (
        f"{len(entries)} unreadable images were replaced by others, {times} times in all; the "
        f"first: {first['path']}: {first['error']}. All are listed in {manifest}. Leave them as "
        "they are until all students are trained, or repair them, remove the folder and start "
        "again"
    )


def _each_once(entries: Iterable[Entry]) -> list[Entry]:
    """One entry for each image, by its number."""
    found: dict[int, Entry] = {}
    for entry in entries:
        known = found.setdefault(entry["number"], {**entry, "times": 0})
        known["times"] += entry["times"]
    return [found[number] for number in sorted(found)]
