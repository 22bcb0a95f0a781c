"""Results of single images, pairs or videos, kept until the report that needs them is written.

After an interruption, the same command computes only the results that are missing. They lie in the
cache folder as JSON lines, under the fingerprint of the measurement: its input files, options and
code. Rank 0 alone reads and writes, so that any number of ranks may go on.
"""

from __future__ import annotations

import errno
import glob
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from dinoscale.data.cache_folder import cached_file, keep_recent
from dinoscale.evaluate.across_ranks import each_on_a_rank
from dinoscale.runtime import distributed
from dinoscale.runtime.fingerprint import Fingerprint

T = TypeVar("T")
Item = TypeVar("Item")

log = logging.getLogger(__name__)

MOST_BYTES = 2**30  # of all kept results; those of measurements that run were written last
AT_ONCE = 64  # items of each rank between two writes: a minute of TokenCut on a CPU


def _always(_: object, __: object) -> bool:
    return True


@dataclass(frozen=True)
class Form(Generic[T]):
    """How a result is written.

    Attributes:
        encode: makes JSON of it.
        decode: the reverse; KeyError, TypeError, ValueError or AttributeError for something else.
        is_whole: whether the files that belong to a result are as it was found with; takes the
            item and the result.
    """

    encode: Callable[[T], Any]
    decode: Callable[[Any], T]
    is_whole: Callable[[Any, T], bool] = _always


class FinishedItems:
    """The results that earlier starts of a measurement have left; they stay until `forget`.

    Args:
        fingerprint: of the measurement, on rank 0; None keeps nothing. Nor is anything kept of
            generated images, which are measured in no time.
        device: that computes the results; another kind gives other last digits.
        of: which results, where a measurement has several kinds.
    """

    def __init__(self, fingerprint: Fingerprint | None, device: torch.device, *, of: str = ""):
        self._path = None
        try:
            if distributed.rank() == 0 and _names_files(fingerprint):
                self._path = f"{_start_of_path(fingerprint)}-{device.type}-{of}.jsonl"
        except OSError as error:
            log.warning("cannot keep results for another start (%s)", error)
        self._is_kept = bool(distributed.broadcast_object(self._path is not None))

    def each(
        self,
        items: Sequence[Item],
        work: Callable[[Item], T],
        form: Form[T],
        *,
        at_once: int | None = None,
    ) -> list[T]:
        """Let every rank do its share of independent items; all ranks of a job call it.

        Args:
            items: the same on every rank. JSON of an item says, under the fingerprint, which one it
                is: at another start they may be others, or in another order.
            work: makes the result of an item.
            form: of a result in the file.
            at_once: items of each rank between two writes; None: `AT_ONCE`.

        Returns:
            The results in the order of the items, on every rank.

        Raises:
            DinoscaleError: the first error of any rank, on all ranks, within seconds.
        """
        if not self._is_kept:
            return each_on_a_rank(items, work)
        by_key = {json.dumps(item): item for item in items}
        read = distributed.together(partial(self._read, form, by_key))
        done = distributed.broadcast_object(read)
        if done:
            log.info("%d of %d results are those of an earlier start", len(done), len(by_key))
        missing = [key for key in by_key if key not in done]
        share = (at_once or AT_ONCE) * distributed.world_size()
        for first in range(0, len(missing), share):
            keys = missing[first : first + share]
            found = each_on_a_rank([by_key[key] for key in keys], work)
            new = dict(zip(keys, found, strict=True))
            self._add((by_key[key], form.encode(result)) for key, result in new.items())
            done.update(new)
        return [done[json.dumps(item)] for item in items]

    def _read(self, form: Form[T], by_key: Mapping[str, Item]) -> dict[str, T]:
        """Results of these items by their JSON; empty on other ranks than 0."""
        if self._path is None:
            return {}
        found, damaged = dict[str, T](), 0
        try:
            with open(self._path, "rb") as lines:
                for line in lines:
                    try:
                        key, result = _decoded(line, form)
                    except (ValueError, TypeError, KeyError, AttributeError):
                        damaged += line != b"\n"
                        continue
                    if key in by_key and form.is_whole(by_key[key], result):
                        found[key] = result
        except FileNotFoundError:
            return {}
        except OSError as error:
            log.warning("cannot read results of an earlier start (%s): measuring again", error)
        if damaged:
            log.warning("%s: measuring again in place of %d damaged lines", self._path, damaged)
        return found

    def _add(self, results: Iterable[tuple[object, Any]]) -> None:
        """Append items with their results; a failure is only a warning."""
        if self._path is None:
            return
        try:
            # An empty line first: a full disk or a killed process may have left half a line.
            text = "\n" + "".join(f"{json.dumps(result)}\n" for result in results)
            size = _size(self._path) + len(text)  # JSON is ASCII
            if size > MOST_BYTES:
                log.warning("%d bytes of results are not kept: above the limit", len(text))
                return
            keep_recent(self._path, most_bytes=MOST_BYTES - size)
            _append(self._path, text.encode())
        except OSError as error:
            log.warning("cannot keep results for another start (%s)", error)


def forget(report: Mapping[str, object]) -> None:
    """Remove the results that a report was made from; a failure is only a warning.

    Args:
        report: written already, with the fingerprint of the measurement as `made_from`.
    """
    fingerprint = report.get("made_from")
    if not _names_files(fingerprint):
        return
    try:
        start = _start_of_path(fingerprint)
    except OSError:
        return  # there is no cache folder, so nothing is kept
    try:
        for path in glob.glob(f"{glob.escape(start)}-*.jsonl"):
            with suppress(FileNotFoundError):  # the same command removed it meanwhile
                os.unlink(path)
    except OSError as error:
        log.warning("cannot remove results that are reported (%s)", error)


def _decoded(line: bytes, form: Form[T]) -> tuple[str, T]:
    """JSON of an item, and its result."""
    item, said = json.loads(line)
    return json.dumps(item), form.decode(said)


def _size(path: str) -> int:
    with suppress(FileNotFoundError):
        return os.stat(path).st_size
    return 0


def _append(path: str, text: bytes) -> None:
    """Append by one write: what another process appends meanwhile lies before or behind."""
    with open(path, "ab", buffering=0) as file:
        if file.write(text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def _names_files(fingerprint: object) -> bool:
    """Whether it is that of a measurement of files; of generated images, it holds a text."""
    inputs = fingerprint.get("input") if isinstance(fingerprint, Mapping) else None
    return isinstance(inputs, Mapping) and not any(isinstance(x, str) for x in inputs.values())


def _start_of_path(fingerprint: object) -> str:
    """The start of the paths of all results of a measurement; OSError as of `cached_file`."""
    return cached_file("finished", [json.dumps(fingerprint, sort_keys=True)])
