"""Several sources as one: the images of the first, then those of the second, and so on."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate

from dinoscale.data.decoding.decode import RGB, Decoder, Picture
from dinoscale.data.shards.manifest import shard_counts
from dinoscale.data.shards.remote import PAUSES_S, is_remote, require_allowed, shown
from dinoscale.data.shards.stream import StreamSource
from dinoscale.data.shards.tar_source import TarSource
from dinoscale.data.sources.folder import FolderSource
from dinoscale.data.sources.left_out import LeftOut
from dinoscale.data.sources.source import Source, StoredSource, expand_braces, open_source
from dinoscale.data.sources.subset import SubsetSource
from dinoscale.errors import ConfigError, DataError


class MixedSource:
    """The images of all parts under consecutive numbers, without their classes.

    The sampler decides how often each part is drawn.

    Attributes:
        parts: the sources.

    Args:
        parts: two sources or more.
    """

    labels = None
    class_names = None

    def __init__(self, parts: Sequence[StoredSource]):
        self.parts = tuple(parts)
        self._starts = [0, *accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def path(self, index: int) -> str:
        """Where the image is, for messages."""
        part, within = self._find(index)
        return part.path(within)

    def identity(self, heartbeat: Callable[[], None] = lambda: None, /) -> str:
        """The identities of the parts."""
        return " ".join(part.identity(heartbeat) for part in self.parts)

    def picture(self, index: int) -> Picture:
        """The picture; BadSampleError as its own source raises it."""
        part, within = self._find(index)
        return part.picture(within)

    @property
    def sizes(self) -> list[int]:
        """Images of each part."""
        return [len(part) for part in self.parts]

    def part_of(self, index: int) -> range:
        """The numbers of all images in the same part as one image."""
        number = bisect_right(self._starts, index)
        return range(self._starts[number - 1], self._starts[number])

    def _find(self, index: int) -> tuple[StoredSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        return self.parts[number], index - self._starts[number]


def open_sources(
    specs: Sequence[str],
    decoder: Decoder = RGB,
    *,
    manifest: str | None = None,
    shuffle_buffer: int = 512,
    subset_size: int | None = None,
    max_lost: float = 1.0,
    heartbeat: Callable[[], None] = lambda: None,
) -> StoredSource:
    """Open the sources of a training set as one.

    Args:
        specs: one or more, each as `open_source` takes it; or one as `open_stream` does.
        decoder: decodes their files.
        manifest: where the counts of streamed shards are, if not beside them.
        shuffle_buffer: most images of a streamed shard held in memory, to permute them.
        subset_size: take only so many of the images; None takes all.
        max_lost: fraction of the pictures of a source that may be left out, as `LeftOut` counts
            them.
        heartbeat: as in `open_source`.

    Raises:
        DataError: one of them cannot be opened, too much of it is left out, or a stream is mixed
            with others.
        ConfigError: there are fewer images than `subset_size`, or they are streamed.
    """
    for spec in specs:
        if is_remote(spec) and subset_size is not None:
            raise ConfigError(
                f"data.subset_size: {subset_size} images cannot be chosen from shards that "
                f"are streamed, {shown(spec)}; name fewer of them, or copy them to a local or "
                "mounted disk"
            )
        if is_remote(spec) and len(specs) == 1:
            return open_stream(
                spec, decoder, manifest=manifest, shuffle_buffer=shuffle_buffer, max_lost=max_lost
            )
        if is_remote(spec):
            raise DataError(
                f"{shown(spec)}: shards that are streamed cannot be mixed with other sources. Name "
                "them alone, or copy them to a local or mounted disk."
            )
    parts = [open_source(spec, decoder, heartbeat) for spec in specs]
    for spec, part in zip(specs, parts, strict=True):
        require_few_left_out(part, spec, max_lost=max_lost)
    whole: StoredSource = parts[0] if len(parts) == 1 else MixedSource(parts)
    if subset_size is None or subset_size == len(whole):
        return whole  # all of them, in the order of the set itself
    if subset_size > len(whole):
        raise ConfigError(
            f"data.subset_size: {subset_size} images are more than the {len(whole)} in "
            f"{' + '.join(map(shown, specs))}"
        )
    return SubsetSource(whole, images=subset_size)


def left_out_of(source: Source) -> LeftOut:
    """What is left out of all parts of a source; unknown for a stream until it is read.

    For a subset, it is what is left out of the whole source.
    """
    left_out = LeftOut()
    for part in source.parts if isinstance(source, MixedSource) else [source]:
        if isinstance(part, SubsetSource):
            left_out.merge(left_out_of(part.whole))
        elif isinstance(part, FolderSource | TarSource):
            left_out.merge(part.left_out)
    return left_out


def require_few_left_out(source: Source, spec: str, *, max_lost: float) -> None:
    """Refuse a set of which too much is left out.

    Raises:
        DataError: more than `max_lost`, a fraction of its pictures.
    """
    left_out_of(source).require_few(spec, used=len(source), max_fraction=max_lost)


def left_out_counts(
    source: Source, of_shards: Iterable[Mapping[int, LeftOut]] = ()
) -> dict[str, int]:
    """Reason -> how often, for JSON.

    Args:
        source: the set.
        of_shards: for a stream: shard -> what its readers left out.
    """
    left_out = left_out_of(source)
    for found in {shard: found for read in of_shards for shard, found in read.items()}.values():
        left_out.merge(found)
    return left_out.counts


def open_stream(
    spec: str,
    decoder: Decoder,
    *,
    manifest: str | None,
    shuffle_buffer: int,
    max_lost: float = 1.0,
) -> StreamSource:
    """Open shards that can only be read from front to back; reads their manifest, no shard.

    Args:
        spec: a URL or brace pattern of them: `https://host/train-{000..099}.tar`, `s3:`, `gs:`,
            `hdfs:`, or `pipe:COMMAND`.
        decoder: decodes their files.
        manifest: its path or URL; None looks beside the shards.
        shuffle_buffer: most images of a shard held in memory, to permute them.
        max_lost: as in `open_sources`, for each shard.

    Raises:
        DataError: the pattern, a command or the manifest cannot be used.
    """
    urls = expand_braces(spec)
    for url in urls:
        require_allowed(url)
    counts = shard_counts(urls, manifest, pauses_s=PAUSES_S)
    if not any(counts):
        raise DataError(f"{shown(spec)}: its manifest counts no images in these shards.")
    filled = [(url, count) for url, count in zip(urls, counts, strict=True) if count]
    return StreamSource(
        [url for url, _ in filled],
        [count for _, count in filled],
        block_size=shuffle_buffer,
        decoder=decoder,
        max_lost=max_lost,
    )


def source_sizes(source: Source) -> list[int]:
    """Images of each source of a training set, all of them even if only a subset is used.

    One number if it is not a mixture.
    """
    return [source.chosen_from] if isinstance(source, SubsetSource) else drawn_sizes(source)


def drawn_sizes(source: Source) -> list[int]:
    """Images of each source that are drawn; together they are the training set."""
    return source.sizes if isinstance(source, MixedSource) else [len(source)]


def replacement_candidates(source: Source, index: int) -> range:
    """The numbers of the images that may replace an unreadable one.

    Those of the same source; for a stream, those of the same block.
    """
    if isinstance(source, StreamSource):
        return source.blocks.block_of(index)
    return source.part_of(index) if isinstance(source, MixedSource) else range(len(source))
