"""Patch features as colors: the first three principal components over several images together.

Patches of one color have similar features, within and across images. The sign of a component is
arbitrary; its entry of the largest absolute value is made positive (scikit-learn's rule), so that
equal weights give equal pictures.

Shape letters: P patches of all images, D width, R, C rows and columns of patches of an image.
Source: Oquab et al. 2023 (arXiv:2304.07193), figures 1 and 9; no code was published for them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinoscale.errors import DataError
from dinoscale.evaluate.any_size import (
    SIZE,
    FittedImage,
    NamedFolders,
    WholeImages,
    load_whole_images,
    save_picture,
    writing_to,
)
from dinoscale.evaluate.frozen_backbone import DEFAULT_LOADING, LoadOptions
from dinoscale.runtime.outputs import atomic_write

COMPONENTS = 3  # red, green, blue
SHEET = "pca-sheet.png"
BASIS = "pca-basis.npz"
PAIRS_DRAWN = 24  # of the sheet

_TAILS = 1.0  # percent of the patches clipped at either end of a component
_LINE_WIDTH, _LINE_HEIGHT, _GAP = 1440, 200, 8  # pixels of the sheet


@dataclass(frozen=True)
class Basis:
    """Principal components of patch features.

    Attributes:
        mean: (D,) of the features.
        components: (3, D), orthonormal, the strongest first.
        explained: share of the variance that each explains, 0..1.
    """

    mean: NDArray[np.float64]
    components: NDArray[np.float64]
    explained: NDArray[np.float64]

    def project(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Project features (..., D) to (..., 3)."""
        return ((features - self.mean) @ self.components.T).astype(np.float32)

    def save(self, file: Path) -> None:
        """Write the attributes into an NPZ file."""
        with atomic_write(file) as beside:
            np.savez(beside, **asdict(self))


def fit_basis(features: NDArray[np.float32]) -> Basis:
    """Fit the components of features (P, D), P and D at least 3.

    Raises:
        DataError: there are fewer.
    """
    from sklearn.decomposition import PCA

    if min(features.shape) < COMPONENTS:
        raise DataError(
            f"{COMPONENTS} components need at least as many patches and channels, got "
            f"{[*features.shape]}. Use more or larger images."
        )
    # By the covariance: exact, deterministic, and no copy besides the centered features.
    found = PCA(COMPONENTS, svd_solver="covariance_eigh").fit(features.astype(np.float64))
    return Basis(found.mean_, found.components_, found.explained_variance_ratio_)


def find_foreground(first: list[NDArray[np.float32]]) -> list[NDArray[np.bool_]]:
    """Split patches at the mean of the first component; the side rarer at borders is foreground.

    Args:
        first: (R, C) of each image, with mean 0 over all of them.

    Returns:
        (R, C) of each image, True for foreground.
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
    options: LoadOptions = DEFAULT_LOADING,
) -> dict[str, object]:
    """Write the patch features of every image of a set as colors into a folder.

    Each image gets a folder, see `_write_images`; beside them are the basis and a sheet.

    Args:
        weights_path: any weights file that `load_backbone` reads.
        spec: an image file, or a set as `data.train` of a config. The patches of all images, two
            megabytes an image for ViT-S/16, are in memory together.
        out: the folder; made if missing. Files of the same names are replaced.
        size: short side in pixels at which the backbone sees the images.
        square: squeeze the images to size x size instead.
        foreground: split the patches by the first component, draw the background black, and fit
            the components to the foreground, as in the figures of DINOv2.
        smooth: enlarge the colors bilinearly, not by nearest neighbour.
        limit: number of images, the first ones; None takes all.
        options: which network, and which device.

    Returns:
        What was written and how, ready for JSON; the score is the share of the variance that the
        components explain, in percent, `left_out` names images that could not be read.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range, or the backbone has no patches.
        DataError: no image can be read, or the folder cannot be written.
        NonFiniteError: a feature is not a finite number.
    """
    loaded = load_whole_images(weights_path, options, size=size, square=square)
    images = loaded.fitted(spec, limit=limit)
    fitted, features = [], []
    for image in images:  # draws a bar
        fitted.append(image)
        features.append(loaded.patch_maps(image.image)[0].cpu().numpy())
    basis, foregrounds = _fit(features, foreground=foreground)
    components = [basis.project(x) for x in features]
    folder, patch = Path(out), loaded.fit.patch
    with writing_to(folder):
        pairs = _write_images(fitted, components, foregrounds, folder, patch, smooth=smooth)
        basis.save(folder / BASIS)
        save_picture(draw_pairs(pairs[:PAIRS_DRAWN]), folder / SHEET)
    return loaded.report(
        "pca",
        spec=spec,
        **images.report(folder, SHEET),
        protocol={"network": options.network, **_protocol(loaded, foreground=foreground)},
        score={"explained_variance": 100 * float(basis.explained.sum())},
    )


def _protocol(loaded: WholeImages, *, foreground: bool) -> dict[str, object]:
    return {
        "features": "last block's patch tokens through the final norm",
        **loaded.fit.protocol(),
        "edges": "cut at the right and below",
        "foreground": foreground,
        "sign": "the entry of the largest absolute value of a component is positive",
        **loaded.normalisation,
    }


def _fit(
    features: list[NDArray[np.float32]], *, foreground: bool
) -> tuple[Basis, list[NDArray[np.bool_]]]:
    """Basis over all images, and their foreground patches; all patches unless `foreground`."""
    basis = fit_basis(np.concatenate([x.reshape(-1, x.shape[-1]) for x in features]))
    foregrounds = [np.ones(x.shape[:2], dtype=np.bool_) for x in features]
    if foreground:
        foregrounds = find_foreground([basis.project(x)[..., 0] for x in features])
        basis = fit_basis(
            np.concatenate([x[front] for x, front in zip(features, foregrounds, strict=True)])
        )
    return basis, foregrounds


def _to_colors(
    components: list[NDArray[np.float32]], foregrounds: list[NDArray[np.bool_]]
) -> list[NDArray[np.uint8]]:
    """Each component over all images from dark to bright: uint8 (R, C, 3); background is black."""
    pairs = list(zip(components, foregrounds, strict=True))
    low, high = np.percentile(
        np.concatenate([x[front] for x, front in pairs]), (_TAILS, 100 - _TAILS), axis=0
    )
    span = np.maximum(high - low, np.finfo(np.float32).tiny)
    bright = [((x - low) / span).clip(0, 1) * front[..., None] for x, front in pairs]
    return [(255 * x).round().astype(np.uint8) for x in bright]


def _write_images(
    fitted: list[FittedImage],
    components: list[NDArray[np.float32]],
    foregrounds: list[NDArray[np.bool_]],
    out: Path,
    patch: int,
    *,
    smooth: bool,
) -> list[tuple[Image.Image, Image.Image]]:
    """Write the files of each image; returns pairs of the image and its picture.

    These are `pca.png`, and `pca.npz` with `components` (R, C, 3), `foreground` (R, C) and what
    `FittedImage.save` adds.
    """
    colors = _to_colors(components, foregrounds)
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    folders, pairs = NamedFolders(out), []
    for image, numbers, front, color in zip(fitted, components, foregrounds, colors, strict=True):
        picture = Image.fromarray(color).resize(image.image.size, how)
        folder = folders.make(image.path)
        save_picture(picture, folder / "pca.png")
        image.save(folder / "pca.npz", {"components": numbers, "foreground": front}, patch=patch)
        pairs.append((image.image.convert("RGB"), picture))
    return pairs


def draw_pairs(pairs: list[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Lay out pairs of pictures of one size, as many per line as fit."""
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
