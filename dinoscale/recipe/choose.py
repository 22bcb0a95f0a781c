"""A preset for an image set: each value with its reason and where it comes from.

Sources in the reasons: [C] code of DINO (arXiv:2104.14294) and its published runs, [D] ours.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass

from data_tools.set_facts import SetFacts
from dinoscale.config import ModelConfig
from dinoscale.convert.card import BackboneCard, BackboneShape
from dinoscale.errors import ConfigError

MODELS = ("s", "b", "l")
_PUBLISHED_IMAGES = 1_281_167  # of ImageNet-1k, for which the presets were made
_PUBLISHED_SIDE = 224
_STEPS = 50_000  # 40 epochs of ImageNet-1k with 1024 images a step
_EPOCHS = (100, 800)  # shortest and longest published run on ImageNet-1k
_FEW = 20_000  # images, below which released weights are the better start
_COPIES = 0.01  # share of copies in the whole set from which they are worth a warning
_UNSEEN = 0.25  # share of copies that a sample must not overlook
_COLORED = 0.01  # share of images with color, up to which a set is gray
_BOTH = 0.05  # share of gray and of colored images, from which a set is a mixture
_PATCHES = 16  # along a global crop of DINOv2 and DINOv3
_PHASES = (20, 50)  # epochs of base/adapt.yaml, of
_EPOCH_STEPS = 500  # steps each
_MOST_PASSES = (
    200  # over the images when going on, where published runs from scratch make 100 to 800
)
_GUARDED = 50  # measurements of the guard in a run from scratch, and
_LEAST_GUARD_STEPS = 100  # steps between two of any run: each writes a checkpoint
_LEAST_STD = 0.004  # a level of 255, in which pixels are counted
_MASK_GROUP = 4  # ibot.mask_group of base/adapt.yaml
_BAD = 0.001  # default of data.max_bad_fraction


@dataclass(frozen=True)
class Setting:
    """A value of the preset."""

    key: str  # section.key
    value: object
    why: str


@dataclass(frozen=True)
class Recipe:
    """A preset: what it inherits from, what it changes, and what to look at first."""

    base: str
    settings: tuple[Setting, ...]
    cautions: tuple[str, ...]


def choose(
    facts: SetFacts,
    *,
    model: str | None = None,
    gpus: int = 1,
    weights: str | None = None,
    card: BackboneCard | None = None,
) -> Recipe:
    """Choose settings for a set.

    Args:
        facts: of the set.
        model: one of MODELS; None chooses by the number of images, or takes that of the weights.
        gpus: of the run; the images of a step are a multiple of it.
        weights: to go on from; None trains from scratch.
        card: of the weights.

    Raises:
        ConfigError: the weights are of a ResNet, a model is given beside weights, or there are no
            GPUs, or more than the images suffice for.
    """
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: need at least 1")
    if card is None:
        base, settings = _from_scratch(facts, model=model, gpus=gpus)
    else:
        assert weights is not None
        if model is not None:
            raise ConfigError(f"--model {model}: --from {weights} says which model it is")
        base, settings = _going_on(facts, weights, card, gpus=gpus)
    return Recipe(base, tuple(settings), tuple(_cautions(facts, card)))


def _from_scratch(facts: SetFacts, *, model: str | None, gpus: int) -> tuple[str, list[Setting]]:
    if model is None:
        model = "s" if facts.images <= _PUBLISHED_IMAGES else "b"
    batch = _batch(facts.images, gpus)
    steps = max(1, facts.images // batch)
    epochs = min(max(math.ceil(_STEPS / steps), _EPOCHS[0]), _EPOCHS[1])
    settings = [
        Setting(
            "head.num_prototypes",
            prototypes(facts.images),
            "a twelfth of the images, as a power of two from 1024 to 65536: between 4096 for the"
            " 50,000 of CIFAR-10 [D] and 65536 for the 1.28 M of ImageNet [C]",
        ),
        *_crops(facts.short_side[1]),
        Setting(
            "train.batch_size",
            batch,
            "a hundredth of the images [D], as a power of two from 64 to 1024, which is ImageNet's"
            " [C], and a multiple of the GPUs",
        ),
        Setting(
            "train.epochs",
            epochs,
            f"{epochs * steps:,} steps: as many epochs as {_STEPS:,} steps need [D], from"
            f" {_EPOCHS[0]} to {_EPOCHS[1]}, the shortest and the longest published run; longer is"
            " better",
        ),
        Setting(
            "train.micro_batch_size", "auto", "the largest that fits, found before the training"
        ),
        *_momentum(batch, epochs * steps),
        *_pixels(facts, channels=_channels(facts), why=_why_channels(facts)),
        *_guard(
            facts,
            every_steps=epochs * steps // _GUARDED,
            why="fifty times a run, or every 100 steps [D]: a teacher whose features lose a tenth"
            " of their effective rank is a warning (guard.on_fall), which needs no labels",
        ),
    ]
    return f"vit_{model}16", settings


def prototypes(images: int) -> int:
    """Prototypes for so many images."""
    power: int = min(max(round(math.log2(images / 12)), 10), 16)
    return 1 << power


def _batch(images: int, gpus: int, *, group: int = 1, most: int = 1024) -> int:
    """Images of a step: as the reason of train.batch_size says, but no more than there are.

    Args:
        images: of the set.
        gpus: each of which takes the same number.
        group: of which that is a multiple.
        most: images of a step, before it is rounded up.

    Raises:
        ConfigError: there are fewer images than the GPUs take at least.
    """
    unit, hundredth = gpus * group, int(math.log2(max(images / 100, 1)))
    if unit > images:
        few = images // group
        remedy = f"use {few} GPU{'s' * (few > 1)} or fewer" if few else "add images"
        raise ConfigError(
            f"--gpus {gpus}: a step takes {unit} images or more, of {images}; {remedy}"
        )
    size = min(1 << min(max(hundredth, 6), 10, int(math.log2(images))), most)
    rounded = -(-size // unit) * unit
    return rounded if rounded <= images else images // unit * unit


def _momentum(batch: int, steps: int) -> list[Setting]:
    if steps < _STEPS:
        why = "a teacher that follows within 100 steps, for a run of few steps [D]"
        return [Setting("dino.momentum", 0.99, why)]
    if batch <= 256:
        why = "the authors' advice for 256 images a step and fewer [C]"
        return [Setting("dino.momentum", 0.9995, why)]
    return []  # 0.996, the preset's


def _guard(facts: SetFacts, *, every_steps: int, why: str) -> list[Setting]:
    """The guard, on the images themselves, as no others are known; it compares at least two."""
    if facts.images < 2:
        return []
    return [
        Setting("guard.every_steps", max(every_steps, _LEAST_GUARD_STEPS), why),
        Setting(
            "guard.images",
            facts.spec,
            "a fixed choice of these (guard.num_images), as no others are known here; better are"
            " some that are kept apart. Labels are not read",
        ),
    ]


def _crops(side: int) -> list[Setting]:
    """Crops and patches for images of such a short side, in pixels."""
    if side * 4 >= _PUBLISHED_SIDE * 3:
        return []
    patch = 8 if side >= 96 else 4
    size = max(side // patch, 8) * patch
    local = max(round(size * 96 / _PUBLISHED_SIDE / patch), 3) * patch
    what = f"the images have {side} px, in the median"
    return [
        Setting(
            "model.patch_size", patch, f"{(size // patch) ** 2} patches of a global crop; {what}"
        ),
        Setting("crops.global_size", size, f"larger ones would only be blurred; {what}"),
        Setting("crops.local_size", local, "96 of 224 px, as published [C], in whole patches"),
        Setting(
            "crops.global_scale", [0.4, 1.0], "of small images little is left of smaller parts [D]"
        ),
        Setting("crops.local_scale", [0.1, 0.4], "likewise [D]"),
        Setting("augment.blur_probs", [0.5, 0.1, 0.0], "a blur leaves nothing of a small crop [D]"),
        Setting("augment.blur_radius", [0.1, 1.0], "likewise [D]"),
        Setting("eval.resize", size, "as the global crops"),
        Setting("eval.crop", size, "as the global crops"),
    ]


def _going_on(
    facts: SetFacts, weights: str, card: BackboneCard, *, gpus: int
) -> tuple[str, list[Setting]]:
    shape = card.backbone
    layers, patch = _layers(shape), _patch_of(card)
    if patch is None:
        raise ConfigError(
            f"--from {weights}: a {shape.name} has no patches, which the recipe for going on masks;"
            " choose weights of a ViT"
        )
    base = "adapt_dinov3_vits16" if _model_of(card).rotates else "adapt_dinov2_vits14"
    batch = _batch(facts.images, gpus, group=_MASK_GROUP, most=768)
    settings = [
        Setting("train.init_from", weights, "the weights to go on from"),
        Setting("model.backbone", shape.name, "what they are"),
        *(Setting(f"model.{key}", value, "theirs") for key, value in layers.items()),
        Setting("crops.global_size", _PATCHES * patch, "16 x 16 patches, as DINOv2 and DINOv3"),
        Setting("crops.local_size", 7 * patch, "7 x 7 patches, as DINOv2 and DINOv3"),
        *(
            Setting(
                f"{head}.num_prototypes", prototypes(facts.images), "by the images, 1024 to 65536"
            )
            for head in ("head", "patch_head")
        ),
        Setting(
            "train.batch_size",
            batch,
            "768 as published for 8 GPUs, or fewer by the images, in whole groups of"
            f" {_MASK_GROUP} on each GPU (ibot.mask_group)",
        ),
        Setting("train.micro_batch_size", "auto", "the largest that fits"),
        Setting("train.steps_per_epoch", *_epoch_steps(facts.images, batch)),
        *_pixels_of(card, facts),
        Setting("eval.resize", card.resize, "theirs"),
        Setting("eval.crop", card.crop, "theirs"),
        *_guard(
            facts,
            every_steps=_epoch_steps(facts.images, batch)[0],
            why="an epoch here, or 100 steps [D]: features that get worse than those of the weights"
            " are a warning (guard.on_fall), and the best teacher is kept as best.safetensors",
        ),
    ]
    return base, settings


def _epoch_steps(images: int, batch: int) -> tuple[int, str]:
    """Steps of an epoch when going on, and why so many."""
    epochs = sum(_PHASES)
    steps = min(_EPOCH_STEPS, max(1, _MOST_PASSES * images // (batch * epochs)))
    passes, total = steps * epochs * batch / images, steps * epochs
    length = f"{total:,} steps in {epochs} epochs, {passes:,.1f} times all images"
    if steps == _EPOCH_STEPS:
        return steps, f"{length}: as in base/adapt.yaml"
    return steps, (
        f"{length}: {_EPOCH_STEPS}, as in base/adapt.yaml, would be more than {_MOST_PASSES} times"
        " [D]; warm-ups shorten with it"
    )


def _patch_of(card: BackboneCard) -> int | None:
    """Pixels along a side, of the card or of the name of its model; None without patches."""
    return _model_of(card).effective_patch_size


def _model_of(card: BackboneCard) -> ModelConfig:
    shape = card.backbone
    return ModelConfig.model_validate({"backbone": shape.name, **_layers(shape)})


def _pixels_of(card: BackboneCard, facts: SetFacts) -> list[Setting]:
    """Channels and normalisation of the weights, unless files cannot be read as such channels."""
    channels = card.backbone.in_chans
    if channels == 1 < _channels(facts) and _readable_as(3, facts):
        why = "the images have color, which the one channel of the weights would drop"
        return _pixels(facts, channels=3, why=why)
    if not _readable_as(channels, facts):
        why = (
            f"as stored: such files cannot be read as the {channels} of the weights, whose first"
            " layer is adapted; each channel gets the mean of theirs"
        )
        return _pixels(facts, channels=facts.channels, why=why)
    found = [
        Setting("data.channels", channels, "theirs"),
        Setting("data.mean", list(card.mean), "theirs: their first layer has learned with it"),
        Setting("data.std", list(card.std), "theirs"),
        *_color_ops(channels),
    ]
    return found if facts.max_pixel_value is None else [*found, _white(facts.max_pixel_value)]


def _readable_as(channels: int, facts: SetFacts) -> bool:
    """Whether a decoder makes so many channels of most files."""
    if channels == facts.channels:
        return True
    return {channels, facts.channels} <= {1, 3} and not facts.arrays


def _layers(shape: BackboneShape) -> dict[str, object]:
    """What `model` says of a backbone beside its name, where it is not the name's own."""
    values = {key: value for key, value in asdict(shape).items() if value is not None}
    return {key: values[key] for key in ModelConfig.model_fields if key in values}


def _pixels(facts: SetFacts, *, channels: int, why: str) -> list[Setting]:
    mean, std = list(facts.mean), list(facts.std)
    if channels == 1:
        mean, std = mean[:1], std[:1]
    found = [
        Setting("data.channels", channels, why),
        Setting("data.mean", mean, f"of {facts.sample - facts.unreadable} of the images"),
        Setting(
            "data.std",
            [max(value, _LEAST_STD) for value in std],
            "likewise" if min(std) >= _LEAST_STD else "likewise, but at least a level of 255",
        ),
        *_color_ops(channels),
    ]
    return found if facts.max_pixel_value is None else [*found, _white(facts.max_pixel_value)]


def _color_ops(channels: int) -> list[Setting]:
    if channels in (1, 3):
        return []
    return [Setting("data.color_ops_on", "device", "colors of other channels change there only")]


def _channels(facts: SetFacts) -> int:
    """Channels for the set: one where nearly all is gray."""
    if facts.channels not in (1, 3) or facts.arrays:
        return facts.channels
    return 1 if 1 - facts.colorless <= _COLORED else 3


def _why_channels(facts: SetFacts) -> str:
    if _channels(facts) == 1 and facts.channels == 3:
        return "the images of the sample are gray, though stored with three channels"
    if _channels(facts) == 3 and facts.channels == 1:
        return "most files are gray; RGB holds the colored ones, too"
    return "as stored in most files"


def _white(value: float) -> Setting:
    return Setting("data.max_pixel_value", value, "white, by the highest pixel: check it")


def _cautions(facts: SetFacts, card: BackboneCard | None) -> list[str]:
    found = [] if card is None else _cautions_on(facts, card)
    if card is None and facts.images < _FEW:
        found.append(
            f"{facts.images:,} images are few to learn from scratch: released weights are the"
            " better start where they fit the images (--from WEIGHTS)."
        )
    found += _cautions_of_copies(facts)
    if facts.unreadable > _BAD * facts.sample:
        found.append(
            f"{facts.unreadable} of {facts.sample} images cannot be read: see `dinoscale data"
            f" inspect-shards {shlex.quote(facts.spec)}`, remove them, or raise"
            " data.max_bad_fraction, above which a run ends."
        )
    if flat := [number for number, value in enumerate(facts.std) if value < _LEAST_STD]:
        found.append(
            f"channels {flat}, counted from 0, are nearly the same in all pixels of the sample: are"
            " these the right images, and is data.max_pixel_value their white?"
        )
    if facts.mixed_scales:
        found.append(
            f"{facts.mixed_scales}: no one number is white, so that each image is scaled by its own"
            " range, and brightness does not compare between images. Store them on one scale from"
            " 0, and set data.max_pixel_value."
        )
    return [*found, *_cautions_of_channels(facts, card), *_cautions_of_labels(facts)]


def copies_of_the_set(facts: SetFacts) -> tuple[float, float, float]:
    """Share of copies in the whole set, and an interval of about 95 %.

    A copy shows only if its original is in the sample, too. A pair of N images is with n of them
    with probability n (n - 1) / (N (N - 1)), so that c pairs stand for c N (N - 1) / (n (n - 1)).
    The interval is that of a Poisson number, c + 2 -+ 2 sqrt(c + 1). Many copies of one image make
    more pairs than copies: then the estimate is too high, and ends at 1.
    """
    read, whole = facts.sample - facts.unreadable, facts.images
    if facts.sample == whole or read < 2:
        return (facts.copies / max(read, 1),) * 3
    each = (whole - 1) / (read * (read - 1))  # share of the set that a pair stands for
    middle, spread = facts.copies + 2, 2 * math.sqrt(facts.copies + 1)
    low, high = (min(pairs * each, 1.0) for pairs in (middle - spread, middle + spread))
    return min(facts.copies * each, 1.0), low, high


def _cautions_of_copies(facts: SetFacts) -> list[str]:
    share, low, high = copies_of_the_set(facts)
    command = f"`dinoscale data deduplicate {shlex.quote(facts.spec)}`"
    if share > _COPIES:
        whole = f"about {share:.0%} of the whole set are copies ({low:.0%} to {high:.0%})"
        if low == high:
            whole = "all were looked at"
        return [
            f"{facts.copies} of {facts.sample} images look like another one of them; {whole}: see"
            f" {command}."
        ]
    if high > _UNSEEN:
        enough = math.ceil(math.sqrt(4 * facts.images / _UNSEEN) / 1000) * 1000
        return [
            f"{facts.sample} of {facts.images:,} images do not show copies, of which there may be"
            f" many: look at more (--images {enough}), or see {command}."
        ]
    return []


def _cautions_of_channels(facts: SetFacts, card: BackboneCard | None) -> list[str]:
    """Files that are not as most, and colors that are dropped."""
    if facts.channels not in (1, 3) or facts.arrays:
        return [
            f"some files have other channels than {facts.channels}: those of arrays cannot be read"
            " then, and pictures lose their color where that is 1."
        ] * bool(facts.other_channels)
    read = facts.sample - facts.unreadable
    colored = round((1 - facts.colorless) * read)
    gray = f"{read - colored} of {read} images are gray, {colored} have color"
    channels = _channels(facts) if card is None else card.backbone.in_chans
    if channels == 1 == _channels(facts) and colored:
        return [f"{gray}, which data.channels=1 drops; 3 keeps it."]
    if min(colored, read - colored) > _BOTH * read:
        return [f"{gray}: all are read as RGB, and features may group them by that alone."]
    return []


def _cautions_of_labels(facts: SetFacts) -> list[str]:
    found = []
    if facts.classes > 1:
        found.append(
            f"there are {facts.classes} classes: set eval.train and eval.test to labelled images"
            " that are kept apart from these, and the run measures k-NN."
        )
    return found


def _cautions_on(facts: SetFacts, card: BackboneCard) -> list[str]:
    """What going on from weights does to the images."""
    found, channels = [], card.backbone.in_chans
    if not _readable_as(channels, facts):
        found.append(
            f"the weights see {channels} channels and the images have {facts.channels}: the first"
            " layer starts as the mean over the channels of the weights, so that what it knows of"
            " color is lost."
        )
    side, crop = facts.short_side[1], _PATCHES * (_patch_of(card) or 1)
    if side * 4 < crop * 3:
        found.append(
            f"crops of {crop} px enlarge the images, {side} px in the median, {crop / side:.2g}"
            f" times, as the patches of the weights have {crop // _PATCHES} px. Fewer patches"
            " (crops.global_size) are cheaper and coarser; from scratch, patches can be smaller."
        )
    return found
