"""Features of images, kept between runs under a name made of all that they depend on.

That is the content of the weights, what is taken from the network, the preparation of the images,
the files of the set (not their paths: size and times of each file, in order), the kind of device,
what our own code does and the libraries that decode, resize and multiply. The size of the batches
is not part of it: it moves last bits only.

A file system gives a file another change time (`ctime`) whenever it is written, replaced or
renamed, and programs cannot set it. So a set that was copied is measured anew, one that was moved
as a whole is not, and a picture that was changed is never missed.

All features together have a limit, `DINOSCALE_CACHE_GB`: those read longest ago go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dinoscale.data.cache_folder import cached_file, keep_recent
from dinoscale.errors import ConfigError
from dinoscale.runtime import distributed
from dinoscale.runtime.fingerprint import code_fingerprint, files_fingerprint
from dinoscale.runtime.outputs import write_tensors

log = logging.getLogger(__name__)

MOST_GB = 32  # 10^9 bytes of all features that are kept; of ImageNet by a ViT-B they are 4
# What makes features, and, by what these import, all that can change one.
_MODULES = ("features", "classification.linear_heads", "retrieval.multi_scale")


@runtime_checkable
class InFiles(Protocol):
    """A source whose images lie in files."""

    def files(self) -> Iterator[str]:
        """Paths of the files, in an order that tells the images'."""
        ...


@dataclass(frozen=True)
class Preparation:
    """Resize, center crop, then (x / 255 - mean) / std."""

    resize: int  # short side, pixels
    crop: int  # side, pixels
    mean: tuple[float, ...]  # of each channel in 0..1
    std: tuple[float, ...]


def features_key(
    backbone: nn.Module,
    files: InFiles,
    preparation: Preparation,
    *,
    taken: str,
    device: torch.device,
) -> str:
    """Write down all that the features of a set depend on.

    Args:
        backbone: whose weights count, not their file.
        files: the set.
        preparation: of its images.
        taken: what the output depends on besides these.
        device: where the backbone is.

    Returns:
        JSON; equal texts mean equal features.
    """
    about = {
        "weights": weights_digest(backbone),
        "taken": taken,
        "preparation": asdict(preparation),
        "files": _files_digest(files),
        "device": device.type,
        "code": code_fingerprint(*(f"dinoscale.evaluate.{module}" for module in _MODULES)),
    }
    return json.dumps(about, sort_keys=True)


def weights_digest(backbone: nn.Module) -> str:
    """Digest of names, types, shapes and values of all tensors of a backbone."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _files_digest(source: InFiles) -> dict[str, object]:
    """Of a set, wherever it lies and whatever its files are called."""
    found = files_fingerprint("", source.files())
    return {part: found[part] for part in ("number", "sizes", "times")}


def through_cache(
    key: Callable[[], str],
    extract: Callable[[], tuple[Tensor, Tensor]],
    *,
    num_images: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Read features where they are kept, else extract and keep them; all ranks call it.

    Rank 0 reads and writes; the others need not see its disk.

    Args:
        key: makes a `features_key`.
        extract: gives features (N, D) and the numbers of their images (N,), on every rank.
        num_images: of the set, for the count of those that were left out.
        device: where the result will be.

    Returns:
        What `extract` gives, or gave when they were kept.

    Raises:
        ConfigError: DINOSCALE_CACHE_GB is no size.
    """
    most_bytes = distributed.together(_most_bytes)
    of_rank_0 = distributed.rank() == 0
    name = distributed.together(key) if of_rank_0 else distributed.together(str)
    kept = _read(name, num_images=num_images) if of_rank_0 else None
    if distributed.broadcast_object(kept is None):
        features, numbers = extract()
        if of_rank_0:
            _write(name, features, numbers, most_bytes=most_bytes)
        return features, numbers
    features, numbers = kept or (torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64))
    gather = distributed.gather_rows
    return gather(features.to(device)), gather(numbers.to(device))


def _read(key: str, *, num_images: int) -> tuple[Tensor, Tensor] | None:
    """What is kept under a key, on the CPU; a damaged file is reported and counts as none."""
    try:
        path = _path_of(key)
        if not os.path.exists(path):
            return None
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            features, numbers = file.get_tensor("features"), file.get_tensor("numbers")
        with contextlib.suppress(OSError):  # the folder may be for reading only
            os.utime(path)
    except (OSError, SafetensorError) as error:
        log.warning("cannot use the features in the cache (%s): extracting them anew", error)
        return None
    if about != _about(key, features, numbers):
        log.warning("%s is damaged: extracting the features anew", path)
        return None
    log.info("features read from cache: %s", path)
    if len(numbers) < num_images:
        left_out = num_images - len(numbers)
        log.warning("%d of %d images were left out of them as unreadable", left_out, num_images)
    return features, numbers


def _most_bytes() -> float:
    """The limit of all features that are kept."""
    given = os.environ.get("DINOSCALE_CACHE_GB") or str(MOST_GB)
    try:
        gigabytes = float(given)
    except ValueError:
        gigabytes = math.nan
    if not gigabytes >= 0:
        raise ConfigError(f"DINOSCALE_CACHE_GB: need a number of gigabytes, got {given!r}")
    return gigabytes * 1e9


def _write(key: str, features: Tensor, numbers: Tensor, *, most_bytes: float) -> None:
    """Keep features, whole or not at all; where that fails, say so and go on."""
    beside = None
    try:
        path = _path_of(key)
        size = features.nbytes + numbers.nbytes
        fits = size <= most_bytes
        keep_recent(path, most_bytes=most_bytes - size * fits)
        if not fits:
            log.warning("%.1f GB of features are not kept: DINOSCALE_CACHE_GB", size / 1e9)
            return
        beside = f"{path}.{uuid.uuid4().hex}.partial"
        tensors = {"features": features.cpu().contiguous(), "numbers": numbers.cpu().contiguous()}
        write_tensors(tensors, beside, metadata=_about(key, **tensors))
        os.replace(beside, path)
        log.info("features kept in %s", path)
    except (OSError, SafetensorError) as error:
        log.warning("cannot keep the features for the next time (%s)", error)
    finally:
        if beside is not None and os.path.exists(beside):
            os.unlink(beside)


def _path_of(key: str) -> str:
    return cached_file("features", [key]) + ".safetensors"


def _about(key: str, features: Tensor, numbers: Tensor) -> dict[str, str]:
    digest = hashlib.sha256(_bytes_of(features))
    digest.update(_bytes_of(numbers))
    return {"key": key, "sha256": digest.hexdigest()}
