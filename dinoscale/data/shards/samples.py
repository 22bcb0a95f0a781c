"""Which files of a shard make one sample, and which of them is its picture.

Files that share a key (folder and name up to the first dot) belong together: `0001.jpg`,
`0001.cls`, as in the WebDataset layout.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from dinoscale.data.decoding.decode import begins_like_picture
from dinoscale.data.shards.tar_headers import Member
from dinoscale.data.sources.left_out import (
    COMPANION,
    HIDDEN,
    NO_EXTENSION,
    NO_PICTURE,
    OTHER_FILES,
    SAME_KEY,
    LeftOut,
    is_junk,
)
from dinoscale.data.sources.listing import is_known_not_image

START_BYTES = 16  # of a file, tell its format

# Of several pictures in a sample the first in this order is taken: masks are never JPEGs, and an
# array beside a picture holds its features or labels.
_IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "jpe", "jfif", "webp", "avif", "jp2", "j2k", "mpo", "png", "bmp", "dib", "gif",
    "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "pfm", "qoi", "tga", "ico", "img", "npy",
)  # fmt: skip
# `0001.mask.png` describes the picture 0001; `0001.left.png` may be one.
_NOT_PICTURES = {"alpha", "anno", "annotation", "depth", "gt", "label", "mask", "seg", "target"}


def split_name(name: str) -> tuple[str, str]:
    """Key (folder and name up to the first dot) and lower-case extension (the rest).

    Both are empty for a hidden file, for one without extension, and for junk. `./` in front, which
    `tar -C folder .` writes, is ignored.
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension or is_junk(name):
        return "", ""
    return folder + slash + stem, extension.lower()


def group_samples(members: Iterable[Member]) -> tuple[list[dict[str, Member]], list[Member]]:
    """Extension -> member, for each sample in the order of their first members; and the rest.

    The rest are hidden files and those without extension, which have no key. Junk is dropped.
    """
    samples: list[dict[str, Member]] = []
    rest: list[Member] = []
    latest: dict[str, dict[str, Member]] = {}  # key -> its latest sample
    for member in members:
        key, extension = split_name(member.name)
        if not key:
            if not is_junk(member.name):
                rest.append(member)
            continue
        sample = latest.get(key)
        if sample is None or extension in sample:  # a repeated key is another sample
            sample = latest[key] = {}
            samples.append(sample)
        sample[extension] = member
    return samples, rest


def may_be_picture(extension: str) -> bool:
    """Whether a file with this extension may be the picture of its sample."""
    return bool(picture_of([extension]))


def picture_of(extensions: Iterable[str]) -> str:
    """Extension of the picture, not of a mask: the one with the fewest dots; empty without any."""
    return min(_ranked(extensions), default=(0, 0, ""))[2]


def other_pictures(extensions: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Extensions of the pictures that are not taken, and why: `left_out`'s SAME_KEY or COMPANION.

    `0001.png` and `0001.small.jpg` show the same as `0001.jpg` beside them. `0001.left.jpg` and
    `0001.right.jpg`, or `img.0001.jpg` and `img.0002.jpg`, are equals, with or without an
    `img.jpg`. Arrays beside a picture are its features.
    """
    taken, *others = [x for _, _, x in sorted(_ranked(extensions))] or [""]
    others = [x for x in others if _middle(x)[1] != "npy"]
    stem = _middle(taken)[0]
    words = {_middle(x)[0] for x in others} - {stem}
    one_word = not stem and len(words) == 1 and any(map(str.isalpha, next(iter(words))))
    for extension in others:
        yield extension, COMPANION if one_word or _middle(extension)[0] == stem else SAME_KEY


def _middle(extension: str) -> tuple[str, str]:
    """The parts of an extension before and after its last dot."""
    middle, _, last = extension.rpartition(".")
    return middle, last


def _ranked(extensions: Iterable[str]) -> Iterator[tuple[int, int, str]]:
    """Extensions of pictures with their sort keys: fewest dots first, JPEG before PNG."""
    for extension in extensions:
        *middle, last = extension.split(".")
        if last in _IMAGE_EXTENSIONS and not _NOT_PICTURES.intersection(middle):
            yield len(middle), _IMAGE_EXTENSIONS.index(last), extension


def left_out_of_samples(samples: Sequence[Mapping[str, Member]]) -> LeftOut:
    """What in the samples of a shard, from `group_samples`, does not become an image."""
    left_out = LeftOut()
    for sample in samples:
        if not picture_of(sample):
            first = next(iter(sample.values())).name
            left_out.add(NO_PICTURE if _lacks_picture(sample) else OTHER_FILES, first)
        for other, why in other_pictures(sample):
            left_out.add(why, sample[other].name)
    return left_out


def _lacks_picture(sample: Mapping[str, Member]) -> bool:
    """Whether its picture is missing: it has a label, or a file of an unknown kind."""
    return "cls" in sample or not all(is_known_not_image(member.name) for member in sample.values())


def why_no_sample(path: str, start: bytes) -> str:
    """Why a picture without a key is not a sample; empty for any other file.

    Args:
        path: path of the file in its shard.
        start: its first bytes.
    """
    name = path.rpartition("/")[2]
    if name.startswith("."):
        return HIDDEN if may_be_picture(name.rpartition(".")[2].lower()) else ""
    return NO_EXTENSION if begins_like_picture(start) else ""
