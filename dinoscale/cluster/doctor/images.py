"""Check that all nodes can open the image sets, count the same images, and can decode some."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from dinoscale.cluster.doctor.image_sets import Alive, Open, image_sets
from dinoscale.cluster.doctor.report import Check, count_text, ok, problem, warning
from dinoscale.config import RunConfig
from dinoscale.config.resolve import require_groups_within_nodes, resolve, split_batch, without_auto
from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.shards.stream import StreamSource
from dinoscale.data.sources.mixture import source_sizes
from dinoscale.data.sources.source import Source
from dinoscale.errors import ConfigError, DinoscaleError
from dinoscale.evaluate.classification.labelled_sets import renumber_classes
from dinoscale.runtime import distributed
from dinoscale.runtime.hosts import ranks_text
from dinoscale.runtime.opening import open_once_per_node

_SAMPLES = 8  # images that each rank decodes of each set
_STRAGGLES = 5.0  # times slower than most; cached files alone make a few times' difference
_SHORT_S = 0.5  # less decoding than this says little on a busy machine
_DECODE_S = 20.0  # limit of decoding, for slow disks


@dataclass(frozen=True)
class SetFacts:
    """Facts of one image set on one rank.

    Attributes:
        spec: what the config names.
        error: why it cannot be opened, or None.
        num_images: number of images in the set.
        source_sizes: number of images of each of its sources.
        num_decoded: tried images that can be decoded.
        bad: an error for each tried image that cannot.
        seconds: spent decoding.
    """

    spec: str
    error: str | None = None
    num_images: int = 0
    source_sizes: Sequence[int] = ()
    num_decoded: int = 0
    bad: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class _NotOpened:
    """Why a set is not open; None if the configuration of this rank names none."""

    error: str | None


def look(
    config: RunConfig, hosts: Sequence[str], *, rank: int, timeout_s: float
) -> dict[str, SetFacts]:
    """Open every set of the config and decode a few images of each, spread over the set.

    All ranks call it together. Ranks of one host that name the same images open them once.

    Args:
        config: of this rank.
        hosts: of all ranks.
        rank: of this process.
        timeout_s: for a rank that does not answer.

    Raises:
        RunFailedError: a rank did not answer.
    """
    found: dict[str, SetFacts] = {}
    sources: dict[str, Source] = {}
    for key, (spec, open_set) in image_sets(config).items():
        named = distributed.gather_objects((spec, config.data.manifest))
        alike = [f"{host} {names}" for host, names in zip(hosts, named, strict=True)]
        tried = partial(_tried_to_open, open_set, spec)
        source = open_once_per_node(tried, alike, timeout_s=timeout_s)
        if not isinstance(source, _NotOpened):
            assert spec is not None
            sources[key] = source
            found[key] = _decode_some(source, spec, rank=rank, world_size=len(hosts))
        elif spec is not None:
            found[key] = SetFacts(spec, error=source.error)
    if "eval.train" in sources and "eval.test" in sources:
        try:
            renumber_classes(sources["eval.train"], sources["eval.test"])
        except DinoscaleError as error:
            found["eval.test"] = SetFacts(found["eval.test"].spec, error=str(error))
    return found


def _tried_to_open(open_set: Open, spec: str | None, heartbeat: Alive) -> Source | _NotOpened:
    """Open a set; keep an error as a fact of this node, since others may see other files."""
    if spec is None:
        return _NotOpened(None)
    try:
        return open_set(heartbeat)
    except (DinoscaleError, OSError) as error:
        return _NotOpened(str(error))


def sample_ids(*, num_images: int, rank: int, world_size: int) -> list[int]:
    """Indices of the images that a rank decodes: spread over the set, different on each rank."""
    number = min(_SAMPLES, num_images)
    positions = [(i + rank / world_size) / number for i in range(number)]
    return [int(position * num_images) for position in positions]


def _tried(source: Source, *, rank: int, world_size: int) -> list[int]:
    """Indices of the images to decode; of a stream the first ones of shards, which arrive first."""
    if isinstance(source, StreamSource):
        starts = source.blocks.starts[:-1]
        shards = sample_ids(num_images=len(starts), rank=rank, world_size=world_size)
        return [int(starts[shard]) for shard in shards]
    return sample_ids(num_images=len(source), rank=rank, world_size=world_size)


def _decode_some(source: Source, spec: str, *, rank: int, world_size: int) -> SetFacts:
    bad, decoded = [], 0
    begin = time.perf_counter()
    for index in _tried(source, rank=rank, world_size=world_size):
        try:
            source.picture(index).pixels()
            decoded += 1
        except BadSampleError as error:
            bad.append(str(error))
        if time.perf_counter() - begin > _DECODE_S:
            break
    seconds = time.perf_counter() - begin
    return SetFacts(
        spec,
        num_images=len(source),
        source_sizes=source_sizes(source),
        num_decoded=decoded,
        bad=bad,
        seconds=seconds,
    )


def judge_images(of_ranks: Sequence[Mapping[str, SetFacts]], hosts: list[str]) -> list[Check]:
    """One check for each set, over all ranks."""
    keys = dict.fromkeys(key for found in of_ranks for key in found)
    checks = [_judge_set(key, [found.get(key) for found in of_ranks], hosts) for key in keys]
    if "data.train" not in keys:
        text = "not set; name the images, for example data.train=/path/to/folder"
        checks.insert(0, problem("data.train", text))
    return checks


def _judge_set(key: str, of_ranks: Sequence[SetFacts | None], hosts: list[str]) -> Check:
    for rank, found in enumerate(of_ranks):
        if found is None:
            where = ranks_text([rank], hosts)
            return problem(key, f"not set on {where}; start all ranks with the same command")
        if found.error:
            where = f"{ranks_text([rank], hosts)}: " if len(of_ranks) > 1 else ""
            return problem(key, where + found.error)
    known = [found for found in of_ranks if found is not None]
    images = known[0].num_images
    other = [rank for rank, found in enumerate(known) if found.num_images != images]
    if other:
        return problem(
            key,
            f"{images} images on rank 0 but {known[other[0]].num_images} on"
            f" {ranks_text(other, hosts)}; give all nodes the same files",
        )
    bad = list(dict.fromkeys(text for found in known for text in found.bad))
    decoded = sum(found.num_decoded for found in known)
    if bad:
        verdict = problem if decoded < len(bad) else warning
        return verdict(
            key,
            f"{len(bad)} of {decoded + len(bad)} tried images of {known[0].spec} cannot be read,"
            f" first {bad[0]}; repair or remove them: a run stops above data.max_bad_fraction",
        )
    rates = [found.num_decoded / max(found.seconds, 1e-9) for found in known]
    slowest, usual = min(rates), statistics.median_high(rates)
    slow = [
        rank
        for rank, found in enumerate(known)
        if rates[rank] * _STRAGGLES < usual and found.seconds > _SHORT_S
    ]
    if slow:
        return warning(
            key,
            f"{ranks_text(slow, hosts)}: reads and decodes {slowest:.3g} images/s, most ranks"
            f" {usual:.3g}, and all wait for the slowest; check the disk of {known[0].spec} and"
            " other programs there",
        )
    return ok(
        key,
        f"{images} images in {known[0].spec}; all {decoded} tried can be read,"
        f" {slowest:.3g} images/s by one process",
    )


def judge_plan(
    config: RunConfig,
    *,
    world_size: int,
    ranks_of_node: int,
    num_images: int | Sequence[int] | None,
) -> Check:
    """Whether the batch divides over the ranks, and the steps; `num_images` as for `resolve`."""
    decided = without_auto(config)
    try:
        require_groups_within_nodes(config, ranks_of_node=ranks_of_node)
        split = split_batch(decided, world_size=world_size)
        if num_images is None:
            steps = "the steps depend on the number of images"
        else:
            plan = resolve(decided, world_size=world_size, num_images=num_images)
            steps = f"{plan.steps_per_epoch} steps per epoch, {plan.stop_step} in total"
    except ConfigError as error:
        return problem("plan", str(error))
    of_rank = f"{split.micro_batch_size} x {split.accumulation_steps} (micro-batches)"
    if decided is not config:
        of_rank = f"{split.images_per_rank}, in micro-batches as large as fit (auto)"
    return ok(
        "plan",
        f"{config.train.batch_size} images per step = {count_text(world_size, 'rank')} x"
        f" {of_rank}; {steps}",
    )
