"""Attention of the class token in the last block: drawn as a picture, and scored against masks.

`draw_attention` and `score_attention` take a backbone and images, `evaluate_attention` takes a
weights file and a set of images.

Shape letters: N images, A heads, H, W pixels, R, C rows and columns of patches.
Source: Caron et al. 2021 (arXiv:2104.14294), figures 1 and 4 and appendix.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dinoscale.data.augmentation.multi_crop import to_image
from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.sources.source import Source
from dinoscale.errors import ConfigError, DataError, UnavailableError
from dinoscale.evaluate.any_size import (
    Fit,
    WholeImages,
    find_patch_size,
    image_mode,
    read_image,
    to_input,
    writing_to,
)
from dinoscale.evaluate.dense.attention_figure import Row, draw_rows
from dinoscale.evaluate.dense.attention_maps import (
    MASS,
    attention_maps,
    center_box,
    head_jaccard,
    keep_mass,
)
from dinoscale.evaluate.dense.object_masks import split_objects
from dinoscale.evaluate.features import eval_mode
from dinoscale.evaluate.frozen_backbone import DEFAULT_LOADING, LoadOptions, load_frozen
from dinoscale.runtime.outputs import require_ours

log = logging.getLogger(__name__)

Picture = Image.Image | NDArray[np.uint8] | Tensor  # arrays (H, W, C), tensors (C, H, W); uint8
Mask = Image.Image | NDArray[np.uint8] | NDArray[np.bool_]  # (H, W); object is True or above 127

ROWS_DRAWN = 8
FINE = 24  # patches on a side; maps of the 6 x 6 of the quickstart's crops show no shapes


@dataclass(frozen=True)
class AttentionScore:
    """How well attention covers the objects, in percent, means over the images.

    The object itself chooses the best head, so more heads score higher by chance alone: also
    compare with an untrained backbone of the same sizes, as `evaluate_attention` does.
    """

    jaccard: float  # intersection over union of the best head's mask with the object's
    center_box: float  # the same of a centered box of half the width and height: a baseline
    images: int


def draw_attention(
    backbone: nn.Module,
    images: Sequence[Picture],
    path: str | Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size: int,
    masks: Sequence[Mask] | None = None,
    title: str = "",
    rows: int = ROWS_DRAWN,
    untrained: AttentionScore | None = None,
) -> AttentionScore | None:
    """Draw images with their attention into a PNG, and score all of them if masks are given.

    A row holds the image, the object if known, the mean over heads, every head, and the image
    with only the patches that hold 60 % of the attention: of the head that covers the object best
    if the object is known, else of the mean.

    Args:
        backbone: a `VisionTransformer`; put into eval mode and back.
        images: at least one, of any shapes; each is squeezed to size x size, as in the reference.
        path: of the PNG; folders above it are made.
        mean: of each channel, 3 or 1, in 0..1.
        std: of each channel, in 0..1.
        size: side in pixels at which the backbone sees them, cut to a multiple of its patch; the
            reference takes 480.
        masks: of the object, one per image; several objects (`split_objects`) are merged.
        title: a line above the picture.
        rows: number of images drawn, the first ones; the score is of all.
        untrained: score of a backbone with fresh weights, written beside that of this one.

    Returns:
        The score, or None without masks.

    Raises:
        ConfigError: the backbone has no attention, the size is below a patch, or images have
            other than 1 or 3 channels.
        DataError: a mask is empty or has another size than its image, or the picture cannot be
            written.
        ValueError: there are no images, or not as many masks as images.
    """
    squares, maps, covers = _look(backbone, images, masks, mean=mean, std=std, size=size)
    score = None if covers is None else _score(covers)
    drawn = [
        _row(squares[i], maps[i], None if covers is None else covers[i])
        for i in range(min(rows, len(maps)))
    ]
    with writing_to(Path(path).parent):
        draw_rows(drawn, Path(path), title=title, note=_note(score, untrained), mass=MASS)
    return score


def score_attention(
    backbone: nn.Module,
    images: Sequence[Picture],
    masks: Sequence[Mask],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size: int,
) -> AttentionScore:
    """Score the best head of every image without drawing; arguments as in `draw_attention`."""
    covers = _look(backbone, images, masks, mean=mean, std=std, size=size)[2]
    assert covers is not None
    return _score(covers)


def _note(score: AttentionScore | None, untrained: AttentionScore | None) -> str:
    if score is None:
        return ""
    fresh = f"untrained {untrained.jaccard:.1f} %, " if untrained else ""
    return (
        f"Jaccard of the best head {score.jaccard:.1f} %, {fresh}of a centered box "
        f"{score.center_box:.1f} % ({score.images} images)"
    )


def _look(
    backbone: nn.Module,
    images: Sequence[Picture],
    masks: Sequence[Mask] | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size: int,
) -> tuple[list[Image.Image], Tensor, list[_Cover] | None]:
    """Square inputs of the backbone, their maps (N, A, R, C), and how these cover the objects."""
    if not images or (masks is not None and len(masks) != len(images)):
        raise ValueError(f"got {len(images)} images and {masks and len(masks)} masks")
    fit = Fit(find_patch_size(backbone), size, square=True)
    mode = image_mode(channels=len(mean))
    pictures = [_to_pil(image, mode=mode) for image in images]
    squares = [fit.squeeze(picture) for picture in pictures]
    inputs = torch.cat([to_input(square, backbone, mean=mean, std=std) for square in squares])
    with eval_mode(backbone):
        maps = attention_maps(backbone, inputs)
    if masks is None:
        return squares, maps, None
    pairs = enumerate(zip(masks, pictures, strict=True))
    side = squares[0].width
    objects = [_to_object(mask, image, side=side, index=i) for i, (mask, image) in pairs]
    return squares, maps, _cover(maps, torch.stack(objects))


def _to_pil(image: Picture, *, mode: str) -> Image.Image:
    if isinstance(image, Tensor):
        image = image.permute(1, 2, 0).numpy()  # (H, W, C)
    return image.convert(mode) if isinstance(image, Image.Image) else to_image(image)


def _to_object(mask: Mask, image: Image.Image, *, side: int, index: int) -> Tensor:
    """Mask at side x side pixels, (side, side) bool."""
    if isinstance(mask, Image.Image):
        inside = split_objects(mask, indexed=False).masks.any(dim=0).numpy()
    else:
        inside = mask if mask.dtype == np.bool_ else mask > 127
    if inside.shape != (image.height, image.width):
        sizes = f"{[*inside.shape]} for {[image.height, image.width]}"
        raise DataError(f"the mask of image {index} has another size than the image: {sizes}")
    square = Image.fromarray(inside).resize((side, side), Image.Resampling.NEAREST)
    found = torch.from_numpy(np.array(square, dtype=np.bool_))
    if not found.any():
        raise DataError(f"the mask of image {index} is empty")
    return found


@dataclass(frozen=True)
class _Cover:
    """How the heads cover the object of one image."""

    object: Tensor  # (H, W) bool
    best_head: int
    kept: Tensor  # (R, C) bool, of that head
    jaccard: float  # of that head, 0..1
    center_box: float  # 0..1


def _cover(maps: Tensor, objects: Tensor) -> list[_Cover]:
    """Compare the heads of every image (N, A, R, C) with its object (N, H, W), one by one."""
    kept = keep_mass(maps)
    box = center_box(objects.shape[1], objects.shape[2])[None]
    covers = []
    for i in range(len(maps)):
        inside = objects[i : i + 1]
        jaccard = head_jaccard(kept[i : i + 1], inside)[0]  # (A,)
        best = int(jaccard.argmax())
        of_box = float(head_jaccard(box, inside))
        covers.append(_Cover(objects[i], best, kept[i, best], float(jaccard[best]), of_box))
    return covers


def _score(covers: Sequence[_Cover]) -> AttentionScore:
    return AttentionScore(
        images=len(covers),
        jaccard=100 * sum(cover.jaccard for cover in covers) / len(covers),
        center_box=100 * sum(cover.center_box for cover in covers) / len(covers),
    )


def _row(square: Image.Image, maps: Tensor, cover: _Cover | None) -> Row:
    kept = keep_mass(maps.mean(dim=0)) if cover is None else cover.kept
    return Row(
        picture=np.asarray(square.convert("RGB")),
        heads=maps.numpy(),
        kept=kept.numpy(),
        mask=None if cover is None else cover.object.numpy(),
        best_head=None if cover is None else cover.best_head,
        jaccard=None if cover is None else cover.jaccard,
    )


def evaluate_attention(
    weights_path: str | Path,
    spec: str,
    path: str | Path,
    *,
    size: int | None = None,
    images: int = 100,
    rows: int = ROWS_DRAWN,
    scored: bool = True,
    options: LoadOptions = DEFAULT_LOADING,
) -> dict[str, object]:
    """Draw the attention of a weights file on some images of a set; score it if there are masks.

    Args:
        weights_path: any weights file that `load_backbone` reads.
        spec: the images, as `data.train` of a config; synthetic ones come with masks.
        path: of the PNG.
        size: side in pixels at which the backbone sees the images; None takes the weights' crop,
            or more pixels for 24 x 24 patches; the reference takes 480.
        images: how many to score, chosen at random with a fixed seed; all if there are fewer.
        rows: how many of these to draw.
        scored: use the masks, if there are any; else the sheet shows attention alone.
        options: which network, and which device.

    Returns:
        What was measured and how, ready for JSON; `score` and `untrained_score`, of the same
        architecture with fresh weights, are null without masks; with masks, baselines as well.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range, or the backbone has no attention.
        DataError: the images cannot be read.
    """
    if images < 1 or rows < 1:
        raise ConfigError(f"need images > 0 and rows > 0, got {images} and {rows}")
    require_ours(Path(path))
    loaded = load_frozen(weights_path, options)
    if size is None:
        size = max(loaded.card.crop, FINE * find_patch_size(loaded.backbone))
    whole = WholeImages.of(loaded, size=size, square=True)
    pictures, masks = _pick(whole.open(spec), images=images, with_masks=scored)
    how: dict[str, Any] = {"mean": whole.card.mean, "std": whole.card.std, "size": size}
    untrained = None
    if masks is not None:
        untrained = score_attention(whole.untrained().backbone, pictures, masks, **how)
    title = f"{Path(weights_path).name}: attention of the class token in the last block"
    how |= {"masks": masks, "title": title, "rows": rows, "untrained": untrained}
    score = draw_attention(whole.backbone, pictures, path, **how)
    edges = "images are resized to whole patches"
    return whole.report(
        "attention",
        images=len(pictures),
        spec=spec,
        picture=str(path),
        size=size // whole.fit.patch * whole.fit.patch,
        mass=MASS,
        protocol={"network": options.network, **whole.fit.protocol(), "edges": edges},
        **_scores(score, untrained),
    )


def _scores(score: AttentionScore | None, untrained: AttentionScore | None) -> dict[str, object]:
    """Scores for the report, and with masks the baselines under the names of the other tasks."""
    if score is None or untrained is None:
        return {"score": None, "untrained_score": None}
    return {
        "score": asdict(score),
        "untrained_score": asdict(untrained),
        "floors": {"jaccard": score.center_box},
        "untrained": {"jaccard": untrained.jaccard},
    }


def _pick(
    source: Source, *, images: int, with_masks: bool
) -> tuple[list[Image.Image], list[Image.Image] | None]:
    """Some readable images in a fixed random order, and their masks if there are any."""
    order = np.random.default_rng(0).permutation(len(source))  # sources may be sorted by class
    mask_of = getattr(source, "mask", None) if with_masks else None
    pictures, masks = [], []
    for index in order[:images].tolist():
        try:
            pictures.append(read_image(source, index))
        except UnavailableError:
            raise
        except BadSampleError as error:
            log.warning("left out an unreadable image: %s", error)
            continue
        if mask_of is not None:
            masks.append(mask_of(index))
    if not pictures:
        raise DataError(f"none of the {len(order[:images])} images that were tried can be read")
    return pictures, masks or None
