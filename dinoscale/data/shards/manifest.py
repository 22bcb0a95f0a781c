"""The number of images in each shard, from the `manifest.json` beside the shards.

Written by `dinoscale data build-shards`: {"format": 1, "shards": [{"name": "train-000.tar",
"samples": 1000, ...}, ...], ...}. Only names and counts are read here.
"""

import json
import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from dinoscale.data.shards.remote import is_remote, read_all, require_allowed, scheme_of, shown
from dinoscale.errors import DataError, UnavailableError
from dinoscale.runtime.retry import with_retries

FILE_NAME = "manifest.json"

FORMAT = 1
_MAX_BYTES = 256 * 2**20  # of a manifest: a million shards
_MAX_COUNT = 2**40  # of images in a shard; more is a mistake


def shard_counts(
    urls: Sequence[str], manifest: str | None, *, pauses_s: tuple[float, ...]
) -> list[int]:
    """The number of images in each shard.

    Args:
        urls: URLs of the shards.
        manifest: path or URL of the manifest; None looks beside the shards.
        pauses_s: seconds before each retry.

    Raises:
        DataError: there is no manifest, it is not valid, or it does not know a shard.
        UnavailableError: it cannot be read now.
    """
    places = [manifest or _beside(url) for url in urls]
    known = {place: _read(place, pauses_s=pauses_s) for place in dict.fromkeys(places)}
    return [_count(url, known[place], place) for url, place in zip(urls, places, strict=True)]


def _beside(url: str) -> str:
    if scheme_of(url) == "pipe":
        raise DataError(
            f"{url}: the number of images in the output of a command must be known first. Name the "
            f"{FILE_NAME} of these shards with data.manifest=PATH_OR_URL; "
            "`dinoscale data build-shards` writes one."
        )
    parts = urlsplit(url)
    folder = posixpath.dirname(parts.path)
    return parts._replace(path=posixpath.join(folder, FILE_NAME)).geturl()


def _read(place: str, *, pauses_s: tuple[float, ...]) -> dict[str, int]:
    """Name of a shard -> images in it."""
    try:
        if is_remote(place):
            require_allowed(place)
            text = read_all(place, limit=_MAX_BYTES, pauses_s=pauses_s)
        else:
            path = Path(os.path.expanduser(place))
            text = with_retries(lambda: _file_bytes(path), str(path))
    except UnavailableError:
        raise
    except DataError as error:
        raise DataError(
            f"the number of images in each shard is not known: {error}\nPut the {FILE_NAME} that "
            "`dinoscale data build-shards` writes beside the shards, or name it with "
            "data.manifest=PATH_OR_URL."
        ) from None
    try:
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}, not {FORMAT}")
        return {str(shard["name"]): _sample_count(shard["samples"]) for shard in values["shards"]}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{shown(place)} is not a manifest of shards ({what}).") from None


def _file_bytes(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # a pipe or a device may have no end
        raise DataError(f"{path} is a folder or a device, not a file.")
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise DataError(f"{path} is longer than {_MAX_BYTES} bytes.")
    return data


def _sample_count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAX_COUNT:
        raise ValueError(f"{value!r} is not a number of samples")
    return value


def _count(url: str, known: dict[str, int], place: str) -> int:
    """The count of the one known shard whose name ends the URL or appears in the command."""
    if scheme_of(url) == "pipe":
        words = re.split(r"[\s/'\"|;&<>()=]+", url)
    else:
        words = [posixpath.basename(urlsplit(url).path)]
    found = {word for word in words if word in known}
    if len(found) != 1:
        what = "knows no shard" if not found else "knows more than one shard"
        raise DataError(
            f"{shown(place)} {what} named in {shown(url)}; names there are like "
            f"{next(iter(known), 'none')}. Correct the shards or data.manifest."
        )
    return known[found.pop()]
