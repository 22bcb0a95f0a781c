"""Patch features as colors: the first three principal components over several images together.

Patches of a color have similar features, in one image and across images. The sign of a component
is free; it is fixed so that its entry of the largest absolute value is positive (scikit-learn's
rule), and equal weights give equal pictures.

Shape letters: P patches of all images, D width, R, C rows and columns of patches of an image.
Source: Oquab et al. 2023 (arXiv:2304.07193), figures 1 and 9; no code was published for them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from dinoscale.convert.card import BackboneCard
from dinoscale.convert.weights import Network
from dinoscale.convert.weights_file import load_backbone
from dinoscale.errors import DataError
from dinoscale.evaluate.any_size import (
    SIZE,
    Fit,
    NamedFolders,
    Seen,
    SeenImages,
    find_patch_size,
    open_images,
    save_picture,
    to_input,
    writing_to,
)
from dinoscale.evaluate.features import eval_mode, find_device, require_finite
from dinoscale.runtime.outputs import atomic_write

COMPONENTS = 3  # red, green, blue
SHEET = "pca-sheet.png"
BASIS = "pca-basis.npz"
PAIRS_DRAWN = 24  # of the sheet

_TAILS = 1.0  # percent of the patches at either end of a component that share the end's color
_LINE_WIDTH, _LINE_HEIGHT, _GAP = 1440, 200, 8  # pixels of the sheet


@dataclass(frozen=True)
class Basis:
    """Principal components of patch features.

    Attributes:
        mean: (D,) of the features.
        components: (3, D), orthonormal, the strongest first.
        explained: share of the variance of each, 0..1.
    """

    mean: NDArray[np.float64]
    components: NDArray[np.float64]
    explained: NDArray[np.float64]

    def project(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features (..., D) as (..., 3)."""
        return ((features - self.mean) @ self.components.T).astype(np.float32)


def fit_basis(features: NDArray[np.float32]) -> Basis:
    """Fit the components of features (P, D), P and D at least 3.

    Raises:
        DataError: there are fewer.
    """
    from sklearn.decomposition import PCA

    if min(features.shape) < COMPONENTS:
        raise DataError(
            f"{COMPONENTS} components need as many patches and channels, got {[*features.shape]}. "
            "Take more or larger images."
        )
    # By the covariance: exact, without random numbers, and no copy beside the centered features.
    found = PCA(COMPONENTS, svd_solver="covariance_eigh").fit(features.astype(np.float64))
    return Basis(found.mean_, found.components_, found.explained_variance_ratio_)


def find_foreground(first: list[NDArray[np.float32]]) -> list[NDArray[np.bool_]]:
    """Split patches at the mean of the first component; the side rarer at the borders is in front.

    Args:
        first: (R, C) of each image, with mean 0 over all of them.

    Returns:
        (R, C) of each image, True in front.
    """
    above = [component > 0 for component in first]
    border = np.concatenate([x[at] for x in above for at in (0, -1, np.s_[:, 0], np.s_[:, -1])])
    return [~x for x in above] if border.mean() > 0.5 else above


def evaluate_pca(
    weights_path: str | Path,
    spec: str,
    out: str | Path,
    *,
    size: int = SIZE,
    square: bool = False,
    foreground: bool = False,
    smooth: bool = False,
    limit: int | None = None,
    device: str | None = None,
    network: Network = "teacher",
    num_heads: int | None = None,
    progress: bool = True,
) -> dict[str, object]:
    """Write the patch features of every image of a set as colors into a folder.

    Each image gets a folder with its name: `pca.png`, and `pca.npz` with `components` (R, C, 3),
    `foreground` (R, C), `name`, `patch`, `size` of the image and `seen` by the backbone, both
    (height, width) in pixels. `pca-basis.npz` holds the basis, a sheet shows the first images.

    Args:
        weights_path: anything that `load_backbone` reads.
        spec: an image file, or a set as `data.train` of a config. All its patches are in memory at
            the same time: of a ViT-S/16 two megabytes an image.
        out: the folder; made where it is not there. Files of the same names are replaced.
        size: short side in pixels at which the backbone sees the images.
        square: squeeze the images to size x size instead.
        foreground: split the patches by the first component, leave those behind black, and fit
            the components to those in front, as the figures of DINOv2.
        smooth: enlarge the colors bilinearly, not by nearest neighbour.
        limit: only so many images, from the first on; None takes all.
        device: a torch device; None takes the accelerator if there is one.
        network: which of the two of a run or a full checkpoint.
        num_heads: for reference checkpoints whose attention heads are not 64 channels wide.
        progress: draw a bar on stderr, if that is a terminal.

    Returns:
        What was written and how, ready for JSON; the score is the share of the variance that the
        three components explain, in percent, `left_out` names images that could not be read.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range, or the backbone has no patches.
        DataError: no image can be read, or the folder cannot be written.
        NonFiniteError: a feature is not a finite number.
    """
    where = find_device(device)
    backbone, card = load_backbone(weights_path, network=network, num_heads=num_heads)
    fit = Fit(find_patch_size(backbone), size, square)
    images = SeenImages(open_images(spec, card), fit, limit=limit, progress=progress)
    backbone.to(where)
    seen, features = [], []
    for image in images:
        seen.append(image)
        features.append(_patch_features(backbone, image, card, patch=fit.patch))
    basis, fronts = _fit(features, foreground=foreground)
    components = [basis.project(x) for x in features]
    colors = _to_colors(components, fronts)
    folder = Path(out)
    with writing_to(folder):
        folders = NamedFolders(folder)
        pairs = []
        for image, numbers, front, color in zip(seen, components, fronts, colors, strict=True):
            how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
            picture = Image.fromarray(color).resize(image.image.size, how)
            _write(image, numbers, front, picture, folders.make(image.path), patch=fit.patch)
            pairs.append((image.image.convert("RGB"), picture))
        with atomic_write(folder / BASIS) as beside:
            np.savez(beside, **asdict(basis))
        save_picture(draw_pairs(pairs[:PAIRS_DRAWN]), folder / SHEET)
    return {
        "task": "pca",
        "weights": str(weights_path),
        "weights_source": card.source,
        "backbone": asdict(card.backbone),
        "spec": spec,
        "images": len(seen),
        "left_out": images.left_out,
        "folder": str(folder),
        "picture": str(folder / SHEET),
        "protocol": {
            "network": network,
            "features": "last block's patch tokens through the final norm",
            **fit.protocol(),
            "edges": "cut at the right and below",
            "foreground": foreground,
            "sign": "the entry of the largest absolute value of a component is positive",
            "mean": list(card.mean),
            "std": list(card.std),
        },
        "score": {"explained_variance": 100 * float(basis.explained.sum())},
    }


def _patch_features(
    backbone: nn.Module, seen: Seen, card: BackboneCard, *, patch: int
) -> NDArray[np.float32]:
    """Normalised patch tokens of the last block, (R, C, D)."""
    rows, columns = seen.image.height // patch, seen.image.width // patch
    pixels = to_input(seen.image, backbone, mean=card.mean, std=card.std)
    with eval_mode(backbone), torch.no_grad():
        tokens = backbone.features(pixels)[0, -rows * columns :]  # type: ignore[operator]  # a ViT
    found: NDArray[np.float32] = (
        require_finite(tokens.float()).reshape(rows, columns, -1).cpu().numpy()
    )
    return found


def _fit(
    features: list[NDArray[np.float32]], *, foreground: bool
) -> tuple[Basis, list[NDArray[np.bool_]]]:
    """Basis over all images, and their patches in front; all of them unless asked."""
    basis = fit_basis(np.concatenate([x.reshape(-1, x.shape[-1]) for x in features]))
    fronts = [np.ones(x.shape[:2], dtype=np.bool_) for x in features]
    if foreground:
        fronts = find_foreground([basis.project(x)[..., 0] for x in features])
        basis = fit_basis(
            np.concatenate([x[front] for x, front in zip(features, fronts, strict=True)])
        )
    return basis, fronts


def _to_colors(
    components: list[NDArray[np.float32]], fronts: list[NDArray[np.bool_]]
) -> list[NDArray[np.uint8]]:
    """Each component over all images from dark to bright: uint8 (R, C, 3); behind is black."""
    pairs = list(zip(components, fronts, strict=True))
    low, high = np.percentile(
        np.concatenate([x[front] for x, front in pairs]), (_TAILS, 100 - _TAILS), axis=0
    )
    span = np.maximum(high - low, np.finfo(np.float32).tiny)
    bright = [((x - low) / span).clip(0, 1) * front[..., None] for x, front in pairs]
    return [(255 * x).round().astype(np.uint8) for x in bright]


def _write(
    seen: Seen,
    components: NDArray[np.float32],
    front: NDArray[np.bool_],
    picture: Image.Image,
    folder: Path,
    *,
    patch: int,
) -> None:
    save_picture(picture, folder / "pca.png")
    seen.save(folder / "pca.npz", {"components": components, "foreground": front}, patch=patch)


def draw_pairs(pairs: list[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Lay pairs of pictures of one size next to each other, as many a line as fit."""
    places, left, top = [], 0, 0
    for first, _ in pairs:
        width = max(1, min(_LINE_WIDTH // 2, first.width * _LINE_HEIGHT // first.height))
        if left and left + 2 * width > _LINE_WIDTH:
            left, top = 0, top + _LINE_HEIGHT + _GAP
        places.append((left, top, width))
        left += 2 * width + _GAP
    used = max(left + 2 * width for left, _, width in places)
    sheet = Image.new("RGB", (used, top + _LINE_HEIGHT), "white")
    for pair, (left, top, width) in zip(pairs, places, strict=True):
        height = max(1, min(_LINE_HEIGHT, pair[0].height * width // pair[0].width))
        for number, picture in enumerate(pair):
            sheet.paste(picture.resize((width, height)), (left + number * width, top))
    return sheet
