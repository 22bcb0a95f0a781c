"""Annotations in a folder of their own: under which name that of an image is looked up."""

from __future__ import annotations

import os
from typing import TypeVar

from dinoscale.data.shards.tar_source import TarSource
from dinoscale.data.sources.source import Source
from dinoscale.errors import DataError

T = TypeVar("T")


def images_root(source: Source, spec: str) -> str:
    """The folder below which images have the names of their annotations.

    It is the set's own folder, or that of the list that names the images; if images lie outside of
    that, the common folder of all images, since a name with `..` would leave that of annotations.

    Args:
        source: the images.
        spec: what they were opened from.
    """
    root = os.path.abspath(os.path.expanduser(spec))
    if os.path.isdir(root) or isinstance(source, TarSource):
        return root
    root = os.path.dirname(root)  # of one image, or of a list of images
    folders = {os.path.dirname(os.path.abspath(source.path(i))) for i in range(len(source))}
    inside = all(os.path.commonpath([root, folder]) == root for folder in folders)
    return root if inside else os.path.commonpath(folders)


def require_not_image(file: str, image: str) -> None:
    """Refuse an annotation that is the image itself, perhaps by a link.

    Raises:
        DataError: it is.
    """
    if os.path.realpath(file) == os.path.realpath(image):
        raise DataError(
            f"{file} is the image {image} itself. Name a folder that holds no images but their"
            " masks or depth pictures."
        )


def still_there(found: T | None, path: str, name: str) -> T:
    """What belongs to an image and was there when its set was opened.

    Args:
        found: it, as it was read again.
        path: of the image.
        name: of what was found.

    Raises:
        DataError: it has vanished.
    """
    if found is None:
        raise DataError(
            f"{path}: its {name} has vanished since the start. Restore it, and start again."
        )
    return found
