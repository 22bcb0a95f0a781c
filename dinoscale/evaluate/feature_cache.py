"""A cache of features on disk, under keys of all that the features depend on.

A key holds the content of the weights, which output of the network they are, the preparation of the
images, the files of the set (size and times of each file in order, not its path), the kind of
device, our own code, and the libraries that decode, resize, build networks and multiply. The batch
size is not part of it: it changes last bits only.

A file system changes the `ctime` of a file whenever it is written, replaced or renamed, and
programs cannot set it. So the features of a copied set are extracted again, those of a set whose
folder was moved are not, and a changed picture is never missed.

`DINOSCALE_CACHE_GB` limits the size of all features: the least recently used are deleted first.
A set that is larger is not cached: each of its parts would delete those that are read before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
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

MOST_GB = 32  # 10^9 bytes of all cached features; those of ImageNet by a ViT-B take 4
# The modules that compute features; with their imports, all code that can change one.
_MODULES = (
    "dinoscale.models.zoo",
    "dinoscale.evaluate.features",
    "dinoscale.evaluate.classification.linear_heads",
    "dinoscale.evaluate.retrieval.multi_scale",
)


@runtime_checkable
class InFiles(Protocol):
    """A source whose images lie in files."""

    def files(self) -> Iterator[str]:
        """Paths of the files, in the order of the images."""
        ...


@dataclass(frozen=True)
class Preparation:
    """Resize, center crop, then (x / 255 - mean) / std."""

    resize: int  # short side, pixels
    crop: int  # side, pixels
    mean: tuple[float, ...]  # of each channel in 0..1
    std: tuple[float, ...]


@dataclass
class CachedSet:
    """A set whose features are cached in parts: all of them or, if these are too many, none.

    Attributes:
        num_images: of all parts.
        too_large: for the cache, as a part has shown.
    """

    num_images: int
    too_large: bool = False


def features_key(
    backbone: nn.Module,
    files: InFiles,
    preparation: Preparation,
    *,
    output_key: str,
    device: torch.device,
) -> str:
    """Describe all that the features of a set depend on.

    Args:
        backbone: by its weights, not by their file.
        files: the set.
        preparation: of its images.
        output_key: all that the output depends on besides these, in words.
        device: of the backbone.

    Returns:
        JSON; equal keys mean equal features.
    """
    about = {
        "weights": weights_digest(backbone),
        "taken": output_key,
        "preparation": asdict(preparation),
        "files": _files_digest(files),
        "device": device.type,
        "code": code_fingerprint(*_MODULES),
    }
    return json.dumps(about, sort_keys=True)


def weights_digest(backbone: nn.Module) -> str:
    """Digest of names, types, shapes and values of all tensors of a backbone."""
    return tensors_digest(backbone.state_dict())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The same of tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _files_digest(source: InFiles) -> dict[str, object]:
    """Digests of the files of a set, independent of their paths."""
    found = files_fingerprint("", source.files())
    return {part: found[part] for part in ("number", "sizes", "times")}


def through_cache(
    key: Callable[[], str],
    extract: Callable[[], tuple[Tensor, Tensor]],
    *,
    num_images: int,
    device: torch.device,
    part_of: CachedSet | None = None,
) -> tuple[Tensor, Tensor]:
    """Read features from the cache, else extract and cache them; all ranks call it.

    Only rank 0 reads and writes; the others need no access to its disk.

    Args:
        key: returns a `features_key`.
        extract: returns features (N, D) and the indices of their images (N,), on every rank.
        num_images: of the set, to count those that were left out.
        device: of the result.
        part_of: the whole set, where these images are only a part of it.

    Returns:
        What `extract` returns, or returned when it was cached.

    Raises:
        ConfigError: DINOSCALE_CACHE_GB is not a number of at least 0.
    """
    most_bytes = distributed.together(_most_bytes)
    is_rank_0 = distributed.rank() == 0
    name = distributed.together(key) if is_rank_0 else distributed.together(str)
    cached = _read(name, num_images=num_images) if is_rank_0 else None
    if distributed.broadcast_object(cached is None):
        features, numbers = extract()
        if is_rank_0:
            whole = part_of or CachedSet(num_images)
            _write(name, features, numbers, whole, most_bytes=most_bytes)
        return features, numbers
    features, numbers = cached or (torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64))
    gather = distributed.gather_rows
    return gather(features.to(device)), gather(numbers.to(device))


def _read(key: str, *, num_images: int) -> tuple[Tensor, Tensor] | None:
    """The features under a key, on the CPU; None, with a warning, if their file is damaged."""
    try:
        path = _path_of(key)
        if not os.path.exists(path):
            return None
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            features, numbers = file.get_tensor("features"), file.get_tensor("numbers")
        with contextlib.suppress(OSError):  # the folder may be read-only
            os.utime(path)
    except (OSError, SafetensorError) as error:
        log.warning("cannot read the cache (%s): extracting the features again", error)
        return None
    if about != _about(key, features, numbers):
        log.warning("%s is damaged: extracting the features again", path)
        return None
    log.info("features read from cache: %s", path)
    if len(numbers) < num_images:
        left_out = num_images - len(numbers)
        log.warning("%d of %d images were unreadable and left out of them", left_out, num_images)
    return features, numbers


def _most_bytes() -> float:
    """The size limit of the cache."""
    value = os.environ.get("DINOSCALE_CACHE_GB") or str(MOST_GB)
    try:
        gigabytes = float(value)
    except ValueError:
        gigabytes = math.nan
    if not gigabytes >= 0:
        raise ConfigError(f"DINOSCALE_CACHE_GB: need a number of gigabytes, got {value!r}")
    return gigabytes * 1e9


def _write(
    key: str, features: Tensor, numbers: Tensor, of: CachedSet, *, most_bytes: float
) -> None:
    """Write features into the cache, whole or not at all; a failure is only a warning."""
    if of.too_large:
        return
    beside = None
    try:
        path = _path_of(key)
        size = features.nbytes + numbers.nbytes
        of_all = size / max(1, len(numbers)) * of.num_images
        of.too_large = of_all > most_bytes
        keep_recent(path, most_bytes=most_bytes if of.too_large else most_bytes - size)
        if of.too_large:
            gb = of_all / 1e9
            log.warning("%.1f GB of features are not cached: above DINOSCALE_CACHE_GB", gb)
            return
        beside = f"{path}.{uuid.uuid4().hex}.partial"
        tensors = {"features": features.cpu().contiguous(), "numbers": numbers.cpu().contiguous()}
        write_tensors(tensors, beside, metadata=_about(key, **tensors))
        os.replace(beside, path)
        log.info("features cached in %s", path)
    except (OSError, SafetensorError) as error:
        log.warning("cannot cache the features (%s)", error)
    finally:
        if beside is not None and os.path.exists(beside):
            os.unlink(beside)


def _path_of(key: str) -> str:
    return cached_file("features", [key]) + ".safetensors"


def _about(key: str, features: Tensor, numbers: Tensor) -> dict[str, str]:
    digest = hashlib.sha256(_bytes_of(features))
    digest.update(_bytes_of(numbers))
    return {"key": key, "sha256": digest.hexdigest()}
