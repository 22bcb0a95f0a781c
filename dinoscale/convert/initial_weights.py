"""Weights of any source, adapted to a run before its first step.

Those of `train.init_from`, `gram.teacher` and `distill.teacher`.

Position embeddings are resized as the forward resizes them, bicubic and by the reference's rule, so
that features at the new size are those of the source's backbone at that size, see `step_zero`. If
the number of input channels differs, each of the C channels of the first layer gets the mean over
the source's C' channels times C' / C: a gray image has the same response as before. timm cycles
through the channels with the same factor; the mean does not depend on their order.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinoscale.config import RunConfig
from dinoscale.config.sections.lora import LoraConfig
from dinoscale.convert.card import BackboneCard
from dinoscale.convert.coverage import Coverage, coverage_of
from dinoscale.convert.fitted_heads import fitted_head, fitted_teacher_heads
from dinoscale.convert.formats.convnets import BATCH_COUNT
from dinoscale.convert.formats.dinov3 import without_masked_bias
from dinoscale.convert.formats.special_tokens import slot_added, slot_removed
from dinoscale.convert.source import read_source
from dinoscale.convert.step_zero import compare_at_start, input_channels
from dinoscale.convert.weights import Weights
from dinoscale.convert.weights_file import build
from dinoscale.engine.build import InitialWeights, StepZero, shapes_only
from dinoscale.errors import CheckpointError, ConfigError
from dinoscale.models.block import KeylessBias
from dinoscale.models.convnet import ConvNet
from dinoscale.models.network import MAPS, DinoNetwork
from dinoscale.models.vit import VisionTransformer
from dinoscale.runtime import distributed
from dinoscale.runtime.outputs import is_phase

log = logging.getLogger(__name__)

_FROZEN = "distill.teacher"
# Of a ViT, a ResNet and a ConvNeXt.
_FIRST_LAYERS = ("patch_embed.proj.weight", "conv1.weight", "stem.0.weight")


def read_initial_weights(
    config: RunConfig, heartbeat: Callable[[], None] = lambda: None
) -> InitialWeights | None:
    """Read the weights of `train.init_from`; None where a run starts from random ones.

    Rank 0 reads them, once for the whole job; other ranks get None, and `build_pair` distributes
    them. `heartbeat` is called regularly while they are read.

    Raises:
        CheckpointError: they cannot be read, or do not match their own description.
        ConfigError: they do not fit the run's architecture, or with train.init_head its head.
    """
    path = config.train.init_from
    if path is None or distributed.rank() != 0:
        return None
    plain = config.model_copy(update={"lora": LoraConfig()})  # adapters begin anew
    network = shapes_only(plain)
    weights, state, coverage, step_zero = _read_backbone(
        path, network.backbone, config, heartbeat, key="train.init_from"
    )
    heads: dict[str, Any] = {}
    if config.train.init_head and network.head is not None:
        remedy = "set train.init_head=false to start with a random one"
        fitted = partial(fitted_head, path=path, key="train.init_head", remedy=remedy)
        heads["head"] = fitted(weights.head, network.head.state_dict(), section="head")
        if network.patch_head is not None:
            heads["patch_head"] = fitted(
                weights.patch_head, network.patch_head.state_dict(), section="patch_head"
            )
        elif weights.patch_head:
            log.info("the patch tokens' own head of %s is left out: this run has none", path)
    elif config.train.init_head:
        log.info("train.init_head takes no projection head of %s: this run has none", path)
    elif weights.head or weights.patch_head:
        log.info("the projection head of %s is left out; train.init_head=true takes it", path)
    heads["maps"] = _fitted_maps(weights.maps, network, path, wanted=config.train.init_head)
    log.info("starting from %s: %s of its backbone", path, coverage)
    if weights.card.licence is not None:
        log.info("%s", weights.card.licence)
    return InitialWeights(state, **heads, step_zero=step_zero, licence=weights.card.licence)


def initial_weights_caution(config: RunConfig, then: Mapping[str, Any]) -> str | None:
    """A warning if a run that goes on names other initial weights than those it began with.

    Args:
        config: of the run.
        then: configuration in the checkpoint that it goes on from.

    Returns:
        A sentence; None if nothing has changed, or for a phase, which begins where another ended.
    """
    train, here = then.get("train", {}), config.train
    before = train.get("init_from"), bool(train.get("init_head", False))
    if before == (here.init_from, here.init_head) or is_phase(Path(here.init_from or "")):
        return None
    return (
        f"train.init_from={here.init_from or 'null'} with init_head={here.init_head} is not read:"
        f" the run began with {before[0] or 'null'} and init_head={before[1]}, and goes on from its"
        " checkpoint; to begin with other weights, choose another run_dir, or move"
        f" {config.run_dir}/checkpoints away"
    )


def read_gram_weights(
    config: RunConfig, heartbeat: Callable[[], None] = lambda: None
) -> InitialWeights | None:
    """The backbone of `gram.teacher`; None where it is null, or on other ranks.

    Arguments and errors as of `read_initial_weights`.
    """
    path = config.gram.teacher
    if path is None or distributed.rank() != 0:
        return None
    target = shapes_only(config).backbone
    weights, state, coverage, _ = _read_backbone(
        path, target, config, heartbeat, key="gram.teacher"
    )
    log.info("the Gram network is that of %s: %s of its backbone", path, coverage)
    if weights.card.licence is not None:
        log.info("%s", weights.card.licence)
    return InitialWeights(state, licence=weights.card.licence)


def read_frozen_teacher(
    config: RunConfig, heartbeat: Callable[[], None] = lambda: None
) -> InitialWeights | None:
    """Backbone, heads and identity of `distill.teacher`; None where it is null, or on other ranks.

    Arguments and errors as of `read_initial_weights`.
    """
    path = config.distill.teacher
    if path is None or distributed.rank() != 0:
        return None
    network = shapes_only(config.of_teacher)
    weights, state, coverage, _ = _read_backbone(
        *(path, network.backbone, config.of_teacher, heartbeat),
        key=_FROZEN,
        section="distill.model",
        others=sorted({run.crops.global_size for run in config.of_sizes}),
    )
    licence = weights.card.licence
    if licence is not None:
        log.info("%s", licence)
    if config.distill.by_features:
        log.info("the frozen teacher is %s: %s of its backbone", path, coverage)
        identity = identity_of({"backbone": _of_features(weights)}, heartbeat)
        return InitialWeights(state, licence=licence, identity=identity)
    remedy = (
        "give weights that have it, such as a run or a training checkpoint, or learn features "
        "without heads (distill.class_feature_weight, distill.patch_feature_weight)"
    )
    given = {"head": weights.head, "patch_head": weights.patch_head}
    heads = fitted_teacher_heads(config, given, path=path, key=_FROZEN, remedy=remedy)
    log.info("the frozen teacher is %s: %s of its backbone, and its heads", path, coverage)
    identity = identity_of(weights.parts(), heartbeat)
    return InitialWeights(state, *heads, licence=licence, identity=identity)


def identity_of(
    parts: Mapping[str, Mapping[str, Tensor]], heartbeat: Callable[[], None] = lambda: None
) -> str:
    """Digest of the values of weights, whatever their format and the size of images.

    Args:
        parts: tensors of each network by name, of any float dtype.
        heartbeat: called after each tensor.

    Returns:
        SHA-256 in hexadecimal of names, shapes and values in float32.
    """
    digest = hashlib.sha256()
    for part, state in sorted(parts.items()):
        for name, value in sorted(state.items()):
            digest.update(f"{part}.{name} {[*value.shape]}\n".encode())
            digest.update(value.detach().float().contiguous().numpy().data)
            heartbeat()
    return digest.hexdigest()


def _of_features(weights: Weights) -> dict[str, Tensor]:
    """The tensors that features are computed from, float32, as every format that holds them has.

    Formats differ in what does not act: a mask token, a norm of local crops, layer scales of ones,
    a masked bias of keys and the count of a batch norm's batches; and some add the class token's
    position to the class token.
    """
    state = {
        name: value.detach().float()
        for name, value in without_masked_bias(weights).backbone.items()
        if name != "mask_token"
        and not name.startswith("local_norm.")
        and not name.endswith(f".{BATCH_COUNT}")
        and not _scales_by_one(name, weights.backbone)
    }
    positions = state.get("pos_embed")
    if positions is not None and math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]:
        return slot_removed(state)  # a square of patches, and one more
    return state


def _read_backbone(
    path: str,
    target: VisionTransformer | ConvNet,
    config: RunConfig,
    heartbeat: Callable[[], None],
    *,
    key: str,
    section: str = "model",
    others: Sequence[int] = (),
) -> tuple[Weights, dict[str, Tensor], Coverage, StepZero]:
    """The weights at `path`, those that fit `target`, how many these are, and what they compute.

    Args:
        path: any source.
        target: the run's backbone, on the meta device; it gets the tensors.
        config: of the run.
        heartbeat: called regularly.
        key: the setting that names the path.
        section: that of the settings of `target`.
        others: sides in pixels of crops of which other features are only warned of.

    Raises:
        ConfigError: they do not fit, or the run's backbone would compute other features.
    """
    weights = read_source(path, heartbeat=heartbeat)
    try:
        source, coverage = build(weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    state = _fitted_backbone(source, target, config, path=path, key=key, section=section)
    _warn_if_position_rules_differ(source, target, key, section)
    _warn_if_normalisation_differs(weights.card, config, key)
    side = config.crops.global_size
    step_zero = compare_at_start(source, target, state, size=side, heartbeat=heartbeat)
    if not step_zero.difference <= step_zero.bound:  # NaN is refused, too
        raise ConfigError(
            f"{key}: the run's backbone would not compute the features of {path}, but others that "
            f"differ by {step_zero.difference:.2g} of their length, where rounding explains "
            f"{step_zero.bound:.1g}; {_remedy(source, target, section)}"
        )
    if isinstance(source, VisionTransformer) and source.rope is None:
        for size in (size for size in others if size != side):
            found = compare_at_start(source, target, state, size=size, heartbeat=heartbeat)
            _warn_of_resized_twice(found, key, size, stored=side, there=weights.card)
    return weights, state, coverage, step_zero


def _fitted_backbone(
    source: VisionTransformer | ConvNet,
    target: VisionTransformer | ConvNet,
    config: RunConfig,
    *,
    path: str,
    key: str,
    section: str,
) -> dict[str, Tensor]:
    """Every tensor of `target`, which is on the meta device, taken from `source`."""
    there, here = _sizes(source), _sizes(target)
    state, wanted = source.state_dict(), target.state_dict()
    if isinstance(source, VisionTransformer):
        side = config.crops.global_size
        if there == here:
            if "pos_embed" in wanted:
                state["pos_embed"] = source.positions(height=side, width=side)
            state = _with_special_tokens_of(wanted, state, key)
    for name in state.keys() & set(_FIRST_LAYERS):
        state[name] = adapted_channels(state[name], config.data.channels)
    coverage = coverage_of(state, wanted)
    if there != here or not coverage.complete:
        raise ConfigError(
            f"{key}: {path} holds a {there}, and the run's {section}.backbone "
            f"{config.model.backbone!r} is a {here} ({coverage}); change {section}.*, or the file"
        )
    return state


def _with_special_tokens_of(
    wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], key: str
) -> dict[str, Tensor]:
    """Tensors of a ViT with the mask token and the slots for positions that another one has."""
    state = dict(state)
    if "mask_token" in state and "mask_token" not in wanted:
        del state["mask_token"]
        log.info("the mask token of %s is left out: this run masks no patches", key)
    if "mask_token" in wanted and "mask_token" not in state:
        state["mask_token"] = torch.zeros(wanted["mask_token"].shape)
        log.info("%s has no mask token: it starts at zero, as in a new network", key)
    of_local = {name for name in wanted if name.startswith("local_norm.")}
    if of_local - state.keys():
        state |= {name: state[name.removeprefix("local_")] for name in of_local}
        log.info("%s has no norm of local crops: it starts as that of global ones", key)
    for name in [name for name in state if name.startswith("local_norm.") and name not in wanted]:
        del state[name]
    for name in [name for name in state if name not in wanted and _scales_by_one(name, state)]:
        del state[name]  # the form in transformers of a ViT with a mask token
    if "pos_embed" not in wanted:
        return state
    more = state["pos_embed"].shape[1] - wanted["pos_embed"].shape[1]
    if more == 1:
        return slot_removed(state)
    return slot_added(state) if more == -1 else state


def _scales_by_one(name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is a layer scale that does not act."""
    return name.endswith(".gamma") and bool((state[name] == 1).all())


def adapted_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapt a first convolution (D, C', p, p) to another number of channels, (D, C, p, p)."""
    found = weight.shape[1]
    if found == channels:
        return weight
    return (weight.mean(1, keepdim=True) * (found / channels)).expand(-1, channels, -1, -1)


def _sizes(backbone: VisionTransformer | ConvNet) -> str:
    """The sizes that have to agree, as text."""
    if isinstance(backbone, ConvNet):
        return backbone.name
    attention: Any = backbone.blocks[0].attn
    registers = 0 if backbone.reg_token is None else backbone.reg_token.shape[1]
    return (
        f"ViT (embed_dim {backbone.embed_dim}, depth {backbone.depth}, num_heads "
        f"{attention.num_heads}, patch_size {backbone.patch_size}, registers {registers}, "
        f"{'learned' if backbone.rope is None else 'rotary'} positions)"
    )


def _fitted_maps(
    maps: Mapping[str, Tensor], network: DinoNetwork, path: str, *, wanted: bool
) -> dict[str, Tensor]:
    """Those of a run's maps to another network's features that the source has, too."""
    here = {name: v for name, v in network.state_dict().items() if name.startswith(MAPS)}
    taken = {name: maps[name] for name in here if wanted and name in maps}
    coverage = coverage_of(taken, {name: here[name] for name in taken})
    if not coverage.complete:
        raise ConfigError(
            f"train.init_head: the maps of features of {path} are not those of distill.model "
            f"({coverage}); change distill.model.*, or set train.init_head=false to start with "
            "random ones"
        )
    random, left_out = (sorted(names - taken.keys()) for names in (here.keys(), maps.keys()))
    if random:
        log.info("maps to features that start as random ones: %s", ", ".join(random))
    if left_out:
        remedy = "this run has none" if wanted else "train.init_head=true takes those it has, too"
        log.info("maps to features of %s left out: %s; %s", path, ", ".join(left_out), remedy)
    return taken


def _remedy(
    source: VisionTransformer | ConvNet, target: VisionTransformer | ConvNet, section: str
) -> str:
    """What to do if a run's backbone, with settings in `section`, computes other features.

    Settings that no tensor shows, and channels, with which there is nothing to adapt.
    """
    wanted = []
    there, here = _norm_eps(source), _norm_eps(target)
    if there != here:
        wanted += [f"{section}.norm_eps={eps:g}" for eps in there]
    rope = getattr(source, "rope", None)
    if rope is not None and rope != getattr(target, "rope", None):
        values = {key: value for key, value in asdict(rope).items() if value is not None}
        wanted += [f"{section}.rope.{key}={value}" for key, value in values.items()]
    masked = _masks_key_bias(source)
    if masked != _masks_key_bias(target):
        wanted.append(f"{section}.mask_key_bias={str(masked).lower()}")
    there_channels, here_channels = input_channels(source), input_channels(target)
    if not wanted and there_channels != here_channels:
        wanted.append(f"data.channels={there_channels}")
    if wanted:
        return f"set {' '.join(wanted)}, as it has"
    return f"no setting of {section}.* explains that: please report it, and what the file is"


def _norm_eps(network: nn.Module) -> list[float]:
    """The epsilons of the layer norms."""
    return sorted({each.eps for each in network.modules() if isinstance(each, nn.LayerNorm)})


def _masks_key_bias(network: nn.Module) -> bool:
    return any(isinstance(module, KeylessBias) for module in network.modules())


def _warn_if_position_rules_differ(
    source: nn.Module, target: nn.Module, key: str, section: str
) -> None:
    """Warn if other sizes of images get other positions than in the source."""
    if not isinstance(target, VisionTransformer) or not isinstance(source, VisionTransformer):
        return
    there, here = source.position_resize, target.position_resize
    if there != here and target.rope is None:
        log.warning(
            "%s resizes positions %s, and this run %s: features of local crops differ"
            " by some percent; set %s.position_resize=%s to keep them",
            *(key, there, here, section, there),
        )


def _warn_of_resized_twice(
    found: StepZero, key: str, size: int, *, stored: int, there: BackboneCard
) -> None:
    """Warn if features at a smaller size of a mixture are not those of the source."""
    if not found.difference <= found.bound:
        log.warning(
            "%s: in crops of %d pixels its features differ by %.2g of their length, since its "
            "positions are resized to %d pixels and from there; a mixture whose largest crops have "
            "the %d pixels of the weights keeps them",
            *(key, size, found.difference, stored, there.backbone.img_size),
        )


def _warn_if_normalisation_differs(card: BackboneCard, config: RunConfig, key: str) -> None:
    """Warn if the run normalises pixels differently from the source.

    Of other channels none is that of the source: they are alike where all have the same numbers.
    """
    there, here = (
        list(zip(of.mean, of.std, strict=True)) for of in (card.preprocessing, config.data)
    )
    alike = there == here if len(there) == len(here) else len({*there, *here}) == 1
    if not alike:
        log.warning(
            "the weights of %s expect pixels of mean %s and std %s, and this run has "
            "data.mean %s and data.std %s",
            key,
            *(list(x) for x in (card.mean, card.std, config.data.mean, config.data.std)),
        )
