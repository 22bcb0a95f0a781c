"""`dinoscale convert`: any source of weights into the format of another library, with a proof.

The written file is opened again by that library and compared with the source on fixed images of two
sizes. Only then does it get its name, and a card with the differences.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dinoscale.config.sections.backbones import RESNET50
from dinoscale.config.sections.convnets import named_convnet
from dinoscale.convert.atomic_write import checksums, put_in_place, refuse_existing
from dinoscale.convert.coverage import Coverage, listed
from dinoscale.convert.formats.dinov3 import without_masked_bias
from dinoscale.convert.formats.reference import our_head
from dinoscale.convert.formats.special_tokens import (
    as_in_hf,
    as_in_timm,
    without_mask_token,
)
from dinoscale.convert.formats.to_dino import dino_form, reopen_dino, write_dino
from dinoscale.convert.formats.to_graphs import (
    reopen_onnx,
    reopen_torchscript,
    write_onnx,
    write_torchscript,
)
from dinoscale.convert.formats.to_hf import reopen_hf, write_hf
from dinoscale.convert.formats.to_timm import reopen_timm, write_timm
from dinoscale.convert.parity import (
    MAX_DIFFERENCE,
    MAX_MERGED_DIFFERENCE,
    MIN_COSINE,
    MIN_COSINE_ROUNDED,
    Agreement,
    Forward,
    Reopened,
    compare,
    forward_of,
    require_any_device,
    require_complete,
    require_merged,
    require_same,
    second_size,
    under_our_names,
)
from dinoscale.convert.resize import at_size, patch_size_of
from dinoscale.convert.source import read_source
from dinoscale.convert.weights import Network, Weights
from dinoscale.errors import CheckpointError, ConversionError
from dinoscale.models.vit import position_rule
from dinoscale.runtime.outputs import staging_folder
from dinoscale.runtime.versions import package_version

log = logging.getLogger(__name__)

FORMAT = 1  # of the card beside a target
# Settings of the run that a card contains: how the weights were trained, and nothing about where.
# Others may be paths, names of machines and projects, or additions of a later version.
RECIPE: dict[str, tuple[str, ...] | None] = {  # None: all of the section
    "model": None,
    "head": None,
    "patch_head": None,
    "crops": None,
    "augment": None,
    "dino": None,
    "ibot": None,
    "koleo": None,
    "gram": (
        *("loss_weight", "refresh_every_steps", "first_refresh_step", "max_refreshes"),
        *("crop_size", "crop_colors", "tokens", "compare", "negatives"),
    ),
    "anchor": None,
    "distill": (
        *("model", "head", "patch_head"),
        *("class_feature_weight", "patch_feature_weight", "feature_loss"),
    ),
    "lora": None,
    "optim": None,
    "schedules": None,
    "data": ("images_per_epoch", "subset_size", "channels", "max_pixel_value", "mean", "std"),
    "train": ("epochs", "batch_size", "micro_batch_size"),
    "engine": ("precision",),
}
_WITHOUT_MASK_TOKEN = ("timm", "torchscript", "onnx")
_WITHOUT_KEY_BIAS = ("timm", "hf")  # that does not act
_RULES = {
    "by_factor": "bicubic by the scale factor (patches + 0.1) / stored",
    "by_size": "bicubic to the size, with antialiasing",
}
NO_HEADS: dict[str, Any] = {"head": None, "patch_head": None}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Target:
    """A format to write.

    Attributes:
        write: writes weights to a path.
        reopen: opens that path with its library, given nothing but which network it is.
        form: the weights as the format keeps them at a path, see `formats.special_tokens`.
        resizing: like `reopen`, for images of any size by the library's own rule for position
            embeddings; None where the target contains our rule.
        is_folder: whether the path is a folder.
        any_dtype: whether the weights can be stored in 16 bit.
        needs: packages to import.
        extra: extra of dinoscale that installs them.
        differs: how the library's preprocessing differs from ours.
    """

    write: Callable[[Path, Weights], None]
    reopen: Callable[[Path, Network], Reopened]
    form: Callable[[Path, Weights], Weights] = lambda _, weights: weights
    resizing: Callable[[Path], Reopened] | None = None
    is_folder: bool = False
    any_dtype: bool = True
    needs: tuple[str, ...] = ()
    extra: str = ""
    differs: str | None = None


TARGETS = {
    "dino": Target(write_dino, reopen_dino, form=dino_form),
    "timm": Target(
        write_timm,
        lambda path, _: reopen_timm(path),
        form=lambda _, weights: as_in_timm(weights),
        resizing=lambda path: reopen_timm(path, own_resize=True),
        is_folder=True,
    ),
    "hf": Target(
        write_hf,
        lambda path, _: reopen_hf(path),
        form=lambda _, weights: as_in_hf(weights),
        resizing=lambda path: reopen_hf(path, own_resize=True),
        is_folder=True,
        needs=("transformers",),
        extra="hf",
        differs="transformers rounds the corner of the center crop down, dinoscale to even: where 3"
        " pixels modulo 4 are cut off, its crop is one pixel further up or left",
    ),
    "torchscript": Target(
        write_torchscript,
        lambda path, _: reopen_torchscript(path),
        form=lambda _, weights: without_mask_token(weights),
        any_dtype=False,
    ),
    "onnx": Target(
        write_onnx,
        lambda path, _: reopen_onnx(path),
        form=lambda _, weights: without_mask_token(weights),
        any_dtype=False,
        needs=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
    ),
}


def convert(
    source: Path,
    path: Path,
    *,
    to: str,
    network: Network = "teacher",
    head: bool = False,
    dtype: str = "float32",
    size: int | None = None,
    num_heads: int | None = None,
    overwrite: bool = False,
    heartbeat: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write the weights of a source in another format, with a card, and prove them equal.

    Args:
        source: what `source.read_source` reads.
        path: file (dino, torchscript, onnx) or folder (timm, hf) to write.
        to: a key of `TARGETS`.
        network: which network of a run or full checkpoint to take.
        head: write the projection head too; `dino` only.
        dtype: a key of `DTYPES`, of the stored weights; features are compared in float32.
        size: image side in pixels to resize the position embedding for; None keeps it.
        num_heads: for sources that do not store it.
        overwrite: replace an earlier conversion, if it is unchanged.
        heartbeat: called regularly while the source is read, and before the proof.

    Returns:
        The card, JSON-able.

    Raises:
        CheckpointError: the source cannot be read.
        ConversionError: a library is missing, the format cannot hold these weights, or the result
            gives other features; it is then removed.
        OutputError: the target exists and may not be replaced.
    """
    target = TARGETS[to]
    _require(target, to, head=head, dtype=dtype)
    refuse_existing(path, source, is_folder=target.is_folder, overwrite=overwrite)
    weights = read_source(source, network=network, num_heads=num_heads, heartbeat=heartbeat)
    name = weights.card.backbone.name
    if named_convnet(name) is not None and name != RESNET50:
        raise ConversionError(
            f"{source}: is a {name}, which is evaluated and can be a frozen teacher; convert writes"
            f" ViTs and {RESNET50}"
        )
    if head and weights.head is None:
        raise CheckpointError(f"{source} holds no projection head: leave --head out")
    heads = {"head": weights.head, "patch_head": weights.patch_head} if head else NO_HEADS
    weights = replace(weights, network=network, **heads)
    try:
        full = forward_of(weights)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    merged = require_merged(weights)
    if size is not None or (target.resizing is not None and not weights.is_rotary):
        stored = weights.card.backbone.img_size
        weights = at_size(weights, img_size=stored if size is None else size)
    left_out = _left_out(weights, to)
    try:
        weights = _stored_as(target.form(path, weights), DTYPES[dtype])
        with staging_folder(path) as folder:
            written = folder / path.name
            heartbeat()
            proof = _write_and_prove(
                target, written, weights, full=full, rounded=DTYPES[dtype] != torch.float32
            )
            card = _card(weights, proof, to=to, dtype=dtype, files=checksums(written))
            card |= {"left_out": left_out} if left_out else {}
            if merged is not None:
                card["merged_adapters"] = {"limit": MAX_MERGED_DIFFERENCE, **asdict(merged)}
            put_in_place(written, path, json.dumps(card, indent=2) + "\n")
    except ConversionError as error:
        raise ConversionError(f"{source} to {to}: {error}") from error
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{path} cannot be written: {error}") from error
    log.info("%s: %s, equal to the source", path, card["coverage"]["text"])
    return {"target": str(path), **card}


def _left_out(weights: Weights, to: str) -> dict[str, str]:
    """Tensors of the source that a target does not get, and why."""
    left_out = dict.fromkeys(weights.left_out, "neither of the backbone nor of a projection head")
    state, no_place = weights.backbone, f"{to} has no place for it"
    if "mask_token" in state and to in _WITHOUT_MASK_TOKEN:
        left_out["mask_token"] = f"{no_place}; it replaces masked patches in training"
    if to != "dino":
        of_local = [name for name in state if name.startswith("local_norm.")]
        left_out |= dict.fromkeys(of_local, f"{no_place}; it normalises local crops in training")
    if weights.is_rotary and to in _WITHOUT_KEY_BIAS:
        zeroed = without_masked_bias(weights).backbone
        biases = [name for name in state if not torch.equal(zeroed[name], state[name])]
        left_out |= dict.fromkeys(biases, f"{no_place}: the part of the keys, which does not act")
    for reason in dict.fromkeys(left_out.values()):
        names = [name for name, why in left_out.items() if why == reason]
        log.warning("left out: %s (%s)", listed(names), reason)
    return left_out


def _require(target: Target, to: str, *, head: bool, dtype: str) -> None:
    """Refuse what a target cannot do, before anything is read."""
    for name in target.needs:
        if importlib.util.find_spec(name) is None:
            raise ConversionError(
                f"--to {to} needs {name}, which is not installed:"
                f" pip install 'dinoscale[{target.extra}]'"
            )
    if head and to != "dino":
        raise ConversionError(f"--to {to} has no place for a projection head: use --to dino")
    if DTYPES[dtype] != torch.float32 and not target.any_dtype:
        raise ConversionError(
            f"--to {to} computes in the dtype of its weights, and only float32 is proved:"
            " leave --dtype out"
        )


def _stored_as(weights: Weights, dtype: torch.dtype) -> Weights:
    """Weights in another dtype, refused if they overflow it; integer counters stay integers."""
    parts: dict[str, Any] = {
        part: {name: x.to(dtype) if x.is_floating_point() else x for name, x in state.items()}
        for part, state in weights.parts().items()
    }
    rounded = replace(weights, **parts)
    for name, tensor in under_our_names(rounded).items():
        if not torch.isfinite(tensor).all():
            kind = str(dtype).removeprefix("torch.")
            raise ConversionError(f"{name} has numbers too large for {kind}: use --dtype float32")
    heads: dict[str, Any] = {
        part: our_head(state) for part, state in parts.items() if part != "backbone"
    }
    return replace(rounded, **heads)


def _write_and_prove(
    target: Target, written: Path, weights: Weights, *, full: Forward, rounded: bool
) -> dict[str, Any]:
    """Write a target, open it again and compare it; return the entries of the card.

    Raises:
        ConversionError: it lacks a tensor, or its features differ.
    """
    ours = forward_of(weights)  # of the rounded weights, so that rounding hides no other mistake
    reopened, coverage = _write(target, written, weights)
    shape = weights.card.backbone
    sizes = shape.img_size, second_size(shape.img_size, patch_size=max(8, patch_size_of(weights)))

    def compared(
        one: Forward, other: Forward, size: int | tuple[int, int], **images: int
    ) -> Agreement:
        return compare(one, other, in_chans=shape.in_chans, size=size, **images)

    proofs = [compared(ours, reopened.forward, sizes[0])]
    own_rule = None
    if weights.is_rotary:
        oblong = (sizes[0], sizes[1])
        proofs += [
            compared(ours, reopened.forward, size, num_images=3) for size in (sizes[1], oblong)
        ]
    elif target.resizing is None or patch_size_of(weights) == 1:
        proofs.append(compared(ours, reopened.forward, sizes[1], num_images=3))
    else:
        moved = written.with_name("second size")
        of_size, _ = _write(target, moved, at_size(weights, img_size=sizes[1]))
        proofs.append(compared(ours, of_size.forward, sizes[1]))
        own_rule = compared(ours, target.resizing(written).forward, sizes[1])
    _require_equal(proofs)
    require_same(reopened, weights)
    require_any_device(reopened, in_chans=shape.in_chans, size=sizes[0])
    rounding = compared(full, ours, sizes[0])
    if not rounded and not rounding.equal:
        raise ConversionError(
            f"in the form of the library, features differ by {rounding.max_difference:.2g} of the"
            f" largest (at most {MAX_DIFFERENCE:.0e}); nothing was written"
        )
    if not rounding.cosine >= MIN_COSINE_ROUNDED:
        raise ConversionError(
            f"rounding the weights changes the features too much: cosine {rounding.cosine:.4f} with"
            f" those in float32 (at least {MIN_COSINE_ROUNDED}); use --dtype float32"
        )
    return {
        "coverage": {"text": str(coverage), **asdict(coverage)},
        "parity": {
            "limits": {"max_difference": MAX_DIFFERENCE, "cosine": MIN_COSINE},
            "proofs": [asdict(proof) for proof in proofs],
            "rounding": asdict(rounding),
        },
        "position_embedding": _rule(weights, own_rule),
    }


def _write(target: Target, written: Path, weights: Weights) -> tuple[Reopened, Coverage]:
    """Write weights, open them again, and require that all tensors are there."""
    if target.is_folder:
        written.mkdir()
    target.write(written, weights)
    reopened = target.reopen(written, weights.network)
    return reopened, require_complete(reopened, weights)


def _require_equal(proofs: list[Agreement]) -> None:
    for proof in proofs:
        if not proof.equal:
            raise ConversionError(
                f"opened again, its features at {proof.size[0]} x {proof.size[1]} pixels differ"
                f" by {proof.max_difference:.2g} of the largest (at most {MAX_DIFFERENCE:.0e}),"
                f" cosine {proof.cosine:.6f}; nothing was written"
            )


def _rule(weights: Weights, own_rule: Agreement | None) -> dict[str, Any]:
    """Image sizes at which the target gives our features, and what happens at others."""
    shape = weights.card.backbone
    if "pos_embed" not in weights.backbone:
        return {"sizes": "any", "rule": "positions are computed for each size"}
    if own_rule is None or own_rule.equal:
        rule = position_rule(shape.position_resize, registers="reg_token" in weights.backbone)
        return {"sizes": "any", "rule": _RULES[rule]}
    return {
        "sizes": [shape.img_size],
        "rule": "the library resizes by another rule; write another size with --size",
        "own_rule": asdict(own_rule),
    }


def recipe_of(config: object) -> dict[str, Any] | None:
    """Settings of a run that are published with its weights, by section; None without a config."""
    if not isinstance(config, Mapping):
        return None
    recipe = {}
    for section, keys in RECIPE.items():
        values = config.get(section, {})
        if values is not None:  # such as the patch tokens' own head, if they have none
            recipe[section] = {key: values[key] for key in keys or values if key in values}
    return {"seed": config.get("seed"), **recipe}


def _card(
    weights: Weights, proof: dict[str, Any], *, to: str, dtype: str, files: dict[str, str]
) -> dict[str, Any]:
    """The card beside a target file, or in a target folder."""
    run = dict(weights.run or {})
    state = under_our_names(weights)
    return {
        "format": FORMAT,
        "dinoscale": package_version("dinoscale"),
        "to": to,
        "dtype": dtype,
        "network": weights.network,
        "source_format": weights.kind,
        **asdict(weights.card),
        "tensors": len(state),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "checkpoint": run.get("checkpoint"),
        "step": run.get("step"),
        "metrics": {"knn_top1": run["knn_top1"]} if run.get("knn_top1") is not None else {},
        "recipe": recipe_of(run.get("config")),
        "files": files,
        **({"image_processor": TARGETS[to].differs} if TARGETS[to].differs else {}),
        **proof,
    }
