"""Patches in colors that mean the same in all images, and for all of several networks.

Red, green and blue are the first three principal components over the patches of all images
together, each from dark to bright: patches of one color have similar features, within and across
images. For a second network they are its own three components, turned to agree best with those of
the first (`components.turn_to`), in the units of the first and from dark to bright as these.

Shape letters: D width, R, C rows and columns of patches of an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dinoscale.evaluate.any_size import FittedImage, FittedImages, WholeImages
from dinoscale.evaluate.dense.attention_maps import enlarge
from dinoscale.evaluate.dense.components import (
    Basis,
    find_foreground,
    fit_basis,
    resample,
    turn_to,
)
from dinoscale.evaluate.dense.side_by_side import Place, Size, images_at, usable_by_all

_TAILS = 1.0  # percent of the patches clipped at either end of a component

Features = dict[Place, NDArray[np.float32]]  # (R, C, D) of each image
Fronts = dict[Place, NDArray[np.bool_]]  # (R, C) of each image, True for foreground


@dataclass(frozen=True)
class Colored:
    """What one network shows of the patches of many images.

    Attributes:
        network: it.
        sets: the images as it sees them, each set read once.
        places: of the images, in their order.
        basis: of its patches, over all images.
        agreement: with the first network, see `turn_to`; 1 of the first one itself.
        floors: agreement that is no merit, by name; none of the first network. `untrained`: of the
            same architecture with fresh weights, on the same images. `other_images`, if there
            are several: of the patches at the same positions of another image.
        components: (R, C, 3) of each image.
        foregrounds: (R, C) bool of each image; patches outside are black.
        ends: (2, 3), the darkest and the brightest value of each component: 1 % of the first
            network's patches are below and above.
    """

    network: WholeImages
    sets: Sequence[FittedImages]
    places: list[Place]
    basis: Basis
    agreement: float
    floors: dict[str, float]
    components: Features
    foregrounds: Fronts
    ends: NDArray[np.float64]

    def picture(
        self, place: Place, size: Size, *, smooth: bool, area: Size | None = None
    ) -> Image.Image:
        """The colors of an image, or of an area at its upper left corner.

        Args:
            place: of the image.
            size: width and height of the picture in pixels.
            smooth: bilinear, not by nearest neighbour.
            area: width and height in pixels as the network sees the image; None takes all.
        """
        how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
        color = _to_color(self.components[place], self.foregrounds[place], self.ends)
        patch = self.network.fit.patch
        box = None if area is None else (0, 0, area[0] / patch, area[1] / patch)
        return Image.fromarray(color).resize(size, how, box)

    @property
    def score(self) -> dict[str, float]:
        """Share of the variance that the three components explain, in percent."""
        return {"explained_variance": 100 * float(self.basis.explained.sum())}


def color_patches(
    networks: Sequence[WholeImages],
    sets_of: Sequence[Sequence[FittedImages]],
    *,
    foreground: bool,
) -> list[Colored]:
    """Color the patches of all images that every network can use.

    The features of one network at a time are in memory, of all images together.

    Args:
        networks: at least one.
        sets_of: for each network the same sets of images.
        foreground: split the patches by the first component of the first network, draw the
            background black, and fit the components of all networks to the foreground, as in the
            figures of DINOv2.

    Returns:
        Of each network; all of the same images.

    Raises:
        DataError: there are no such images, or too few patches.
        NonFiniteError: a feature is not a finite number.
    """
    found: list[Colored] = []
    images = usable_by_all(sets_of)
    for network, sets in zip(networks, sets_of, strict=True):
        if found:
            images = images_at(sets, found[0].places, progress=network.options.progress)
        found.append(_color(network, sets, images, found, foreground=foreground))
    return found


def _color(
    network: WholeImages,
    sets: Sequence[FittedImages],
    images: Iterable[tuple[Place, FittedImage]],
    before: Sequence[Colored],
    *,
    foreground: bool,
) -> Colored:
    """Color images in the colors of the first network, if there are networks before this one."""
    agreement, floors = 1.0, dict[str, float]()
    if before:
        fresh = _features(
            network.untrained(),
            images_at(sets, before[0].places, progress=network.options.progress),
        )
        _, _, near = _fit_like(before[0], fresh, network.fit.patch)
        floors["untrained"] = _agreement(before[0], near)[1]
        del fresh  # one network's features at a time
        features = _features(network, images)
        basis, fronts, near = _fit_like(before[0], features, network.fit.patch)
        if len(near) > 1:
            floors["other_images"] = _agreement(before[0], _of_others(near))[1]
        mixture, agreement = _agreement(before[0], near)
        basis = basis.mixed(mixture)
    else:
        features = _features(network, images)
        basis, fronts = _fit_alone(features, foreground=foreground)
    components = {place: basis.project(x) for place, x in features.items()}
    ends = before[0].ends if before else _range(components, fronts)
    places = list(features)
    return Colored(network, sets, places, basis, agreement, floors, components, fronts, ends)


def _features(network: WholeImages, images: Iterable[tuple[Place, FittedImage]]) -> Features:
    return {place: network.patch_maps(image.image)[0].cpu().numpy() for place, image in images}


def _fit_alone(features: Features, *, foreground: bool) -> tuple[Basis, Fronts]:
    """Basis over all images, and their foreground patches; all patches unless `foreground`."""
    fronts = {place: np.ones(x.shape[:2], dtype=np.bool_) for place, x in features.items()}
    basis = _fit(features, fronts)
    if foreground:
        first = [basis.project(x)[..., 0] for x in features.values()]
        fronts = dict(zip(features, find_foreground(first), strict=True))
        basis = _fit(features, fronts)
    return basis, fronts


def _fit_like(first: Colored, features: Features, patch: int) -> tuple[Basis, Fronts, Features]:
    """Basis over the first network's foreground, that, and components at the first's patches."""
    first_patch, fronts = first.network.fit.patch, {}
    for place, maps in features.items():
        mask = first.foregrounds[place][..., None]
        grid = (maps.shape[0], maps.shape[1])
        same = resample(mask, first_patch, grid=grid, to_patch=patch, mode="nearest")
        fronts[place] = same[..., 0] > 0.5
    basis, near = _fit(features, fronts), {}
    for place, maps in features.items():
        front = first.foregrounds[place]
        grid = (front.shape[0], front.shape[1])
        near[place] = resample(basis.project(maps), patch, grid=grid, to_patch=first_patch)
    return basis, fronts, near


def _of_others(near: Features) -> Features:
    """For each image the components of another one, far from it in a video, on its grid."""
    places = list(near)
    half = len(places) // 2
    found = {}
    for place, other in zip(places, places[half:] + places[:half], strict=True):
        rows, columns = near[place].shape[:2]
        maps = torch.from_numpy(near[other]).permute(2, 0, 1)
        found[place] = enlarge(maps, height=rows, width=columns).permute(1, 2, 0).numpy()
    return found


def _agreement(first: Colored, near: Features) -> tuple[NDArray[np.float64], float]:
    """`turn_to` over the first network's foreground."""
    fronts = first.foregrounds
    own = np.concatenate([maps[fronts[place]] for place, maps in near.items()])
    target = np.concatenate([first.components[place][fronts[place]] for place in near])
    return turn_to(own, target)


def _fit(features: Features, fronts: Fronts) -> Basis:
    return fit_basis([features[place][front] for place, front in fronts.items()])


def _range(components: Features, fronts: Fronts) -> NDArray[np.float64]:
    """What is dark and what is bright of each component, (2, 3), over all images."""
    values = np.concatenate([x[fronts[place]] for place, x in components.items()])
    return np.asarray(np.percentile(values, (_TAILS, 100 - _TAILS), axis=0))


def _to_color(
    components: NDArray[np.float32], front: NDArray[np.bool_], ends: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Components (R, C, 3) from dark to bright as uint8; background is black."""
    span = np.maximum(ends[1] - ends[0], np.finfo(np.float32).tiny)
    bright = ((components - ends[0]) / span).clip(0, 1) * front[..., None]
    return np.asarray((255 * bright).round().astype(np.uint8))
