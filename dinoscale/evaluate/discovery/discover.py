"""Objects of images found without labels and without training, compared with the true ones.

Shape letters: M objects of an image, R, C rows and columns of patches.
Source: Simeoni et al. 2021 (arXiv:2109.14279) for CorLoc of LOST; Wang et al. 2022
(arXiv:2202.11539) for TokenCut, its CorLoc, and the overlap with masks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.sources.source import Source
from dinoscale.errors import ConfigError, DataError, UnavailableError
from dinoscale.evaluate.any_size import (
    SIZE,
    Fit,
    NamedFolders,
    WholeImages,
    load_whole_images_on_ranks,
    read_image,
    writing_to,
)
from dinoscale.evaluate.dense.attention_maps import center_box, enlarge
from dinoscale.evaluate.dense.mask_pictures import save_mask
from dinoscale.evaluate.dense.segment import jaccard_of_objects
from dinoscale.evaluate.discovery.boxes import iou_of_boxes
from dinoscale.evaluate.discovery.figure import Row, draw_rows
from dinoscale.evaluate.discovery.regions import (
    EXPANSION,
    TAU,
    Box,
    Region,
    check_patches,
    lost,
    token_cut,
)
from dinoscale.evaluate.discovery.truth import Annotations, TrueObjects, Truth
from dinoscale.evaluate.finished_items import FinishedItems, Form
from dinoscale.evaluate.frozen_backbone import DEFAULT_LOADING, LoadOptions
from dinoscale.evaluate.patch_features import (
    IN_WORDS,
    PatchFeatures,
    check_features,
    patch_features,
)
from dinoscale.evaluate.progress import bar_options
from dinoscale.evaluate.sheet import best_median_worst
from dinoscale.runtime import distributed
from dinoscale.runtime.fingerprint import Fingerprint
from dinoscale.runtime.outputs import atomic_write

log = logging.getLogger(__name__)

Method = Literal["tokencut", "lost"]

FOUND_FROM = 0.5  # intersection over union from which on a box counts as found
SHEET = "discover-sheet.png"
BOXES = "boxes.json"

_PROTOCOL = {
    "corloc": "images whose box overlaps one of the true boxes by IoU >= 0.5; VOC's difficult and"
    " truncated objects count",
    "jaccard": "IoU with the object that is covered best, mean over images; void left out",
    "edges": "images are resized to whole patches; the published code pads them at their own size",
    "scored_at": "the image's own size; patches enlarged by nearest neighbour",
    "floor": "a centered box of half the width and height, on every image",
}


class _CutFit(Fit):
    """How images become as many whole patches as TokenCut can cut."""

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """As of `Fit`; there is a lower limit."""
        rows, columns = super().grid(width, height)
        check_patches(rows, columns)
        return rows, columns


@dataclass(frozen=True)
class Settings:
    """How objects are found.

    Attributes:
        method: the name.
        features: of the patches.
        tau: of tokencut, see `regions.token_cut`; None takes 0.2.
        expansion: of lost, see `regions.lost`; None takes 100.
    """

    method: Method = "tokencut"
    features: PatchFeatures = "keys"
    tau: float | None = None
    expansion: int | None = None

    def check(self) -> None:
        """Refuse values out of range, and those of the other method.

        Raises:
            ConfigError: there is one.
        """
        check_features(self.features)
        if self.method not in get_args(Method):
            names = ", ".join(get_args(Method))
            raise ConfigError(f"method: need one of {names}, got {self.method!r}")
        for name, value, of in (
            ("tau", self.tau, "tokencut"),
            ("expansion", self.expansion, "lost"),
        ):
            if value is not None and of != self.method:
                raise ConfigError(f"{name}: is a setting of the method {of}, not of {self.method}")
        if self.tau is not None and not -1 <= self.tau <= 1:
            raise ConfigError(f"tau: need a cosine from -1 to 1, got {self.tau}")
        if self.expansion is not None and self.expansion < 1:
            raise ConfigError(f"expansion: need at least one patch, got {self.expansion}")

    def fit(self, fit: Fit) -> Fit:
        """How images become whole patches; it refuses images that the method cannot take."""
        return _CutFit(**vars(fit)) if self.method == "tokencut" else fit

    def find(self, loaded: WholeImages, image: Image.Image) -> Region:
        """The object of a picture of whole patches."""
        features = patch_features(loaded, image, features=self.features)
        if self.method == "tokencut":
            return token_cut(features, tau=TAU if self.tau is None else self.tau)
        return lost(features, expansion=self.expansion or EXPANSION)

    def protocol(self) -> dict[str, object]:
        """All that changes a number, ready for JSON."""
        own: dict[str, object] = {"tau": TAU if self.tau is None else self.tau}
        if self.method == "lost":
            own = {"expansion": self.expansion or EXPANSION}
        return {"method": self.method, "features": IN_WORDS[self.features], **own}


@dataclass(frozen=True)
class _Overlap:
    """Of what was found with the objects: the best IoU of the boxes, and of the masks, 0..1."""

    box: float
    mask: float | None  # None where only boxes are known


@dataclass(frozen=True)
class _Result:
    """What was found in one image, and how well it fits."""

    index: int  # of the image
    size: tuple[int, int]  # width and height of the image, pixels
    mask: torch.Tensor  # (R, C) bool
    box: Box
    found: _Overlap
    untrained: _Overlap | None
    floor: _Overlap


def evaluate_discover(
    weights_path: str | Path,
    spec: str,
    *,
    annotations: Annotations | None = None,
    settings: Settings | None = None,
    size: int = SIZE,
    square: bool = False,
    out: str | Path | None = None,
    untrained: bool = False,
    fingerprint: Fingerprint | None = None,
    options: LoadOptions = DEFAULT_LOADING,
) -> dict[str, object]:
    """Find one object in every image by the patch features; all ranks of a job share the images.

    Args:
        weights_path: any weights of a ViT that `load_backbone` reads.
        spec: images, as `data.train` of a config, or one file; shards hold masks as KEY.mask.png.
        annotations: the true objects; None takes the masks that the set holds.
        settings: how objects are found; None takes those of TokenCut's paper.
        size: short side in pixels at which the backbone sees the images.
        square: squeeze the images to size x size instead.
        out: folder for the found masks and boxes, and a sheet of some images; None writes nothing.
        untrained: also measure the same architecture with fresh weights.
        fingerprint: of the measurement, as of `FinishedItems`, to go on after an interruption.
        options: which network, and which device.

    Returns:
        Ready for JSON, in percent: `score`, `floors` and `untrained`, each with `corloc` and, where
        masks are known, `jaccard`; `left_out` names the images that were not scored.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range, or the backbone has no patches.
        DataError: no image can be scored, or masks or boxes do not fit their images.
        NonFiniteError: a feature is not a finite number.
    """
    settings, annotations = settings or Settings(), annotations or Annotations()
    settings.check()
    loaded = load_whole_images_on_ranks(weights_path, options, size=size, square=square)
    source = loaded.open(spec)
    truth = distributed.together(lambda: annotations.find(source, spec, settings.fit(loaded.fit)))
    finder = _Finder(loaded, source, settings)
    kept = FinishedItems(fingerprint, loaded.device)
    results, damaged = _measure(finder, truth, kept, untrained=untrained)
    report = loaded.report(
        "discover",
        **{"spec": spec, **asdict(annotations), "images": len(results)},
        left_out={**truth.left_out, "damaged": damaged},
        protocol={**finder.protocol(), "indexed": annotations.indexed},
        score=_score([result.found for result in results]),
        floors=_score([result.floor for result in results]),
    )
    if untrained:
        report["untrained"] = _score([r.untrained for r in results if r.untrained is not None])
    if out is not None:
        report["picture"] = _write(finder, truth, results, Path(out))
    return report


@dataclass(frozen=True)
class _Finder:
    """Finds the object of an image of a set by the features of a network."""

    loaded: WholeImages
    source: Source
    settings: Settings

    def image(self, index: int) -> Image.Image:
        """An image at its own size."""
        return read_image(self.source, index)

    def find(self, image: Image.Image) -> Region:
        """The object of an image at its own size."""
        return self.settings.find(self.loaded, self.squeezed(image))

    def squeezed(self, image: Image.Image) -> Image.Image:
        """The same image as the backbone sees it."""
        return self.loaded.fit.squeeze(image)

    def protocol(self) -> dict[str, object]:
        """All that changes a number but the weights, ready for JSON."""
        seen = {**self.loaded.fit.protocol(), **self.loaded.normalisation}
        network = {"network": self.loaded.options.network}
        return {**network, **self.settings.protocol(), **_PROTOCOL, **seen}


def _measure(
    finder: _Finder, truth: TrueObjects, kept: FinishedItems, *, untrained: bool
) -> tuple[list[_Result], list[str]]:
    """The results of all images, on every rank, and why damaged ones have none."""
    fresh = replace(finder, loaded=finder.loaded.untrained()) if untrained else None
    total = len(truth.indices[distributed.rank() :: distributed.world_size()])
    shown = finder.loaded.options.progress and distributed.rank() == 0
    with tqdm(total=total, unit="img", **bar_options(shown=shown)) as bar:

        def work(index: int) -> _Result | str:
            try:
                return _result(finder, fresh, index, truth.of(index))
            except UnavailableError:
                raise
            except BadSampleError as error:
                return str(error)
            finally:
                bar.update()

        found = kept.each(truth.indices, work, _FORM)
    damaged = [reason for reason in found if isinstance(reason, str)]
    for reason in damaged:
        log.warning("left out %s", reason)
    results = [result for result in found if isinstance(result, _Result)]
    if not results:
        raise DataError(f"no image can be used; the first: {damaged[0]}")
    return results, damaged


def _encoded(result: _Result | str) -> object:
    """JSON of a result; a text is why there is none."""
    if isinstance(result, str):
        return result
    return {**asdict(result), "mask": result.mask.int().tolist()}


def _decoded(said: Any) -> _Result | str:
    if isinstance(said, str):
        return said
    overlaps = {
        name: None if said[name] is None else _Overlap(**said[name])
        for name in ("found", "untrained", "floor")
    }
    mask = torch.tensor(said["mask"], dtype=torch.bool)
    own = {"size": tuple(said["size"]), "mask": mask, "box": tuple(said["box"])}
    return _Result(**{**said, **own, **overlaps})


_FORM: Form[_Result | str] = Form(_encoded, _decoded)


def _result(finder: _Finder, fresh: _Finder | None, index: int, true: Truth) -> _Result:
    image = finder.image(index)
    size, region = image.size, finder.find(image)
    mask, box = torch.from_numpy(region.mask), region.box(*size)
    untrained = None
    if fresh is not None:
        other = fresh.find(image)
        untrained = _overlap(torch.from_numpy(other.mask), other.box(*size), true)
    found, floor = _overlap(mask, box, true), _floor(size, true)
    return _Result(index, size, mask, box, found, untrained, floor)


def _floor(size: tuple[int, int], true: Truth) -> _Overlap:
    """Of a centered box of half the width and height."""
    width, height = size
    box = (width / 4, height / 4, width * 3 / 4, height * 3 / 4)
    return _overlap(center_box(height, width)[0], box, true)


def _overlap(mask: torch.Tensor, box: Box, true: Truth) -> _Overlap:
    best = float(iou_of_boxes(np.array(box), true.boxes).max())
    if true.objects is None:
        return _Overlap(best, None)
    return _Overlap(best, float(jaccard_of_objects(mask[None], true.objects).max()))


def _score(overlaps: Sequence[_Overlap]) -> dict[str, float]:
    """CorLoc, and the mean IoU of the masks where they are known, in percent."""
    found = [overlap.box >= FOUND_FROM for overlap in overlaps]
    score = {"corloc": 100 * sum(found) / len(found)}
    masks = [overlap.mask for overlap in overlaps if overlap.mask is not None]
    return {**score, "jaccard": 100 * sum(masks) / len(masks)} if masks else score


def _write(finder: _Finder, truth: TrueObjects, results: Sequence[_Result], out: Path) -> str:
    """Write NAME/mask.png of every image, the boxes, and a sheet, on rank 0; the sheet's path."""
    if distributed.rank() == 0:
        with writing_to(out):
            _write_found(finder.source, results, out)
            score = _score([result.found for result in results])
            numbers = ", ".join(f"{name} {value:.1f} %" for name, value in score.items())
            shown = best_median_worst(results, _quality)
            rows = [_row(finder, truth, result, label=label) for label, result in shown]
            title = f"{Path(finder.loaded.path).name}: {finder.settings.method}"
            note = f"{numbers} ({len(results)} images)"
            draw_rows(rows, out / SHEET, title=title, note=note)
    return str(out / SHEET)


def _write_found(source: Source, results: Sequence[_Result], out: Path) -> None:
    folders, entries = NamedFolders(out), []
    for result in results:
        path = source.path(result.index)
        width, height = result.size
        mask = enlarge(result.mask, height=height, width=width).to(torch.uint8).numpy()
        folder = folders.make(path)
        save_mask(mask, folder / "mask.png")
        overlap = {"box_iou": result.found.box, "jaccard": result.found.mask}
        entries.append({"image": path, "folder": folder.name, "box": list(result.box), **overlap})
    with atomic_write(out / BOXES) as beside:
        beside.write_text(json.dumps(entries, indent=1) + "\n")


def _quality(result: _Result) -> float:
    return result.found.box if result.found.mask is None else result.found.mask


def _row(finder: _Finder, truth: TrueObjects, result: _Result, *, label: str) -> Row:
    own, true = finder.image(result.index), truth.of(result.index)
    region, image = finder.find(own), finder.squeezed(own)
    width, height = own.size
    scale = np.array([image.width / width, image.height / height] * 2)
    masks = None
    if true.objects is not None:
        whole = enlarge(true.objects.masks, height=image.height, width=image.width)
        masks = whole.any(0).numpy()
    return Row(
        picture=np.asarray(image.convert("RGB")),
        map=region.map,
        mask=region.mask,
        seed=region.seed,
        box=np.array(region.box(image.width, image.height)),
        true_boxes=true.boxes * scale,
        true_masks=masks,
        label=label,
    )
