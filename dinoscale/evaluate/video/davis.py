"""Video object segmentation without training: masks of first frames propagated through videos.

Source: Caron et al. 2021 (arXiv:2104.14294), section 4.2.2, on DAVIS 2017 (arXiv:1704.00675).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dinoscale.convert.card import BackboneCard
from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.sources.videos import VOID, Video, object_numbers, open_videos
from dinoscale.errors import DataError
from dinoscale.evaluate.any_size import find_patch_size
from dinoscale.evaluate.dense.mask_pictures import compare, save_animation, save_mask
from dinoscale.evaluate.dense.mask_scores import TOLERANCE, boundary_measure, region_similarity
from dinoscale.evaluate.finished_items import FinishedItems, Form
from dinoscale.evaluate.frozen_backbone import (
    DEFAULT_LOADING,
    LoadedBackbone,
    LoadOptions,
    load_frozen,
)
from dinoscale.evaluate.progress import bar_options
from dinoscale.evaluate.video.propagation import Settings, Tracker
from dinoscale.runtime.fingerprint import Fingerprint, digest_of
from dinoscale.runtime.outputs import atomic_write, sha256

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The published numbers were measured with 0.228, a value of the authors' code.
_PUBLISHED_STD = (0.228, 0.224, 0.225)

_SCORES = "scores.json"  # written when all else of a video is

Labels = NDArray[np.uint8]
Scores = dict[str, float]
_Result = tuple[dict[str, Any], str | None]  # what is reported of a video; see `_digest`


def evaluate_video(
    weights_path: str | Path,
    spec: str,
    *,
    out: str | Path | None = None,
    names: Sequence[str] | None = None,
    settings: Settings | None = None,
    untrained: bool = False,
    fingerprint: Fingerprint | None = None,
    options: LoadOptions = DEFAULT_LOADING,
) -> dict[str, object]:
    """Track the objects of the first frames through videos, and compare with the true masks.

    As in the benchmark, the first and the last frame of a video are not scored, a score is the
    mean over its frames, and the means run over all objects of all videos.

    Args:
        weights_path: of a ViT.
        spec: the videos; see `data.sources.videos.open_videos`.
        out: folder for SEQUENCE/00000.png (indexed masks), SEQUENCE/scores.json and SEQUENCE.gif
            (found left, true right); files of finished videos stay if a later one fails.
        names: of the sequences to take; None takes all, of DAVIS those of its validation set.
        settings: of the propagation; None takes the published ones.
        untrained: also measure the same architecture with fresh weights.
        fingerprint: of the measurement, as of `FinishedItems`, to go on after an interruption.
        options: which network, and which device.

    Returns:
        What was measured and how, ready for JSON. Scores in percent: J (region similarity), F
        (boundary measure) and their mean; `floors` are the scores of the first mask copied to
        every frame.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range, or the backbone has no patch tokens.
        DataError: a video cannot be read, or there is nothing to measure or to write.
    """
    settings = settings or Settings()
    settings.check()
    loaded = load_frozen(weights_path, options)
    find_patch_size(loaded.backbone)
    videos = open_videos(spec, names=names)
    if out is None and not any(map(_scored_frames, videos)):
        raise DataError(f"{spec}: only the first frames have masks. Give --out to write the others")
    folders = [None] * len(videos) if out is None else _folders(Path(out), videos)
    kept = FinishedItems(fingerprint, loaded.device)
    found = _measure_all(loaded, videos, folders, kept, settings=settings, untrained=untrained)
    report = loaded.report(
        "video",
        spec=spec,
        protocol={"network": options.network, **_protocol(loaded.card, settings)},
        score=_mean(found, "score"),
        floors=_mean(found, "floors"),
    )
    if untrained:
        report["untrained"] = _mean(found, "untrained")
    return {**report, "sequences": found, "out": None if out is None else str(out)}


def _measure_all(
    loaded: LoadedBackbone,
    videos: Sequence[Video],
    folders: Sequence[Path | None],
    kept: FinishedItems,
    *,
    settings: Settings,
    untrained: bool,
) -> list[dict[str, Any]]:
    """Track the objects of all videos; each is written as soon as it is done."""
    fresh = loaded.untrained() if untrained else None
    of_name = {video.name: (video, folder) for video, folder in zip(videos, folders, strict=True)}
    total = sum(len(video.frames) for video in videos) * (2 if untrained else 1)
    with tqdm(total=total, unit="frame", **bar_options(shown=loaded.options.progress)) as bar:

        def work(name: str) -> _Result:
            video, folder = of_name[name]
            bar.set_description(video.name)
            scores = _measure(loaded, video, settings=settings, folder=folder, bar=bar)
            if fresh is not None:
                baseline = _measure(fresh, video, settings=settings, folder=None, bar=bar)
                scores["untrained"] = baseline["score"]
            if folder is None:
                return scores, None
            _save_scores(scores, folder)
            return scores, _digest(video, folder)

        def is_whole(name: str, result: _Result) -> bool:
            (video, folder), (_, written) = of_name[name], result
            if folder is None:
                return True
            return written is not None and written == _digest(video, folder)

        form = Form[_Result](list, _decoded, is_whole)
        found = kept.each([*of_name], work, form, at_once=1)
        return [scores for scores, _ in found]


def _decoded(said: list[Any]) -> _Result:
    scores, written = said
    return dict(scores), written


def _digest(video: Video, folder: Path) -> str | None:
    """Digest of all files written of a video, None if one cannot be read.

    In the same folder another network may have written its own since.
    """
    masks = [_mask_path(video, number, folder) for number in range(len(video.frames))]
    try:
        return digest_of([sha256(path) for path in (*masks, _animation(folder), folder / _SCORES)])
    except OSError:
        return None


def _mask_path(video: Video, index: int, folder: Path) -> Path:
    return folder / f"{video.frames[index].number:05d}.png"


def _animation(folder: Path) -> Path:
    return folder.with_suffix(".gif")


def _save_scores(scores: Mapping[str, Any], folder: Path) -> None:
    with atomic_write(folder / _SCORES) as beside:
        beside.write_text(json.dumps(scores, indent=1) + "\n")


def _scored_frames(video: Video) -> list[int]:
    """Frames that are scored: those with a mask but the first and the last, as in the benchmark."""
    return [i for i in range(1, len(video.frames) - 1) if video.frames[i].mask is not None]


def _folders(out: Path, videos: Sequence[Video]) -> list[Path]:
    """Make a folder for each video; names come from tars and may hold any character."""
    names = [re.sub(r"[^\w-]+", "_", video.name) for video in videos]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two sequences would be written to {out / twice}. Rename one.")
    try:
        for name in names:
            (out / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror}.") from None
    return [out / name for name in names]


def _normalization(card: BackboneCard) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The published code's mean and std in place of those of ImageNet; else the card's own."""
    if (card.mean, card.std) == _IMAGENET:
        return card.mean, _PUBLISHED_STD
    return card.mean, card.std


def _measure(
    loaded: LoadedBackbone,
    video: Video,
    *,
    settings: Settings,
    folder: Path | None,
    bar: tqdm[NoReturn],
) -> dict[str, Any]:
    """Track the objects of one video, score them, and write masks and animation."""
    decoder = loaded.decoder
    pixels = video.pixels(0, decoder)
    size = (pixels.shape[0], pixels.shape[1])
    first = video.mask(0, size=size)
    assert first is not None  # `open_videos` refuses videos without
    objects = object_numbers(first, name=video.name)
    numbers = np.array([0, *objects], dtype=np.uint8)
    copied = np.where(first == VOID, 0, first).astype(np.uint8)
    start = np.searchsorted(numbers, copied).astype(np.uint8)  # consecutive numbers
    mean, std = _normalization(loaded.card)
    tracker = Tracker(loaded.backbone, pixels, start, mean=mean, std=std, settings=settings)
    scored = _scored_frames(video)
    scores, baseline, drawn = [], [], []
    for i in range(len(video.frames)):
        if i:
            pixels = _same_size(video, i, decoder, size)
        found = numbers[tracker.track(pixels)] if i else copied
        truth = video.mask(i, size=size)
        if i in scored and truth is not None:
            scores.append(score_objects(found, truth, objects))
            baseline.append(score_objects(copied, truth, objects))
        if folder is not None:
            save_mask(found, _mask_path(video, i, folder))
            drawn.append(compare(pixels, found, truth))
        bar.update()
    if folder is not None:
        save_animation(drawn, _animation(folder))
    return {
        "sequence": video.name,
        "frames": len(video.frames),
        "scored_frames": len(scored),
        "objects": objects,
        "score": _summary(scores),
        "floors": _summary(baseline),
    }


def _same_size(
    video: Video, index: int, decoder: Decoder, size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Pixels of a later frame."""
    pixels = video.pixels(index, decoder)
    if pixels.shape[:2] != size:
        raise DataError(
            f"{video.frames[index].image}: has {pixels.shape[1]} x {pixels.shape[0]} pixels, the "
            f"first frame {size[1]} x {size[0]}. All frames of a video need the same size."
        )
    return pixels


def score_objects(found: Labels, truth: Labels, objects: Sequence[int]) -> NDArray[np.float64]:
    """J and F of every object in one frame, (objects, 2) in 0..1.

    Args:
        found: object numbers, (H, W).
        truth: the same; pixels of VOID are ignored.
        objects: the numbers to score.
    """
    counted = truth != VOID
    pairs = [((found == number) & counted, (truth == number) & counted) for number in objects]
    return np.array([(region_similarity(*pair), boundary_measure(*pair)) for pair in pairs])


def _summary(frames: Sequence[NDArray[np.float64]]) -> Scores:
    """Means over the frames and then the objects, in percent; empty without frames."""
    if not frames:
        return {}
    region, edge = (100 * np.mean(frames, axis=0)).mean(axis=0).tolist()
    return {"J&F": (region + edge) / 2, "J": region, "F": edge}


def _mean(sequences: Sequence[Mapping[str, Any]], key: str) -> Scores:
    """Mean over the objects of all sequences that were scored."""
    scored = [sequence for sequence in sequences if sequence[key]]
    weights = [len(sequence["objects"]) for sequence in scored]
    names = scored[0][key] if scored else ()
    return {
        name: float(np.average([sequence[key][name] for sequence in scored], weights=weights))
        for name in names
    }


def _protocol(card: BackboneCard, settings: Settings) -> dict[str, object]:
    mean, std = _normalization(card)
    return {
        "method": "labels of the first frame propagated by patch similarity",
        "features": "normalised patch tokens of the last block, L2-normalised",
        **asdict(settings),
        "mean": list(mean),
        "std": list(std),
        "interpolation": "bilinear",
        "boundary_tolerance": TOLERANCE,
        "scored": "frames with a mask but the first and the last; mean over frames, then over all "
        "objects",
        "floor": "mask of the first frame copied to every frame",
    }
