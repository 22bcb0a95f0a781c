"""`dinoscale evaluate rank`: RankMe, alpha-ReQ and LiDAR of a backbone on unlabelled images.

Shape letters: N readable images, n of them with q views each, D width.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dinoscale.data.augmentation.multi_crop import NUM_GLOBAL, MultiCrop
from dinoscale.data.sources.mixture import left_out_counts
from dinoscale.data.sources.source import StoredSource
from dinoscale.data.sources.subset import SubsetSource
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.frozen_backbone import (
    DEFAULT_EXTRACTION,
    OUTPUT,
    ExtractionOptions,
    FeatureExtractor,
    load_extractor,
)
from dinoscale.evaluate.label_free.spectrum import (
    ALPHA_FIRST,
    ALPHA_LAST,
    LIDAR_DELTA,
    RANKME_IMAGES,
    alpha_req,
    lidar,
    rankme,
)
from dinoscale.evaluate.label_free.view_features import extract_views, view_crops
from dinoscale.evaluate.label_free.views import SEED
from dinoscale.runtime import distributed
from dinoscale.runtime.opening import open_once_per_node

log = logging.getLogger(__name__)

LIDAR_IMAGES, LIDAR_VIEWS = 1000, 50  # Thilak et al. 2024, section 4


@dataclass(frozen=True)
class Samples:
    """How many images are measured; a set with fewer is taken whole.

    Attributes:
        images: N, of RankMe and alpha-ReQ.
        lidar_images: n.
        views: q; 0 leaves LiDAR out.
    """

    images: int = RANKME_IMAGES
    lidar_images: int = LIDAR_IMAGES
    views: int = LIDAR_VIEWS

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if self.images < 1:
            raise ConfigError(f"images: need at least one, got {self.images}")
        if self.views < 0 or self.views == 1 or self.lidar_images < 2:
            raise ConfigError(
                "LiDAR compares views within and between images: need views >= 2 (or 0 to leave it"
                f" out) and lidar_images >= 2, got {self.views} and {self.lidar_images}"
            )


def evaluate_rank(
    weights_path: str | Path,
    spec: str,
    *,
    samples: Samples,
    untrained: bool = False,
    options: ExtractionOptions = DEFAULT_EXTRACTION,
) -> dict[str, object]:
    """Measure how many directions the features of a backbone use; labels are not read.

    All ranks of a job call it; each does its share, and all get the report.

    Args:
        weights_path: any weights file that `load_backbone` reads.
        spec: the images, as `data.train` of a config names one source on a disk.
        samples: how many of them.
        untrained: also measure the same architecture with fresh weights.
        options: which network, which device, and how features are extracted.

    Returns:
        Numbers, texts and dicts, ready for JSON: `score` has `rankme` and `lidar`, in directions;
        `alpha_req` is the decay of the spectrum, None if the rank is too low.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range.
        DataError: the set cannot be read, or too few of its images.
    """
    extractor = load_extractor(weights_path, options)
    source = open_once_per_node(partial(extractor.open, spec))
    score, alpha, counts = _measure(extractor, source, samples)
    _warn(counts, width=_width(extractor))
    report = extractor.report(
        "rank",
        data={"spec": spec, "images": len(source), "left_out": left_out_counts(source)},
        protocol=_protocol(extractor, samples),
        score=score,
        unit="directions",
        alpha_req=alpha,
        measured=counts,
    )
    if untrained:
        fresh, fresh_alpha, _ = _measure(extractor.untrained(), source, samples)
        report["untrained"] = fresh
        report["untrained_alpha_req"] = fresh_alpha
    return report


def _width(extractor: FeatureExtractor) -> int:
    width = extractor.backbone.embed_dim
    assert isinstance(width, int)
    return width


def _measure(
    extractor: FeatureExtractor, source: StoredSource, samples: Samples
) -> tuple[dict[str, float], float | None, dict[str, int]]:
    """The scores, alpha, and how many images were read for each."""
    features = _features(extractor, source, samples.images)
    if not len(features):
        raise DataError(f"none of the {min(samples.images, len(source))} images can be read")
    counts = {"images": len(features)}
    score = {"rankme": distributed.together(partial(rankme, features))}
    alpha = distributed.together(partial(alpha_req, features))
    if samples.views:
        views = _view_features(extractor, source, samples)
        if len(views) < 2:
            raise DataError(
                f"LiDAR compares images, and {len(views)} of the {len(source)} can be read; leave"
                " it out with --views 0"
            )
        counts["lidar_images"] = len(views)
        score["lidar"] = distributed.together(partial(lidar, views))
    return score, alpha, counts


def _features(extractor: FeatureExtractor, source: StoredSource, images: int) -> Tensor:
    """Features of the readable ones of some images, (N, D)."""
    some = _some(source, images)
    if some is source:
        return extractor.unlabelled(source)[0]
    extract = partial(extractor.unlabelled, some, output_key=None)
    taken = f"{OUTPUT} of {images} images"
    return extractor.cached(source, extract, taken=taken, images=images, module=__name__)[0]


def _some(source: StoredSource, images: int) -> StoredSource:
    """A fixed random choice of images; all, in their order, if there are no more."""
    return source if len(source) <= images else SubsetSource(source, images=images)


def _view_features(extractor: FeatureExtractor, source: StoredSource, samples: Samples) -> Tensor:
    """Features of views of the readable ones of some images, (n, q, D)."""
    options, some = extractor.options, _some(source, samples.lidar_images)

    def extract() -> tuple[Tensor, Tensor]:
        views = extract_views(
            extractor.backbone,
            some,
            multi_crop=_crops(extractor),
            num_views=samples.views,
            mean=extractor.card.mean,
            std=extractor.card.std,
            batch_size=options.batch_size,
            device=extractor.device,
            num_workers=options.num_workers,
            progress=options.progress,
        )
        return views, torch.arange(len(views))

    taken = f"views of {len(some)} images, {_lidar_protocol(extractor, samples)}"
    return extractor.cached(source, extract, taken=taken, images=len(some), module=__name__)[0]


def _crops(extractor: FeatureExtractor) -> MultiCrop:
    """The global crops of pre-training, of the size that the weights are evaluated at."""
    card = extractor.card
    return view_crops(size=card.crop, channels=card.backbone.in_chans)


def _protocol(extractor: FeatureExtractor, samples: Samples) -> dict[str, object]:
    about: dict[str, object] = {
        "features": "backbone output (of a ViT: normalised CLS token), before any head",
        "network": extractor.options.network,
        "images": samples.images,
        "alpha_range": [ALPHA_FIRST, ALPHA_LAST],
        **extractor.preparation,
        "max_pixel_value": extractor.card.max_pixel_value,
    }
    if samples.views:
        about["lidar"] = _lidar_protocol(extractor, samples)
    return about


def _lidar_protocol(extractor: FeatureExtractor, samples: Samples) -> dict[str, object]:
    crops = _crops(extractor)
    return {
        "images": samples.lidar_images,
        "views": samples.views,
        "delta": LIDAR_DELTA,
        "seed": SEED,
        "scale": list(crops.specs[0].scale),
        "blur_probs": [spec.blur_prob for spec in crops.specs[:NUM_GLOBAL]],
        "solarize_probs": [spec.solarize_prob for spec in crops.specs[:NUM_GLOBAL]],
        "jitter_prob": crops.color.jitter_prob,
        "gray_prob": crops.color.gray_prob,
        "flip_prob": crops.color.flip_prob,
    }


def _warn(counts: dict[str, int], *, width: int) -> None:
    """Say where the number of images, not the features, limits a rank."""
    if counts["images"] <= width:
        log.warning(
            "RankMe of %d images is at most %d, though features have %d dimensions: measure more"
            " images",
            *(counts["images"], counts["images"], width),
        )
    if counts.get("lidar_images", width + 2) <= width:
        most = counts["lidar_images"] - 1
        log.warning("LiDAR of %d images is at most %d", counts["lidar_images"], most)
