"""Read named tensors from a file or folder, without running any code in it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinoscale.convert.card import METADATA_KEY, card_text_of
from dinoscale.errors import CheckpointError
from dinoscale.runtime.memory import NO_MEMORY
from dinoscale.runtime.outputs import CARD_FILE, card_sums, sha256

log = logging.getLogger(__name__)

# Names of weights files in folders of model hubs, the preferred one first.
HUB_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_TORCH_INDEX = "pytorch_model.bin.index.json"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")  # of other files with weights
METADATA = "_metadata"  # attribute of a state dict where torch keeps the versions of modules
_MAX_JSON_BYTES = 16 * 2**20  # of a settings file or an index; real ones have some kilobytes
_MAX_HEAD = 2**16  # characters of a model card that are read

_NO_WEIGHTS = (  # first bytes of files that a failed download leaves behind
    (b"<", "is a web page or XML, not weights: download the file itself"),
    (b"version https://git-lfs", "is a Git LFS pointer, not weights: run `git lfs pull`"),
)
_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")  # at the start of files of older torch versions
_SCALAR: Any = np.float64(0).__reduce__()[0]  # numpy's scalar constructor, moved in numpy 2
_SAFE_GLOBALS: list[Any] = [  # types in `args` and in the scheduled numbers of the optimizer
    argparse.Namespace,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")),
]


@dataclass(frozen=True, eq=False)
class Content:
    """What was read from a path.

    Attributes:
        name: of the file, without its folder.
        checkpoint: named tensors, or a mapping around them.
        card: text of our card, in the file or else beside it; None without one.
        settings: config.json of a hub folder, None without one.
        preprocessing: preprocessor_config.json beside it, None without one.
        model_card: the entries at the head of README.md beside it, None without any.
    """

    name: str
    checkpoint: object
    card: str | None = None
    settings: dict[str, Any] | None = None
    preprocessing: dict[str, Any] | None = None
    model_card: str | None = None


def read_content(path: Path, heartbeat: Callable[[], None] = lambda: None) -> Content:
    """Read a weights file, or the one in a folder; with a hub's file also the settings beside it.

    `heartbeat` is called regularly while checksums are compared.

    Raises:
        CheckpointError: nothing is there, it is damaged, it is not clear which file is meant, or
            the card that `dinoscale convert` wrote with it has another checksum.
    """
    file = find_weights(path) if path.is_dir() else path
    name = path.name if path.is_dir() else file.name
    described = verify_checksums(file, heartbeat)
    checkpoint, card = _read_file(file)
    if file.name not in HUB_NAMES or card is not None:
        return Content(name, checkpoint, card or described)
    return Content(
        name,
        checkpoint,
        described,
        settings=_read_json(file.with_name("config.json")),
        preprocessing=_read_json(file.with_name("preprocessor_config.json")),
        model_card=_head_of_text(file.with_name("README.md")),
    )


def verify_checksums(file: Path, heartbeat: Callable[[], None] = lambda: None) -> str | None:
    """Compare a weights file, and the files read with it, with the checksums of its card.

    `heartbeat` is called regularly.

    Returns:
        The card's description of the backbone, for `parse_card`; None without such a card.

    Raises:
        CheckpointError: a checksum differs, or a file is missing or not beside it.
    """
    beside, within = file.with_name(f"{file.name}.json"), file.with_name(CARD_FILE)
    described = None
    for sums, card in ((card_sums(beside), beside), (card_sums(within), within)):
        if card == beside and len(sums) == 1:  # file and card may have been renamed
            sums = {file.name: next(iter(sums.values()))}
        if file.name not in sums:
            continue
        for name in sums:
            if Path(name).name != name or not name:
                raise CheckpointError(
                    f"has a card {card.name} that names {name!r}, no file beside it"
                )
            if not os.path.isfile(file.with_name(name)):  # False for an impossible name
                raise CheckpointError(f"lacks {name!r}, which its card {card.name} names")
            found = sha256(file.with_name(name), heartbeat)
            if found != sums[name]:
                raise CheckpointError(
                    f"is not what was exported: {name} has the sha256 {found[:12]}..., its card "
                    f"{card.name} says {sums[name][:12]}...; copy both again, or remove the card "
                    "if the change is meant"
                )
        described = described or card_text_of(_read_json(card) or {})
    return described


def remove_cards_of(target: Path) -> None:
    """Remove the cards of an earlier export with this name, after another file has replaced it."""
    beside, within = target.with_name(f"{target.name}.json"), target.with_name(CARD_FILE)
    if card_sums(beside):
        beside.unlink()
    if target.name in card_sums(within):
        within.unlink()


def find_weights(folder: Path) -> Path:
    """The weights file in a folder: one with a hub's name, else the only one.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    for name in HUB_NAMES:
        if (folder / name).is_file():
            return folder / name
    if (folder / _TORCH_INDEX).is_file():
        raise CheckpointError(
            f"is a folder with weights in several torch files ({_TORCH_INDEX}), which dinoscale"
            " does not join: save them as safetensors"
        )
    found = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES)
    if not found:
        raise CheckpointError(
            f"is a folder without weights: no checkpoints/ of a run, no {', '.join(HUB_NAMES)}, "
            f"no file ending in {', '.join(_SUFFIXES)}"
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise CheckpointError(f"is a folder with {len(found)} weights files ({names}): give one")
    return found[0]


def _read_file(file: Path) -> tuple[object, str | None]:
    """Content of a file, and the text of its card."""
    if file.name.endswith(".index.json"):
        return _read_shards(file), None
    start = _first_bytes(file)
    if start[8:9] == b"{":  # safetensors: the length of its header, then the header's JSON
        return read_safetensors(file)
    if start.startswith((b"PK", b"\x80")):  # a zip archive, or the older plain pickle
        checkpoint = read_torch_file(file)
        return checkpoint, _card_in(checkpoint)
    raise CheckpointError("is neither a safetensors nor a torch file")


def _card_in(checkpoint: object) -> str | None:
    """Text of the card in the metadata of a state dict, or of a network in a full checkpoint."""
    inner = checkpoint.values() if isinstance(checkpoint, Mapping) else ()
    for state in (checkpoint, *inner):
        metadata = getattr(state, METADATA, None)
        card = metadata.get(METADATA_KEY) if isinstance(metadata, Mapping) else None
        if isinstance(card, str):
            return card
    return None


def _first_bytes(file: Path) -> bytes:
    """Read the start of a file, and refuse one that cannot hold weights."""
    try:
        with file.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror or error})") from error
    if not start:
        raise CheckpointError("is an empty file")
    for signature, reason in _NO_WEIGHTS:
        if start.lstrip().startswith(signature) and start[8:9] != b"{":
            raise CheckpointError(reason)
    return start


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """Tensors of a safetensors file, and the text of the card in its metadata.

    Raises:
        CheckpointError: it is cut off or damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            card = (tensors.metadata() or {}).get(METADATA_KEY)
            return {name: tensors.get_tensor(name) for name in tensors.keys()}, card  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"is not a complete safetensors file, or has a newer format ({error})"
        ) from error


def read_torch_file(path: Path) -> object:
    """Unpickle a `.pth` file without running any code in it.

    Raises:
        CheckpointError: the file is damaged, was not written by `torch.save`, or holds objects
            other than tensors and settings.
        OSError: the disk cannot be read.
    """
    _require_torch_save(path)
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        if match is None:
            raise CheckpointError(
                "is damaged or holds other objects, and only tensors and settings are loaded"
            ) from error
        raise CheckpointError(
            f"holds {match[1]}, and only tensors and settings are loaded"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        if NO_MEMORY.search(str(error)):
            raise MemoryError(_first_line(error)) from error
        raise CheckpointError(f"is damaged ({_first_line(error)})") from error


def _require_torch_save(path: Path) -> None:
    """Refuse pickles and zip archives that `torch.save` did not write, and say what they are."""
    with path.open("rb") as stream:
        start = stream.read(64)
    if not start.startswith(b"PK"):
        if _MAGIC not in start:
            raise CheckpointError("is a pickle that torch.save did not write")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged archive can fail in any way
        raise CheckpointError(f"is cut off or damaged ({_first_line(error)})") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            "is a TorchScript program, not weights: give the weights it was made from"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        held = ", ".join(names[:3]) or "nothing"
        raise CheckpointError(f"is a zip archive that torch.save did not write (it holds {held})")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Tensors of the safetensors files in an index of Hugging Face."""
    places = (_read_json(index) or {}).get("weight_map")
    if not isinstance(places, Mapping) or not all(type(x) is str for x in places.values()):
        raise CheckpointError(f"has an index {index.name} without a weight_map of file names")
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"has an index that names {name!r}, no safetensors file beside it"
            )
        if not os.path.isfile(index.with_name(name)):
            raise CheckpointError(f"lacks {name!r}, one of the files its index names")
        state |= read_safetensors(index.with_name(name))[0]
    if state.keys() != places.keys():
        odd = sorted(state.keys() ^ places.keys())
        raise CheckpointError(f"has an index that disagrees with its files about {odd[0]}")
    return state


def _head_of_text(file: Path) -> str | None:
    """The YAML at the head of a model card, None without one."""
    if not file.is_file():
        return None
    with file.open(encoding="utf-8", errors="replace") as stream:
        match = re.match(r"---\n(.*?)\n---", stream.read(_MAX_HEAD), re.DOTALL)
    return None if match is None else match[1]


def _read_json(file: Path) -> dict[str, Any] | None:
    """A mapping from a JSON file, None if there is no such file."""
    if not file.is_file():
        return None
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise CheckpointError(f"has a {file.name} of more than {_MAX_JSON_BYTES} bytes")
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(f"has a {file.name} that cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"has a {file.name} that is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"has a {file.name} that is no mapping")
    return found
