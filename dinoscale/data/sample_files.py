"""Which files of a shard make one sample, and which of them is its picture.

Files that share a key (folder and name up to the first dot) belong together: `0001.jpg`,
`0001.cls`, as in the WebDataset layout.
"""

from collections.abc import Iterable

# Of several pictures of one sample the one named first here is taken: masks are never JPEGs.
_IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "jpe", "jfif", "webp", "avif", "jp2", "j2k", "mpo", "png", "bmp", "dib", "gif",
    "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "pfm", "qoi", "tga", "ico", "img",
)  # fmt: skip
# `0001.mask.png` describes the picture 0001; `0001.left.png` may be one.
_NOT_PICTURES = {"alpha", "anno", "annotation", "depth", "gt", "label", "mask", "seg", "target"}


def split_name(name: str) -> tuple[str, str]:
    """Key (folder and name up to the first dot) and lower-case extension (the rest).

    Both are empty for a hidden file and for one without extension.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension:
        return "", ""
    return folder + slash + stem, extension.lower()


def may_be_picture(extension: str) -> bool:
    """Whether a file with this extension may be the picture of its sample."""
    return bool(picture_of([extension]))


def picture_of(extensions: Iterable[str]) -> str:
    """Extension of the picture, not of its mask: the plainest one, JPEG before PNG; else empty."""
    ranks = []
    for extension in extensions:
        *middle, last = extension.split(".")
        if last in _IMAGE_EXTENSIONS and not _NOT_PICTURES.intersection(middle):
            ranks.append((len(middle), _IMAGE_EXTENSIONS.index(last), extension))
    return min(ranks)[2] if ranks else ""
