"""A preset for an image set: each value with its reason and where it comes from.

Sources in the reasons: [C] code of DINO (arXiv:2104.14294) and its published runs, [D] ours.
"""

from __future__ import annotations

import math
from dataclasses import asdict

from data_tools.set_facts import SetFacts
from dinoscale.config import ModelConfig
from dinoscale.convert.card import BackboneCard, BackboneShape
from dinoscale.errors import ConfigError
from dinoscale.recipe.cautions import cautions
from dinoscale.recipe.pixels import pixels_of_set, pixels_of_weights
from dinoscale.recipe.preset import Recipe, Setting

MODELS = ("s", "b", "l")
_PUBLISHED_IMAGES = 1_281_167  # of ImageNet-1k, for which the presets were made
_PUBLISHED_SIDE = 224
_STEPS = 50_000  # 40 epochs of ImageNet-1k with 1024 images a step
_EPOCHS = (100, 800)  # shortest and longest published run on ImageNet-1k
_PATCHES = 16  # along a global crop of DINOv2 and DINOv3
_PHASES = (20, 50)  # epochs of base/adapt.yaml, of
_EPOCH_STEPS = 500  # steps each
_MOST_PASSES = 200  # over all images when going on; published runs from scratch make 100 to 800
_GUARDED = 50  # measurements of the guard in a run, about
_LEAST_GUARD_STEPS = 100  # between two of them
_MASK_GROUP = 4  # ibot.mask_group of base/adapt.yaml


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
        found = cautions(facts)
    else:
        assert weights is not None
        if model is not None:
            raise ConfigError(f"--model {model}: --from {weights} says which model it is")
        crop = _PATCHES * _patch_of(weights, card)
        base, settings = _going_on(facts, weights, card, gpus=gpus)
        found = cautions(facts, card=card, crop=crop)
    return Recipe(base, tuple(settings), tuple(found))


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
        *pixels_of_set(facts),
        *_guard(
            facts,
            epochs=epochs,
            epoch_steps=steps,
            why="a teacher whose features lose a tenth of their effective rank is a warning"
            " (guard.on_fall), which needs no labels",
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


def _guard(facts: SetFacts, *, epochs: int, epoch_steps: int, why: str) -> list[Setting]:
    """The guard, on the images themselves, as no others are known; it compares at least two."""
    if facts.images < 2:
        return []
    between = max(epochs // _GUARDED, math.ceil(_LEAST_GUARD_STEPS / epoch_steps))
    return [
        Setting(
            "guard.every_steps",
            between * epoch_steps,
            f"{between} epoch{'s' * (between > 1)} [D], which end with a checkpoint anyway: {why}",
        ),
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
    layers, patch = _layers(shape), _patch_of(weights, card)
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
        *pixels_of_weights(card, facts),
        Setting("eval.resize", card.resize, "theirs"),
        Setting("eval.crop", card.crop, "theirs"),
        *_guard(
            facts,
            epochs=sum(_PHASES),
            epoch_steps=_epoch_steps(facts.images, batch)[0],
            why="features that get worse than those of the weights are a warning (guard.on_fall),"
            " and the best teacher is kept as best.safetensors",
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


def _patch_of(weights: str, card: BackboneCard) -> int:
    """Pixels along a side of a patch, of the card or of the name of its model."""
    patch = _model_of(card).effective_patch_size
    if patch is None:
        raise ConfigError(
            f"--from {weights}: a {card.backbone.name} has no patches, which the recipe for going"
            " on masks; choose weights of a ViT"
        )
    return patch


def _model_of(card: BackboneCard) -> ModelConfig:
    shape = card.backbone
    return ModelConfig.model_validate({"backbone": shape.name, **_layers(shape)})


def _layers(shape: BackboneShape) -> dict[str, object]:
    """What `model` says of a backbone beside its name, where it is not the name's own."""
    values = {key: value for key, value in asdict(shape).items() if value is not None}
    return {key: values[key] for key in ModelConfig.model_fields if key in values}
