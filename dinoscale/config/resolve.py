"""The plan of a run for a number of ranks and images: batch split, steps, learning rate.

An epoch drops the images that do not fill a last batch, as in Caron et al. 2021
(arXiv:2104.14294), unless train.steps_per_epoch says how long it is. Of a mixture it draws each
source's share, by largest remainders. Recipes count epochs, the trainer counts optimizer steps;
only this module converts one to the other.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction

from dinoscale.config.schema import RunConfig
from dinoscale.config.sections.backbones import (
    RESNET50,
    RESNET50_PARAMETERS,
    RESNET50_PER_CHANNEL,
    named_vit_size,
    num_head_parameters,
    num_vit_parameters,
)
from dinoscale.errors import ConfigError, DinoscaleError

_NO_IMAGES = "data.train is not set, and the number of steps follows from its images"


@dataclass(frozen=True)
class BatchSplit:
    """One optimizer step over the ranks, in images (not crops).

    images_per_rank = micro_batch_size x accumulation_steps, batch_size = images_per_rank x ranks.

    Attributes:
        images_per_rank: images of one rank in one optimizer step.
        micro_batch_size: images of one rank in one forward and backward pass.
        accumulation_steps: such passes per optimizer step.
    """

    images_per_rank: int
    micro_batch_size: int
    accumulation_steps: int


@dataclass(frozen=True)
class RunPlan:
    """The run in optimizer steps, for a known number of ranks and images.

    Attributes:
        world_size: number of ranks.
        batch_size: images per optimizer step over all ranks.
        images_per_rank: images of one rank in one optimizer step.
        micro_batch_size: images of one rank in one forward and backward pass.
        accumulation_steps: such passes per optimizer step.
        num_images: different images in the training set.
        source_sizes: images of each source that it is mixed from, or chosen from.
        quotas: draws from each source in an epoch.
        steps_per_epoch: optimizer steps per epoch.
        total_steps: optimizer steps that the schedules span.
        stop_step: optimizer steps after which the run ends, at most total_steps.
        warmup_steps: optimizer steps of learning-rate warm-up.
        freeze_last_layer_steps: optimizer steps in which the prototypes do not move.
        peak_lr: highest learning rate, scaled with the batch.
        min_lr: learning rate at the end; not scaled, unless schedules.lr gives it.
    """

    world_size: int
    batch_size: int
    images_per_rank: int
    micro_batch_size: int
    accumulation_steps: int
    num_images: int
    source_sizes: tuple[int, ...]
    quotas: tuple[int, ...]
    steps_per_epoch: int
    total_steps: int
    stop_step: int
    warmup_steps: int
    freeze_last_layer_steps: int
    peak_lr: float
    min_lr: float


@dataclass(frozen=True)
class ParameterCounts:
    """Scalars in the weights of one network; None where the model has to be built to know.

    Attributes:
        backbone: without a classifier.
        head: of all heads, with the prototypes and their lengths.
    """

    backbone: int | None
    head: int | None


def resolve(config: RunConfig, *, world_size: int, num_images: int | Sequence[int]) -> RunPlan:
    """Work out the run for a number of ranks and images.

    Args:
        config: the configuration.
        world_size: number of ranks, at least 1.
        num_images: images of data.train; of a mixture, those of each source.

    Returns:
        The plan.

    Raises:
        ConfigError: the batch cannot be split over the ranks, there is less than one batch or less
            than `data.subset_size`, a source of a mixture is drawn less than once an epoch, the
            ranks are not whole groups of `engine.zero_hpz_partition_size`, or the run ends before
            there is a Gram network.
    """
    group = config.engine.zero_hpz_partition_size
    if world_size % group:
        raise ConfigError(
            f"engine.zero_hpz_partition_size: {world_size} ranks are not whole groups of {group};"
            " it is the number of ranks of a node, 1 without groups"
        )
    split = split_batch(config, world_size=world_size)
    sizes = (num_images,) if isinstance(num_images, int) else tuple(num_images)
    used = _images_used(config, sizes)
    quotas = _quotas(config, used, world_size=world_size)
    batch_size = config.train.batch_size
    steps_per_epoch = sum(quotas) // batch_size
    total_steps = config.train.epochs * steps_per_epoch
    if config.train.continue_from is None:  # else that run's state may hold a Gram network
        require_gram_network(config, steps_per_epoch)
    stop_after = config.train.stop_after_steps
    return RunPlan(
        world_size=world_size,
        batch_size=batch_size,
        images_per_rank=split.images_per_rank,
        micro_batch_size=split.micro_batch_size,
        accumulation_steps=split.accumulation_steps,
        num_images=sum(used),
        source_sizes=sizes,
        quotas=quotas,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        stop_step=total_steps if stop_after is None else min(stop_after, total_steps),
        warmup_steps=config.warmup_epochs * steps_per_epoch,
        freeze_last_layer_steps=config.dino.freeze_last_layer_epochs * steps_per_epoch,
        peak_lr=config.peak_lr,
        min_lr=config.final_lr,
    )


def require_gram_network(config: RunConfig, steps_per_epoch: int) -> None:
    """Refuse a Gram loss in a run that ends before it has a Gram network, or a curve that asks so.

    Without a curve the loss just begins with the network.

    Raises:
        ConfigError: that is so of a run that begins without a Gram network.
    """
    without, curve = config.gram.steps_without, config.schedules.gram_weight
    if not config.gram.loss_weight or without is None:
        return
    remedy = (
        f"and there is no Gram network before {without} steps are done (gram.first_refresh_step, "
        "gram.refresh_every_steps); refresh earlier, or give gram.teacher"
    )
    total_steps = config.train.epochs * steps_per_epoch
    if without >= total_steps:
        raise ConfigError(f"gram.loss_weight: the run ends after {total_steps} steps, {remedy}")
    if curve is None:
        return
    warmup = curve.warmup_epochs * steps_per_epoch
    asked = warmup + (curve.peak == 0 and curve.cosine_epochs != 0)
    if warmup and (curve.start or curve.peak):
        asked = 0 if curve.start else 1
    if asked < without:
        raise ConfigError(f"schedules.gram_weight: is above 0 after {asked} steps, {remedy}")


def require_groups_within_nodes(config: RunConfig, *, ranks_of_node: int) -> None:
    """Refuse groups of `engine.zero_hpz_partition_size` consecutive ranks that lie on two nodes.

    Raises:
        ConfigError: some do.
    """
    group = config.engine.zero_hpz_partition_size
    if ranks_of_node % group:
        raise ConfigError(
            f"engine.zero_hpz_partition_size: {group} does not divide the {ranks_of_node} ranks of"
            " a node, so some groups would lie on two nodes"
        )


def _images_used(config: RunConfig, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Images of each source that are trained on."""
    wanted = config.data.subset_size
    if wanted is None:
        return sizes
    if wanted > sum(sizes):
        raise ConfigError(
            f"data.subset_size: {wanted} images are more than the {sum(sizes)} in data.train"
        )
    return (wanted,)


def _quotas(config: RunConfig, sizes: tuple[int, ...], *, world_size: int) -> tuple[int, ...]:
    """Draws from each source in an epoch, in whole steps unless an epoch is one permutation."""
    batch_size, data = config.train.batch_size, config.data
    for source, size in zip(data.sources, sizes, strict=False):
        if size == 0:
            raise ConfigError(f"data.train: {source.source} has no images")
    wanted, steps = data.images_per_epoch, config.train.steps_per_epoch
    images = (sum(sizes) if wanted is None else wanted) // batch_size * batch_size
    for key in ("images_per_epoch", "subset_size"):
        given = getattr(data, key)
        if images == 0 and given is not None:
            raise ConfigError(
                f"data.{key}: {given} images do not fill one batch of {batch_size} "
                "(train.batch_size)"
            )
    if images == 0:
        raise ConfigError(_too_few_images(sum(sizes), batch_size, world_size))
    if steps is not None:
        wanted = images = steps * batch_size
    if len(sizes) == 1:
        return sizes if wanted is None else (images,)
    quotas = _shares(images, [Fraction(part.weight) for part in data.sources])
    for part, quota in zip(data.sources, quotas, strict=True):
        if quota == 0:
            raise ConfigError(
                f"data.train: of {images} images an epoch, none would come from {part.source} "
                f"(weight {part.weight:g}); raise its weight or "
                f"{'data.images_per_epoch' if steps is None else 'train.steps_per_epoch'}"
            )
    return quotas


def _shares(images: int, weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Split a number by weights, by largest remainders."""
    exact = [images * weight / sum(weights) for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: images - sum(shares)]:
        shares[i] += 1
    return tuple(shares)


def _too_few_images(num_images: int, batch_size: int, world_size: int) -> str:
    if num_images == 0:
        return "data.train: has no images"
    largest = num_images // world_size * world_size
    remedy = f"lower train.batch_size to {largest} or less" if largest else "use fewer ranks"
    return (
        f"data.train: {num_images} images do not fill one batch of {batch_size} "
        f"(train.batch_size); {remedy}, or add images"
    )


def split_batch(config: RunConfig, *, world_size: int) -> BatchSplit:
    """Split the batch of a step over the ranks, and a rank's share into equal passes.

    Args:
        config: its batch, micro-batch and groups of masks.
        world_size: number of ranks, at least 1.

    Returns:
        The split, with the micro-batch no larger than the rank's share.

    Raises:
        ConfigError: one of the two divisions leaves a remainder, or a micro-batch is not whole
            groups of masks, and the message names the nearest sizes that fit; or the micro-batch is
            `auto`.
        ValueError: world_size is not positive.
    """
    train, share = config.train, _share(config, world_size)
    if train.micro_batch_size == "auto":
        raise ConfigError(
            "train.micro_batch_size: auto is decided when training starts; give a number here, "
            f"at most {share}"
        )
    micro = min(train.micro_batch_size, share)
    nearest = _either(_nearest(micro_batch_sizes(config, world_size=world_size), micro))
    if share % micro:
        raise ConfigError(
            f"train.micro_batch_size: {micro} does not divide the {share} images per rank "
            f"({train.batch_size} images / {world_size} ranks); nearest that do: {nearest}"
        )
    if micro % config.mask_group:
        raise ConfigError(
            f"train.micro_batch_size: {micro} images are not whole groups of {config.mask_group} "
            f"(ibot.mask_group); nearest that are: {nearest}, or set "
            f"ibot.mask_group={math.gcd(micro, config.mask_group)}"
        )
    unit = micro_batch_unit(config, world_size=world_size)
    if micro % unit:
        raise ConfigError(
            f"train.micro_batch_size: {micro} images of each of {world_size} ranks are not whole "
            f"groups of {config.koleo.group_size} (koleo.group_size); nearest that are: {nearest}"
        )
    if micro < (least := least_micro_batch(config, world_size=world_size)):
        raise ConfigError(f"train.micro_batch_size: {_lonely(micro, least=least)}")
    return BatchSplit(share, micro, share // micro)


def micro_batch_sizes(config: RunConfig, *, world_size: int) -> list[int]:
    """The micro-batches into which a rank's share of a step can be split equally, ascending.

    Raises:
        ConfigError: the batch cannot be shared equally by the ranks, in whole groups of masks and
            of KoLeo, or a rank has too few images for KoLeo's neighbours.
    """
    unit = micro_batch_unit(config, world_size=world_size)
    share, least = _share(config, world_size), least_micro_batch(config, world_size=world_size)
    if share < least:
        of_each = f" of each of {world_size} ranks"
        raise ConfigError(f"train.batch_size: {_lonely(share, of_each, least=least)}")
    return [unit * size for size in _divisors(share // unit) if unit * size >= least]


def micro_batch_unit(config: RunConfig, *, world_size: int) -> int:
    """Images of which a micro-batch is a multiple.

    They are whole groups of masks, and with those of all other ranks whole groups of KoLeo.
    """
    group = config.koleo_group
    return math.lcm(config.mask_group, group // math.gcd(group, world_size))


def least_micro_batch(config: RunConfig, *, world_size: int) -> int:
    """A unit, and as many images as KoLeo needs where it looks for neighbours among them alone."""
    least, koleo = micro_batch_unit(config, world_size=world_size), config.koleo
    if not koleo.loss_weight or koleo.scope == "group":
        return least
    ranks = world_size if koleo.scope == "all" else 1
    return max(least, math.ceil((koleo.num_neighbours + 1) / ranks))


def _lonely(images: int, of_each: str = "", *, least: int) -> str:
    few = "1 image{} in a pass has no neighbour"
    if images > 1:
        few = f"{images} images{{}} in a pass have too few neighbours"
    return (
        f"{few.format(of_each)}, which KoLeo looks for; need at least {least}, or "
        "koleo.loss_weight=0"
    )


def with_micro_batch(config: RunConfig, size: int) -> RunConfig:
    """The same run with this micro-batch."""
    train = config.train.model_copy(update={"micro_batch_size": size})
    return config.model_copy(update={"train": train})


def without_auto(config: RunConfig) -> RunConfig:
    """The same run with some micro-batch for `auto`, where the micro-batch does not matter."""
    if config.train.micro_batch_size != "auto":
        return config
    # KoLeo needs several images; a whole step stands for the share of a rank.
    return with_micro_batch(
        config, config.train.batch_size if config.koleo.loss_weight else config.mask_group
    )


def _share(config: RunConfig, world_size: int) -> int:
    """Images of one rank in a step."""
    if world_size < 1:
        raise ValueError(f"need world_size >= 1, got {world_size}")
    batch_size, group = config.train.batch_size, config.mask_group
    share, rest = divmod(batch_size, world_size)
    nearest = _either(_nearest_multiples(batch_size, world_size * group))
    if rest:
        raise ConfigError(
            f"train.batch_size: {batch_size} images cannot be shared equally by "
            f"{world_size} ranks; nearest that can: {nearest}"
        )
    if share % group:
        raise ConfigError(
            f"train.batch_size: the {share} images per rank ({batch_size} images / {world_size} "
            f"ranks) are not whole groups of {group} (ibot.mask_group); nearest that are: "
            f"{nearest}, or set ibot.mask_group={math.gcd(share, group)}"
        )
    unit = micro_batch_unit(config, world_size=world_size)
    if share % unit:
        nearest = _either(_nearest_multiples(batch_size, world_size * unit))
        raise ConfigError(
            f"train.batch_size: {batch_size} images of {world_size} ranks are not whole groups of "
            f"{config.koleo_group} (koleo.group_size); nearest that are: {nearest}"
        )
    return share


def _divisors(value: int) -> list[int]:
    return [size for size in range(1, value + 1) if value % size == 0]


def _nearest_multiples(value: int, unit: int) -> list[int]:
    below = value // unit * unit
    return [below, below + unit]


def _nearest(sizes: Sequence[int], near: int) -> list[int]:
    """The size below and the size above; 0 where there is none."""
    below = max((size for size in sizes if size < near), default=0)
    return [below, min((size for size in sizes if size > near), default=0)]


def _either(sizes: list[int]) -> str:
    return " or ".join(str(size) for size in sizes if size)


def count_parameters(config: RunConfig) -> ParameterCounts:
    """Count the student's weights without building it; adapters (lora.rank) are left out.

    Args:
        config: the configuration.

    Returns:
        The counts of backbone and heads, with the maps to a frozen teacher's width; the teacher has
        as many.
    """
    embed_dim = config.model.width
    if embed_dim is None:
        return ParameterCounts(None, None)
    heads = (config.head, config.patch_head) if config.has_heads else ()
    maps = len(config.distill.feature_weights) * (config.of_teacher.model.width or 0)
    return ParameterCounts(
        backbone=_num_backbone_parameters(config),
        head=maps * (embed_dim + 1)
        + sum(
            num_head_parameters(
                in_dim=embed_dim,
                num_prototypes=head.num_prototypes,
                hidden_dim=head.hidden_dim,
                bottleneck_dim=head.bottleneck_dim,
                num_layers=head.num_layers,
                batch_norm=head.batch_norm,
                weight_norm=head.weight_norm,
            )
            for head in heads
            if head is not None
        ),
    )


def _num_backbone_parameters(config: RunConfig) -> int | None:
    model = config.model
    if model.backbone == RESNET50:
        return RESNET50_PARAMETERS + (config.data.channels - 3) * RESNET50_PER_CHANNEL
    named, patch_size = named_vit_size(model.backbone), model.effective_patch_size
    layers = model.layers
    if named is None or layers is None or patch_size is None:
        return None
    return num_vit_parameters(
        img_size=config.crops.global_size,
        patch_size=patch_size,
        embed_dim=layers.embed_dim,
        depth=layers.depth,
        in_chans=config.data.channels,
        layer_scale=layers.layer_scale,
        ffn=layers.ffn,
        ffn_ratio=layers.ffn_ratio,
        ffn_multiple=layers.ffn_multiple,
        registers=layers.registers,
        rope=layers.rope,
        qkv_bias=layers.qkv_bias,
        local_norm=model.local_norm,
        class_position=not named.registers or model.registers is not None,
        mask_token=config.ibot.loss_weight > 0,
    )


def describe(config: RunConfig, plan: RunPlan | None) -> dict[str, object]:
    """Return everything known about a run before it starts, ready for JSON.

    Args:
        config: the configuration.
        plan: its plan (of `without_auto`), or None while the number of images is unknown.

    Returns:
        `config` (sections by key), `plan` (values by name, or None) and `parameters` (scalars in
        `backbone` and `head` of the student, each None if unknown).
    """
    return {
        "config": config.model_dump(mode="json"),
        "plan": None if plan is None else _values(config, plan),
        "parameters": asdict(count_parameters(config)),
    }


def comments_on(
    config: RunConfig, plan: RunPlan | None, error: DinoscaleError | None = None, *, of: str = ""
) -> str:
    """Return what follows from a configuration for people, as comments under its YAML.

    `error` says why there is no plan. `of` precedes the names: of a phase, its name and a dot.
    """
    counts = asdict(count_parameters(config))
    lines = [f"# {of}parameters.{name}: {_or_unknown(count)}" for name, count in counts.items()]
    if plan is None:
        why = " ".join(str(error or _NO_IMAGES).split())  # in one line, as a comment is
        lines.append(f"# {of}plan: none: {why}")
    else:
        lines += [f"# {of}plan.{name}: {value}" for name, value in _values(config, plan).items()]
    return "\n".join(lines) + "\n"


def _values(config: RunConfig, plan: RunPlan) -> dict[str, object]:
    """Values of the plan by name; `auto` for what is found when training starts."""
    values = asdict(plan)
    if config.train.micro_batch_size == "auto":
        values |= {"micro_batch_size": "auto", "accumulation_steps": "auto"}
    return values


def _or_unknown(count: int | None) -> str:
    return "not known before the model is built" if count is None else f"{count:,}"
