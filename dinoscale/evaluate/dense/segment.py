"""How well the attention of the class token covers objects: the Jaccard index of Caron et al. 2021.

For every object the head counts whose thresholded map covers it best; the index is the mean over
the objects of an image, then over images. No code was published for it; `PROTOCOL` states what the
paper leaves open.

Shape letters: M objects of an image, A heads, H, W pixels, R, C rows and columns of patches.
Source: Caron et al. 2021 (arXiv:2104.14294), figure 4 and appendix; there 45.9 for ViT-S/16 and
22.0 for random weights, on the validation images of PASCAL VOC 2012.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dinoscale.data.sources.source import Source
from dinoscale.evaluate.any_size import (
    SIZE,
    WholeImages,
    load_whole_images,
    read_image,
    writing_to,
)
from dinoscale.evaluate.beside_images import still_there
from dinoscale.evaluate.dense.attention_figure import Row, draw_rows
from dinoscale.evaluate.dense.attention_maps import (
    MASS,
    attention_maps,
    center_box,
    check_mass,
    enlarge,
    head_jaccard,
    keep_mass,
)
from dinoscale.evaluate.dense.object_masks import (
    MaskOf,
    Objects,
    find_masks,
    split_objects,
    usable_images,
)
from dinoscale.evaluate.frozen_backbone import DEFAULT_LOADING, LoadOptions
from dinoscale.evaluate.progress import bar_options

PROTOCOL = {
    "method": "best head of each object by IoU; mean over the objects of an image, then images",
    "attention": "class token to patches, last block, softmax of q.k",
    "edges": "images are resized to whole patches, so that the map covers all of them",
    "scored_at": "the mask's own size; patches enlarged by nearest neighbour, void left out",
    "untrained": "the same architecture, fresh weights of seed 0",
    "floor": "a centered box of half the width and height, on every image",
}
SHEET = "segment-sheet.png"
ROWS_OF_A_KIND = 3  # of the sheet: best, median, worst


@dataclass(frozen=True)
class _Result:
    """IoU of every object of one image (M, ...), 0..1."""

    index: int  # of the image
    trained: Tensor  # (M, A)
    untrained: Tensor  # (M, A)
    center_box: Tensor  # (M, 1)
    whole_image: Tensor  # (M, 1)


def evaluate_segment(
    weights_path: str | Path,
    spec: str,
    *,
    masks: str | None = None,
    indexed: bool = False,
    size: int = SIZE,
    square: bool = False,
    mass: float = MASS,
    out: str | Path | None = None,
    options: LoadOptions = DEFAULT_LOADING,
) -> dict[str, object]:
    """Score the attention of a weights file against masks of objects, and that of baselines.

    Args:
        weights_path: any weights file that `load_backbone` reads.
        spec: images, as `data.train` of a config, or one file; shards hold masks as KEY.mask.png.
        masks: folder of masks named as the images, if the set holds none.
        indexed: gray masks hold object numbers, as those with a palette: 0 is background, 255 void.
            Otherwise a gray mask is one object, where it is brighter than 127.
        size: short side in pixels at which the backbone sees the images.
        square: squeeze the images to size x size instead.
        mass: share of a map's attention that its mask keeps, as of `attention_maps.MASS`.
        out: folder for a sheet of the best, median and worst images; None draws nothing.
        options: which network, and which device.

    Returns:
        In percent `score`, `untrained`, `floors` and `whole_image`, each with `jaccard`; `heads`,
        where each head alone covers all objects; and how it was measured. Ready for JSON.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range, or the backbone has no attention.
        DataError: no image with a mask can be read, or a mask has another size than its image.
    """
    check_mass(mass)
    loaded = load_whole_images(weights_path, options, size=size, square=square)
    source = loaded.open(spec)
    mask_of = find_masks(source, spec, masks)
    indices, left_out = usable_images(source, mask_of, loaded.fit, indexed=indexed)
    scorer = _Scorer(loaded, source, mask_of, indexed=indexed, mass=mass)
    shown = bar_options(shown=options.progress)
    results = [scorer.score(index) for index in tqdm(indices, unit="img", **shown)]
    report = loaded.report(
        "segment",
        spec=spec,
        masks=masks,
        images=len(results),
        objects=sum(len(result.trained) for result in results),
        left_out=asdict(left_out),
        protocol={"network": options.network, **scorer.protocol()},
        **_scores(results),
    )
    print(_table(results), file=sys.stderr)
    if out is not None:
        report["picture"] = str(Path(out) / SHEET)
        with writing_to(Path(out)):
            _draw(scorer, results, Path(out) / SHEET)
    return report


class _Scorer:
    """Scores the attention of a ViT, and of its untrained twin, against the objects of images."""

    def __init__(
        self, loaded: WholeImages, source: Source, mask_of: MaskOf, *, indexed: bool, mass: float
    ) -> None:
        self.mass = mass
        self._trained, self._untrained = loaded, loaded.untrained()
        self._source, self._mask_of, self._indexed = source, mask_of, indexed

    def protocol(self) -> dict[str, object]:
        """All that changes a number but the weights, ready for JSON."""
        return {
            **PROTOCOL,
            **self._trained.fit.protocol(),
            "mass": self.mass,
            "indexed": self._indexed,
            **self._trained.normalisation,
        }

    def score(self, index: int) -> _Result:
        """IoU of the objects of one image with the heads of both networks and the baselines."""
        image, objects = self.image(index), self.objects(index)
        trained, untrained = (
            jaccard_of_objects(keep_mass(_maps(network, image), mass=self.mass), objects)
            for network in (self._trained, self._untrained)
        )
        return _Result(
            index,
            trained,
            untrained,
            jaccard_of_objects(center_box(*objects.counted.shape), objects),
            jaccard_of_objects(torch.ones(1, 1, 1, dtype=torch.bool), objects),
        )

    def image(self, index: int) -> Image.Image:
        """The image as the backbone sees it."""
        return self._trained.fit.squeeze(read_image(self._source, index))

    @property
    def title(self) -> str:
        """Of the sheet."""
        return f"{Path(self._trained.path).name}: attention against objects"

    def objects(self, index: int) -> Objects:
        """The objects at the image's own size.

        Raises:
            DataError: the mask has vanished, or cannot be used.
        """
        mask = still_there(self._mask_of(index), self._source.path(index), "mask")
        return split_objects(mask, indexed=self._indexed)

    def maps(self, image: Image.Image) -> Tensor:
        """Attention (A, R, C) of the trained network."""
        return _maps(self._trained, image)


def _maps(network: WholeImages, image: Image.Image) -> Tensor:
    return attention_maps(network.backbone, network.input(image))[0]


def jaccard_of_objects(kept: Tensor, objects: Objects) -> Tensor:
    """Intersection over union of every object (M, H, W) with the patches of every head.

    Args:
        kept: (A, R, C) bool; enlarged to the masks by nearest neighbour.
        objects: void pixels count neither for nor against.

    Returns:
        (M, A) float32, 0..1.
    """
    counted = objects.counted[None]
    return torch.cat([head_jaccard(kept[None], mask[None], counted) for mask in objects.masks])


def mean_over_images(covers: Sequence[Tensor]) -> float:
    """Mean over the objects (M, A) of an image, each by its best head, then images; percent."""
    return 100 * sum(float(cover.amax(dim=1).mean()) for cover in covers) / len(covers)


def _heads(covers: Sequence[Tensor]) -> list[float]:
    """The same of each head alone."""
    num_heads = covers[0].shape[1]
    return [mean_over_images([cover[:, h : h + 1] for cover in covers]) for h in range(num_heads)]


def _scores(results: Sequence[_Result]) -> dict[str, object]:
    trained = [result.trained for result in results]
    untrained = [result.untrained for result in results]
    return {
        "score": {"jaccard": mean_over_images(trained)},
        "untrained": {"jaccard": mean_over_images(untrained)},
        "floors": {"jaccard": mean_over_images([result.center_box for result in results])},
        "whole_image": {"jaccard": mean_over_images([result.whole_image for result in results])},
        "heads": {"score": _heads(trained), "untrained": _heads(untrained)},
    }


def _table(results: Sequence[_Result]) -> str:
    """Percent of every head and of the best head of each object, with the baselines."""
    rows = {
        "these weights": [result.trained for result in results],
        "untrained": [result.untrained for result in results],
        "centered box": [result.center_box for result in results],
        "whole image": [result.whole_image for result in results],
    }
    num_heads = results[0].trained.shape[1]
    names = "".join(f"{f'head {head}':>9}" for head in range(num_heads))
    lines = [f"{'Jaccard, %':<14}{'best head':>10}{names}"]
    for name, covers in rows.items():
        heads = _heads(covers) if covers[0].shape[1] == num_heads > 1 else []
        numbers = "".join(f"{value:9.1f}" for value in heads)
        lines.append(f"{name:<14}{mean_over_images(covers):10.1f}{numbers}")
    return "\n".join(lines)


def _draw(scorer: _Scorer, results: Sequence[_Result], path: Path) -> None:
    """Draw the best, median and worst images; of each the largest object with its best head."""
    ranked = sorted(results, key=lambda result: -mean_over_images([result.trained]))
    middle = max(0, (len(ranked) - ROWS_OF_A_KIND) // 2)
    kinds = {
        "best": ranked[:ROWS_OF_A_KIND],
        "median": ranked[middle : middle + ROWS_OF_A_KIND],
        "worst": ranked[-ROWS_OF_A_KIND:],
    }
    labels: dict[int, str] = {}
    for kind, chosen in kinds.items():
        for result in chosen:
            labels.setdefault(result.index, kind)  # one of few images may be several
    by_index = {result.index: result for result in results}
    rows = [_row(scorer, by_index[index], label=kind) for index, kind in labels.items()]
    note = (
        f"Jaccard {mean_over_images([r.trained for r in results]):.1f} %, untrained "
        f"{mean_over_images([r.untrained for r in results]):.1f} %, centered box "
        f"{mean_over_images([r.center_box for r in results]):.1f} % ({len(results)} images)"
    )
    draw_rows(rows, path, title=scorer.title, note=note, mass=scorer.mass)


def _row(scorer: _Scorer, result: _Result, *, label: str) -> Row:
    image, objects = scorer.image(result.index), scorer.objects(result.index)
    largest = int(objects.masks.sum(dim=(1, 2)).argmax())
    head = int(result.trained[largest].argmax())
    maps = scorer.maps(image)
    return Row(
        picture=np.asarray(image.convert("RGB")),
        heads=maps.numpy(),
        kept=keep_mass(maps[head], mass=scorer.mass).numpy(),
        mask=enlarge(objects.masks[largest], height=image.height, width=image.width).numpy(),
        best_head=head,
        jaccard=float(result.trained[largest, head]),
        label=label,
    )
