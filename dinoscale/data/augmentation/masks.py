"""Which patches of the global crops the student does not see, as a function of (seed, step, image).

Rectangles are laid over a crop until enough of its patches are masked. Groups of consecutive images
of a step's global batch share out the mask ratios and draw from generators of their own, so ranks,
micro-batches and workers change nothing.

Sources: code of Oquab et al. 2023 (arXiv:2304.07193) and of Simeoni et al. 2025 (arXiv:2508.10104);
the rectangles are those of Bao et al. 2021 (arXiv:2106.08254).
Shape letters: B images, P patches of a global crop, M masked patches, C masked crops, T tries.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoscale.data.augmentation.multi_crop import NUM_GLOBAL
from dinoscale.data.seeding import Stream, generator

Rule = Literal["dinov2", "dinov3"]
_TRIES = 10  # rectangles drawn before a crop is left with fewer masked patches
_SMALLEST = 4  # patches of a rectangle
_LOG_ASPECT = math.log(0.3)  # height / width is log-uniform from 0.3 to 1 / 0.3


class Masks(NamedTuple):
    """The masked patches of a micro-batch's global crops; row v * B + b is view v of image b.

    Attributes:
        masks: whether a patch is hidden, bool (2 * B, P), patches row by row.
        rows: the masked ones, which are hidden but for those of `seen`, as ascending indices into
            the flattened (2 * B * P), int64 (M,).
        weights: 1 / masked patches of the same crop, float32 (M,).
        chosen: whether a crop is one of those to mask, bool (2 * B,): as many in each group, and
            more than have masked patches where dinov2 draws none for some.
    """

    masks: Tensor
    rows: Tensor
    weights: Tensor
    chosen: Tensor

    def seen(self) -> "Masks":
        """The same patches, none of them hidden from the student.

        Its mask token has a gradient, of zero, and so decays, as in the authors' code.
        """
        return self._replace(masks=torch.zeros_like(self.masks))


def draw_masks(
    *,
    seed: int,
    step: int,
    first_image: int,
    images: int,
    grid: tuple[int, int],
    prob: float,
    ratio: tuple[float, float],
    rule: Rule,
    group: int,
) -> Masks:
    """Draw the masks of some images of a step's global batch.

    Of the 2 * `group` global crops of a group, n = int(2 * group * prob) are masked, drawn at
    random. `ratio` is divided into n equal bins, one for each of them.

    dinov2: a crop's share of masked patches is uniform in its bin, and a few may be missing.
    dinov3: it is the upper end of its bin, and single patches make up what is missing, so that M
    depends on the number of images only.

    Args:
        seed: of the run.
        step: zero-based optimizer step.
        first_image: position of the first image in the step's global batch, a multiple of `group`.
        images: B, number of consecutive images, a multiple of `group`.
        grid: rows and columns of patches of a global crop, each at least 4.
        prob: share of the global crops that are masked, 0 to 1.
        ratio: lowest and highest share of the patches of such a crop, 0 <= low < high <= 1.
        rule: how many patches of a crop are masked.
        group: images whose global crops share out the ratios.

    Returns:
        The masks, on the CPU.

    Raises:
        ValueError: the images are not whole groups.
    """
    if images % group or first_image % group:
        raise ValueError(f"need whole groups of {group} images, got {images} from {first_image}")
    groups = range(first_image // group, (first_image + images) // group)
    generators = [generator(seed, Stream.MASKS, step, number) for number in groups]
    masked = int(NUM_GLOBAL * group * prob)
    counts = _counts(generators, masked, grid, ratio, rule)
    rectangles = _rectangles(generators, counts, grid).reshape(*counts.shape, math.prod(grid))
    if rule == "dinov3":
        _complete(generators, counts, rectangles)
    crops = np.zeros((len(groups), NUM_GLOBAL * group, rectangles.shape[-1]), dtype=bool)
    crops[:, :masked] = rectangles
    order = np.stack([rng.permutation(NUM_GLOBAL * group) for rng in generators])
    crops = np.take_along_axis(crops, order[..., None], axis=1)
    by_view = (
        rows.reshape(len(groups), NUM_GLOBAL, group, -1).swapaxes(0, 1)
        for rows in (crops, order < masked)
    )
    return _as_tensors(*(rows.reshape(NUM_GLOBAL * images, -1) for rows in by_view))


def _counts(
    generators: Sequence[np.random.Generator],
    masked: int,
    grid: tuple[int, int],
    ratio: tuple[float, float],
    rule: Rule,
) -> NDArray[np.int64]:
    """Patches to mask in each masked crop of each group, (G, n)."""
    ends = (math.prod(grid) * torch.linspace(*ratio, masked + 1)).numpy()  # float32, as the source
    below = np.zeros((len(generators), masked))  # the upper end of the bin, as a share of the bin
    if rule == "dinov2":
        below = np.stack([rng.random(masked) for rng in generators])
    counts: NDArray[np.int64] = (ends[1:] - np.diff(ends) * below).astype(np.int64)
    return counts


def _rectangles(
    generators: Sequence[np.random.Generator], counts: NDArray[np.int64], grid: tuple[int, int]
) -> NDArray[np.bool_]:
    """Cover `counts` patches of each crop with rectangles, or a few less, (G, n, rows, columns).

    One rectangle at a time is laid over every crop that needs one. It adds at least one patch, at
    most as many as are missing, and at most about half of the crop.
    """
    rows, columns = grid
    largest = rows // 2 * columns
    masks = np.zeros((*counts.shape, rows, columns), dtype=bool)
    missing = counts.copy()
    wanting = missing > 0  # (G, n)
    while wanting.any():
        of_groups = np.flatnonzero(wanting.any(axis=1))  # other groups' generators must not move
        size = (wanting.shape[1], _TRIES, 4)
        uniforms = np.stack([generators[number].random(size) for number in of_groups.tolist()])
        room = np.minimum(missing[wanting], largest)  # (C,)
        tries = _draw_rectangles(uniforms[wanting[of_groups]], room, grid)
        added, covered = _first_that_fits(tries, masks[wanting], room)
        masks[wanting] |= covered
        missing[wanting] -= added
        wanting[wanting] = (added > 0) & (missing[wanting] > 0)
    return masks


def _draw_rectangles(
    uniforms: NDArray[np.float64], room: NDArray[np.int64], grid: tuple[int, int]
) -> NDArray[np.int64]:
    """Rectangles of 4 to `room` patches before rounding: top, left, bottom, right, (C, T, 4)."""
    area = _SMALLEST + (room[:, None] - _SMALLEST) * uniforms[..., 0]
    aspect = np.exp(_LOG_ASPECT * (1 - 2 * uniforms[..., 1]))
    size = np.rint(np.sqrt(np.stack((area * aspect, area / aspect), axis=-1)))
    start = np.floor(uniforms[..., 2:] * (np.array(grid) - size + 1))
    return np.concatenate((start, start + size), axis=-1).astype(np.int64)


def _first_that_fits(
    tries: NDArray[np.int64], masks: NDArray[np.bool_], room: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The first rectangle smaller than the crop that adds 1 to `room` patches to a crop's mask.

    Returns:
        How many it adds (C,), 0 where none fits, and what it covers (C, rows, columns).
    """
    rows, columns = masks.shape[1:]
    before = np.zeros((len(masks), rows + 1, columns + 1), dtype=np.int32)
    before[:, 1:, 1:] = masks.cumsum(1, np.int32).cumsum(2)  # masked above and left of a corner
    height, width = tries[..., 2] - tries[..., 0], tries[..., 3] - tries[..., 1]
    smaller = (height < rows) & (width < columns)
    top, left, bottom, right = np.moveaxis(tries * smaller[..., None], -1, 0)
    crop = np.arange(len(masks))[:, None]
    masked = (
        before[crop, bottom, right]
        - before[crop, top, right]
        - before[crop, bottom, left]
        + before[crop, top, left]
    )
    added = (bottom - top) * (right - left) - masked  # 0 for one that is not smaller
    fits = (added > 0) & (added <= room[:, None])
    chosen = crop[:, 0], fits.argmax(axis=1)
    top, left, bottom, right = tries[chosen].T[..., None]
    row, column = np.arange(rows), np.arange(columns)
    in_rows, in_columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    found = fits.any(axis=1)
    covered = found[:, None, None] & in_rows[:, :, None] & in_columns[:, None, :]
    return np.where(found, added[chosen], 0), covered


def _complete(
    generators: Sequence[np.random.Generator],
    counts: NDArray[np.int64],
    masks: NDArray[np.bool_],
) -> None:
    """Mask single patches, drawn at random, where fewer than `counts` are masked; (G, n, P)."""
    missing = counts - masks.sum(axis=-1)
    for group, crop in np.argwhere(missing).tolist():
        free = np.flatnonzero(~masks[group, crop])
        drawn = generators[group].choice(free, missing[group, crop], replace=False)
        masks[group, crop, drawn] = True


def _as_tensors(masks: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> Masks:
    """Of all crops, the masked patches (2 * B, P) and whether one is chosen (2 * B, 1)."""
    count = masks.sum(axis=1)
    weights = np.repeat(1 / np.maximum(count, 1), count).astype(np.float32)
    rows = np.flatnonzero(masks).astype(np.int64)
    return Masks(*(torch.from_numpy(each) for each in (masks, rows, weights, chosen[:, 0])))
