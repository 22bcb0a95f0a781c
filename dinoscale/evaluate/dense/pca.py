"""Patch features as colors, of every image of a set; see `patch_colors`.

Source: Oquab et al. 2023 (arXiv:2304.07193), figures 1 and 9; no code was published for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from dinoscale.evaluate.any_size import SIZE, NamedFolders, WholeImages, save_picture, writing_to
from dinoscale.evaluate.dense.patch_colors import Colored, color_patches
from dinoscale.evaluate.dense.side_by_side import (
    ROWS_DRAWN,
    SHEET_PANEL,
    common_area,
    draw_table,
    folders_of,
    left_out,
    load_side_by_side,
    titles_of,
    within,
)
from dinoscale.evaluate.frozen_backbone import DEFAULT_LOADING, LoadOptions
from dinoscale.evaluate.progress import bar_options

SHEET = "pca-sheet.png"
BASIS = "pca-basis.npz"
PAIRS_DRAWN = 24  # of the sheet

_LINE_WIDTH, _LINE_HEIGHT, _GAP = 1440, 200, 8  # pixels of the sheet


def evaluate_pca(
    weights_path: str | Path,
    spec: str,
    out: str | Path,
    *,
    also: Sequence[str | Path] = (),
    size: int = SIZE,
    square: bool = False,
    foreground: bool = False,
    smooth: bool = False,
    limit: int | None = None,
    options: LoadOptions = DEFAULT_LOADING,
) -> dict[str, object]:
    """Write the patch features of every image of a set as colors into a folder.

    Each image gets a folder, see `_write_images`; beside them is the basis. With several weights,
    each has a folder of these. A sheet shows the first images, with all weights side by side.

    Args:
        weights_path: any weights file that `load_backbone` reads.
        spec: an image file, or a set as `data.train` of a config. The patches of all images, two
            megabytes an image for ViT-S/16, are in memory together.
        out: the folder; made if missing. Files of the same names are replaced.
        also: other weights, in the colors of the first ones.
        size: short side in pixels at which the backbone sees the images.
        square: squeeze the images to size x size instead.
        foreground: split the patches by the first component of the first weights, draw the
            background black, and fit the components to the foreground, as in the figures of
            DINOv2.
        smooth: enlarge the colors bilinearly, not by nearest neighbour.
        limit: number of images, the first ones; None takes all.
        options: which network, and which device.

    Returns:
        What was written and how, ready for JSON; the score is the share of the variance that the
        components explain, in percent, `left_out` names images that could not be read. `also` has
        the same of the other weights, with `agreement` (0..1) as of `turn_to`, and `floors` as of
        `Colored`.

    Raises:
        CheckpointError: a weights file cannot be used.
        ConfigError: a setting is out of range, or a backbone has no patches.
        DataError: no image can be read, or the folder cannot be written.
        NonFiniteError: a feature is not a finite number.
    """
    networks = load_side_by_side([weights_path, *also], options, size=size, square=square)
    sets_of = [[network.fitted(spec, limit=limit)] for network in networks]
    found = color_patches(networks, sets_of, foreground=foreground)
    folder = Path(out)
    with writing_to(folder):
        pairs_of = [
            _write_images(colored, own, smooth=smooth)
            for colored, own in zip(found, folders_of(networks, folder), strict=True)
        ]
        save_picture(_sheet(networks, pairs_of), folder / SHEET)
    return report_pca(
        found,
        spec=spec,
        images=len(found[0].places),
        left_out=left_out(sets_of),
        folder=str(folder),
        picture=str(folder / SHEET),
        foreground=foreground,
    )


def report_pca(found: Sequence[Colored], *, foreground: bool, **parts: object) -> dict[str, object]:
    """The report of the first weights, with the numbers of the others in `also`."""
    first, *others = found
    network = first.network
    protocol = {
        "network": network.options.network,
        "features": "last block's patch tokens through the final norm",
        **network.fit.protocol(),
        "edges": "cut at the right and below",
        "foreground": foreground,
        "sign": "the entry of the largest absolute value of a component is positive",
        **network.normalisation,
    }
    also = [
        colored.network.about
        | {"score": colored.score, "agreement": colored.agreement, "floors": colored.floors}
        for colored in others
    ]
    more = {"also": also} if also else {}
    return network.report("pca", **parts, protocol=protocol, score=first.score, **more)


def _write_images(
    colored: Colored, out: Path, *, smooth: bool
) -> list[tuple[Image.Image, Image.Image]]:
    """Write the basis, and the files of each image; returns the first images and their pictures.

    These are `pca.png`, and `pca.npz` with `components` (R, C, 3), `foreground` (R, C) and what
    `FittedImage.save` adds.
    """
    colored.basis.save(out / BASIS)
    folders, pairs = NamedFolders(out), list[tuple[Image.Image, Image.Image]]()
    shown = colored.network.options.progress
    for place in tqdm(colored.places, unit="img", **bar_options(shown=shown)):
        fitted = colored.sets[place[0]].read(place[1])
        picture = colored.picture(place, fitted.image.size, smooth=smooth)
        folder = folders.make(fitted.path)
        save_picture(picture, folder / "pca.png")
        arrays = {
            "components": colored.components[place],
            "foreground": colored.foregrounds[place],
        }
        fitted.save(folder / "pca.npz", arrays, patch=colored.network.fit.patch)
        if len(pairs) < PAIRS_DRAWN:
            pairs.append((fitted.image.convert("RGB"), picture))
    return pairs


def _sheet(
    networks: Sequence[WholeImages], pairs_of: Sequence[list[tuple[Image.Image, Image.Image]]]
) -> Image.Image:
    """Pairs of image and colors; of several weights a table, with a column of colors for each."""
    if len(networks) == 1:
        return draw_pairs(pairs_of[0])
    rows = []
    for pairs in list(zip(*pairs_of, strict=True))[:ROWS_DRAWN]:
        pictures = [pairs[0][0], *(colors for _, colors in pairs)]
        area = common_area([picture.size for picture in pictures])
        size = within(area, SHEET_PANEL)
        rows.append([picture.crop((0, 0, *area)).resize(size) for picture in pictures])
    return draw_table(["image", *titles_of(networks)], rows)


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
