"""Which files of a shard make one sample, and which of them is its picture.

Files that share a key (folder and name up to the first dot) belong together: `0001.jpg`,
`0001.cls`, as in the WebDataset layout.
"""

from collections.abc import Iterable, Iterator

from dinoscale.data.left_out import COMPANION, SAME_KEY, is_junk

# Of several pictures of one sample the one named first here is taken: masks are never JPEGs, and
# an array beside a picture holds its features or labels.
_IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "jpe", "jfif", "webp", "avif", "jp2", "j2k", "mpo", "png", "bmp", "dib", "gif",
    "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "pfm", "qoi", "tga", "ico", "img", "npy",
)  # fmt: skip
# `0001.mask.png` describes the picture 0001; `0001.left.png` may be one.
_NOT_PICTURES = {"alpha", "anno", "annotation", "depth", "gt", "label", "mask", "seg", "target"}


def split_name(name: str) -> tuple[str, str]:
    """Key (folder and name up to the first dot) and lower-case extension (the rest).

    Both are empty for a hidden file, for one without extension, and for junk.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension or is_junk(name):
        return "", ""
    return folder + slash + stem, extension.lower()


def may_be_picture(extension: str) -> bool:
    """Whether a file with this extension may be the picture of its sample."""
    return bool(picture_of([extension]))


def picture_of(extensions: Iterable[str]) -> str:
    """Extension of the picture, not of its mask: the plainest one, JPEG before PNG; else empty."""
    return min(_ranked(extensions), default=(0, 0, ""))[2]


def other_pictures(extensions: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Extensions of the pictures that are not taken, and why: `left_out`'s SAME_KEY or COMPANION.

    Beside `0001.jpg`, `0001.png` and `0001.small.jpg` show the same. Of `0001.left.jpg` and
    `0001.right.jpg`, or of `img.0001.jpg` and `img.0002.jpg`, none is more the picture than the
    other. Arrays beside a picture are features of it.
    """
    ranked = sorted(_ranked(extensions))
    for _, _, extension in ranked[1:]:
        stem, last = _middle(extension)
        if last != "npy":
            alike = _middle(ranked[0][2])[0] in ("", stem)
            yield extension, COMPANION if alike else SAME_KEY


def _middle(extension: str) -> tuple[str, str]:
    """What stands before the last dot of an extension, and after it."""
    middle, _, last = extension.rpartition(".")
    return middle, last


def _ranked(extensions: Iterable[str]) -> Iterator[tuple[int, int, str]]:
    """Those of pictures, with what orders them: the plainest first."""
    for extension in extensions:
        *middle, last = extension.split(".")
        if last in _IMAGE_EXTENSIONS and not _NOT_PICTURES.intersection(middle):
            yield len(middle), _IMAGE_EXTENSIONS.index(last), extension
