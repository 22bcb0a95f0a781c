"""Places of one picture found in another by the nearest patch features, without training: PCK.

Shape letters: K places of a pair, R, C rows and columns of patches, D width.
Source: Min et al. 2019 (arXiv:1908.10543) for the data and PCK; matching by the nearest patch as in
Amir et al. 2021 (arXiv:2112.05814) and El Banani et al. 2024 (arXiv:2404.08636).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dinoscale.errors import ConfigError, DataError, UnavailableError
from dinoscale.evaluate.any_size import (
    SIZE,
    WholeImages,
    image_mode,
    load_whole_images_on_ranks,
    save_picture,
    writing_to,
)
from dinoscale.evaluate.correspondence.figure import Match, draw_matches
from dinoscale.evaluate.correspondence.matching import find_places, nearest_centers, pck
from dinoscale.evaluate.correspondence.pairs import read_pairs
from dinoscale.evaluate.correspondence.views import (
    AnnotatedPairs,
    Pairs,
    Places,
    View,
    WarpedPictures,
    no_place,
)
from dinoscale.evaluate.finished_items import FinishedItems, Form
from dinoscale.evaluate.frozen_backbone import DEFAULT_LOADING, LoadOptions
from dinoscale.evaluate.patch_features import (
    IN_WORDS,
    PatchFeatures,
    check_features,
    patch_features,
    patch_pixels,
)
from dinoscale.evaluate.progress import bar_options
from dinoscale.evaluate.sheet import best_median_worst
from dinoscale.runtime import distributed
from dinoscale.runtime.fingerprint import Fingerprint

log = logging.getLogger(__name__)

ALPHAS = (0.1, 0.05)  # thresholds of PCK; the first is the headline
SHEET = "correspond-sheet.png"
CACHE_BYTES = 2**29  # of features of pictures that come again in other pairs

_FOUND, _UNTRAINED, _PIXELS = "score", "untrained", "pixels"  # whose features match
_SAME, _POSSIBLE = "same_position", "best_possible"  # without features
_PROTOCOL = {
    "method": "patch of the highest cosine; the place is its center",
    "score": "share of correct key points of a pair, mean over pairs",
    "edges": "images are resized to whole patches",
    "same_position": "as a fraction of width and height",
    "pixels": "the normalised pixels of a patch as its features",
    "floors": "the better of these two",
    "best_possible": "the center of the right patch",
}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Given:
    """Where the pairs come from: `pairs`, or `images` that are warped.

    Attributes:
        pairs: the folder of SPair-71k or a JSON file, see `pairs`.
        images: folder of the names in the JSON file; without `pairs`, images to warp.
        warp: warp images.
        split: of SPair-71k; None takes test.
        length_of: box or image; None takes boxes where there are some.
        seed: of the warps; None takes 0.
        limit: number of pairs, or of images to warp; None takes all.
    """

    pairs: str | None = None
    images: str | None = None
    warp: bool = False
    split: str | None = None
    length_of: str | None = None
    seed: int | None = None
    limit: int | None = None

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            ConfigError: something does not.
        """
        if self.warp == (self.pairs is not None) or (self.warp and self.images is None):
            raise ConfigError("correspond: give --pairs PAIRS, or --images DATA and --warp")
        if self.warp and (self.split or self.length_of):
            raise ConfigError("correspond: --split and --length-of are of --pairs, not of --warp")
        if not self.warp and self.seed is not None:
            raise ConfigError("correspond: --seed is of --warp")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"correspond: --seed: need 0 or more, got {self.seed}")

    def open(self, loaded: WholeImages) -> Pairs:
        """Open the pairs.

        Raises:
            ConfigError: an option, or the backbone's channels, do not fit them.
            DataError: they cannot be read, or a picture is missing.
        """
        if self.pairs is None:
            assert self.images is not None  # checked
            source = loaded.open(self.images)
            return WarpedPictures(source, loaded.fit, seed=self.seed or 0, limit=self.limit)
        image_mode(channels=loaded.card.backbone.in_chans)
        pairs = read_pairs(self.pairs, images=self.images, split=self.split, limit=self.limit)
        return AnnotatedPairs(pairs, loaded.decoder, length_of=self.length_of)


@dataclass(frozen=True)
class _Result:
    """One pair: errors (K,) of every kind of match, as fractions of the length."""

    index: int
    errors: Mapping[str, Array]
    outside: int  # points that were left out


def evaluate_correspond(
    weights_path: str | Path,
    given: Given,
    *,
    features: PatchFeatures = "patches",
    size: int = SIZE,
    square: bool = False,
    out: str | Path | None = None,
    untrained: bool = False,
    fingerprint: Fingerprint | None = None,
    options: LoadOptions = DEFAULT_LOADING,
) -> dict[str, object]:
    """Match the key points of pairs by patch features; all ranks of a job share the pairs.

    Args:
        weights_path: any weights of a ViT that `load_backbone` reads.
        given: where the pairs come from.
        features: of the patches.
        size: short side in pixels at which the backbone sees the pictures.
        square: squeeze the pictures to size x size instead.
        out: folder for a sheet of the best, median and worst pairs; None draws nothing.
        untrained: also measure the same architecture with fresh weights.
        fingerprint: of the measurement, as of `FinishedItems`, to go on after an interruption.
        options: which network, and which device.

    Returns:
        Ready for JSON, in percent: `score`, `untrained`, `best_possible`, `baselines` (the same
        position, pixels) and `floors`, the better one, each with PCK at 0.1 and 0.05; `by_point`,
        the mean over key points; `categories`, if they are known; and how it was measured.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range, or the backbone has no patches.
        DataError: pairs cannot be read, a picture of one is missing, or none can be used.
        NonFiniteError: a feature is not a finite number.
    """
    given.check()
    check_features(features)
    loaded = load_whole_images_on_ranks(weights_path, options, size=size, square=square)
    pairs = distributed.together(lambda: given.open(loaded))
    networks = {_FOUND: loaded, **({_UNTRAINED: loaded.untrained()} if untrained else {})}
    matcher = Matcher(pairs, networks, features)
    kept = FinishedItems(fingerprint, loaded.device)
    results, left_out = _measure(matcher, kept, progress=options.progress)
    scores = {kind: _score([r.errors[kind] for r in results]) for kind in results[0].errors}
    baselines = {kind: scores.pop(kind) for kind in (_SAME, _PIXELS)}
    report = loaded.report(
        "correspond",
        data={
            **{"pairs": given.pairs, "images": given.images, "split": given.split},
            **{"number": len(results), "points": sum(len(r.errors[_FOUND]) for r in results)},
        },
        left_out={"pairs": left_out, "points_outside": sum(result.outside for result in results)},
        protocol={"network": options.network, **matcher.protocol()},
        **scores,
        floors=max(baselines.values(), key=lambda score: next(iter(score.values()))),
        baselines=baselines,
        by_point=_score([np.concatenate([result.errors[_FOUND] for result in results])]),
        categories=_by_category(pairs, results),
    )
    if out is not None:
        report["picture"] = _draw(matcher, results, Path(out))
    return report


class Matcher:
    """Matches the key points of pairs by the features of networks and of pixels."""

    def __init__(
        self, pairs: Pairs, networks: Mapping[str, WholeImages], features: PatchFeatures
    ) -> None:
        self.pairs = pairs
        self._networks, self._features = networks, features
        self._kept: OrderedDict[str, _Seen] = OrderedDict()

    def protocol(self) -> dict[str, object]:
        """All that changes a number but the weights, ready for JSON."""
        loaded = self._networks[_FOUND]
        return {
            **_PROTOCOL,
            "features": IN_WORDS[self._features],
            **self.pairs.protocol(),
            **loaded.fit.protocol(),
            **loaded.normalisation,
        }

    def result(self, index: int) -> _Result:
        """Match one pair.

        Raises:
            BadSampleError: a picture cannot be decoded.
            DataError: it has no point that both pictures show.
        """
        source, target, places = self._pair(index)
        found = {
            kind: find_places(source.features[kind], target.features[kind], places.source)
            for kind in source.features
        }
        found[_SAME] = places.source
        rows, columns = target.features[_PIXELS].shape[:2]
        found[_POSSIBLE] = nearest_centers(rows, columns, places.target)
        errors = {
            kind: np.hypot(*((at - places.target) * target.size).T) / places.length
            for kind, at in found.items()
        }
        return _Result(index, errors, places.outside)

    def match(self, index: int, *, label: str) -> Match:
        """The same pair, to be drawn."""
        source, target, places = self._pair(index)
        found = find_places(source.features[_FOUND], target.features[_FOUND], places.source)
        errors = np.hypot(*((found - places.target) * target.size).T) / places.length
        pictures = [view.open().convert("RGB") for view in self.pairs.views(index)]
        right = errors <= ALPHAS[0]
        return Match(pictures[0], pictures[1], places.source, found, places.target, right, label)

    def _pair(self, index: int) -> tuple[_Seen, _Seen, Places]:
        source, target = (self._seen(view) for view in self.pairs.views(index))
        places = self.pairs.places(index, source.size, target.size)
        if not len(places.source):
            raise no_place(self.pairs, index)
        return source, target, places

    def _seen(self, view: View) -> _Seen:
        """The features of a view, computed once while it is among the recent ones."""
        if view.name in self._kept:
            self._kept.move_to_end(view.name)
            return self._kept[view.name]
        image = view.open()
        try:
            seen = _Seen(image.size, self._features_of(image))
        except DataError as error:
            raise DataError(f"{view.name}: {error}") from None
        self._kept[view.name] = seen
        while len(self._kept) > 2 and sum(each.bytes for each in self._kept.values()) > CACHE_BYTES:
            self._kept.popitem(last=False)
        return seen

    def _features_of(self, image: Image.Image) -> dict[str, Tensor]:
        loaded = self._networks[_FOUND]
        squeezed = loaded.fit.squeeze(image)
        found = {
            kind: patch_features(network, squeezed, features=self._features)
            for kind, network in self._networks.items()
        }
        return {**found, _PIXELS: patch_pixels(loaded, squeezed)}


@dataclass(frozen=True)
class _Seen:
    """A picture's width and height in pixels, and its features (R, C, D) by their kind."""

    size: tuple[int, int]
    features: Mapping[str, Tensor]

    @property
    def bytes(self) -> int:
        """That the features take."""
        return sum(tensor.nbytes for tensor in self.features.values())


def _measure(
    matcher: Matcher, kept: FinishedItems, *, progress: bool
) -> tuple[list[_Result], list[str]]:
    """The results of all pairs, on every rank, and why the others have none."""
    numbers = range(len(matcher.pairs))
    total = len(numbers[distributed.rank() :: distributed.world_size()])
    shown = progress and distributed.rank() == 0
    with tqdm(total=total, unit="pair", **bar_options(shown=shown)) as bar:

        def work(index: int) -> _Result | str:
            try:
                return matcher.result(index)
            except UnavailableError:
                raise
            except DataError as error:
                return str(error)
            finally:
                bar.update()

        found = kept.each(numbers, work, _FORM)
    left_out = [reason for reason in found if isinstance(reason, str)]
    for reason in left_out:
        log.warning("left out %s", reason)
    results = [result for result in found if isinstance(result, _Result)]
    if not results:
        raise DataError(f"no pair can be used; the first: {left_out[0]}")
    outside = sum(result.outside for result in results)
    if outside:
        log.warning("left out %d key points that lie outside their pictures", outside)
    return results, left_out


def _encoded(result: _Result | str) -> object:
    """JSON of a result; a text is why there is none."""
    if isinstance(result, str):
        return result
    errors = {kind: of_kind.tolist() for kind, of_kind in result.errors.items()}
    return {"index": result.index, "errors": errors, "outside": result.outside}


def _decoded(said: Any) -> _Result | str:
    if isinstance(said, str):
        return said
    errors = {kind: np.array(of_kind, dtype=np.float64) for kind, of_kind in said["errors"].items()}
    return _Result(said["index"], errors, said["outside"])


_FORM: Form[_Result | str] = Form(_encoded, _decoded)


def _score(errors: Sequence[Array]) -> dict[str, float]:
    return {f"pck@{alpha:g}": pck(errors, alpha) for alpha in ALPHAS}


def _by_category(pairs: Pairs, results: Sequence[_Result]) -> dict[str, dict[str, float]]:
    """The score of each category; empty if they are not known."""
    found: dict[str, list[Array]] = {}
    for result in results if pairs.categories else ():
        category = pairs.categories[result.index]
        found.setdefault(category, []).append(result.errors[_FOUND])
    return {name: _score(errors) for name, errors in found.items() if name}


def _draw(matcher: Matcher, results: Sequence[_Result], out: Path) -> str:
    """Draw the best, median and worst pairs, on rank 0; the path of the sheet."""

    def quality(result: _Result) -> float:
        return -float(result.errors[_FOUND].mean())

    if distributed.rank() == 0:
        shown = best_median_worst(results, quality)
        matches = [matcher.match(result.index, label=kind) for kind, result in shown]
        with writing_to(out):
            save_picture(draw_matches(matches), out / SHEET)
    return str(out / SHEET)
