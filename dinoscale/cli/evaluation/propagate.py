"""`dinoscale evaluate video`, `retrieve` and `copies`: parse, call one function."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dinoscale.cli.arguments import (
    LABELLED_HELP,
    add_batch_size,
    add_no_cache,
    add_num_workers,
    add_number,
    add_untrained,
    add_weights,
    extraction_options,
    load_options,
)
from dinoscale.errors import ConfigError

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands


def add_video(tasks: SubCommands) -> None:
    """Add `evaluate video`."""
    video = tasks.add_parser(
        "video",
        help="follow the objects of a first frame through a video (J and F of DAVIS)",
        description="Video object segmentation without training: the masks of the first frame are"
        " propagated to the later frames by the similarity of patch features (DAVIS 2017 protocol"
        " of the DINO paper). Reports region similarity J, boundary measure F and their mean, and"
        " as baseline those of the first mask copied to every frame. DATA is the folder of DAVIS"
        " (JPEGImages, Annotations; its validation sequences are taken), or tars or a folder with"
        " SEQUENCE/00000.jpg and SEQUENCE/00000.mask.png. Without scores, only first frames need"
        " masks.",
        epilog="example: dinoscale evaluate video weights.safetensors DAVIS --out masks/",
    )
    add_weights(video)
    video.add_argument("data", metavar="DATA", help="folder of DAVIS, folder of sequences, or tars")
    video.add_argument(
        "--out", metavar="DIR", help="write SEQUENCE/00000.png, scores.json and SEQUENCE.gif there"
    )
    video.add_argument(
        "--sequences", metavar="FILE", help="text file with the names to take, one per line"
    )
    add_number(video, "--size", "short side of a frame", default=480, metavar="PIXELS")
    add_number(video, "--context", "number of recent frames that vote", default=7)
    add_number(video, "--radius", "of the neighbourhood, in patches", default=12)
    add_number(video, "--top", "patches that vote", default=5)
    says = "temperature of the votes"
    add_number(video, "--temp", says, default=0.1, kind=float, metavar="T")
    add_untrained(video)
    video.set_defaults(run=_evaluate_video)


def add_retrieve(tasks: SubCommands) -> None:
    """Add `evaluate retrieve`."""
    retrieve = tasks.add_parser(
        "retrieve",
        help="find images of the same class or landmark (mAP)",
        description="Image retrieval by the cosine similarity of CLS features. With --data every"
        " image is a query, and the other images of its class are positives. With --images and"
        " --ground-truth the protocol of revisited Oxford and Paris: easy, medium and hard, junk"
        " left out. The ground truth is JSON: {imlist: [names], qimlist: [names], gnd: [{easy:"
        " [numbers], hard: [...], junk: [...]}, one per query]}. The benchmark's pickles are not"
        " opened; the error message shows how to convert one that you trust.",
        epilog="example: dinoscale evaluate retrieve weights.safetensors --images roxford5k"
        " --ground-truth gnd_roxford5k.json",
    )
    add_weights(retrieve)
    retrieve.add_argument("--data", metavar="DATA", help=LABELLED_HELP)
    add_number(retrieve, "--queries", "of --data: images that are queries, default all")
    retrieve.add_argument("--images", metavar="DIR", help="folder of NAME.jpg or jpg/NAME.jpg")
    retrieve.add_argument("--ground-truth", metavar="FILE", help="JSON, see above")
    says = "of --images: longer side at most, default 224"
    add_number(retrieve, "--imsize", says, metavar="PIXELS")
    retrieve.add_argument(
        "--multi-scale", action="store_true", help="mean of scales 1, 1/sqrt(2) and 1/2"
    )
    add_batch_size(retrieve, of="of --data: ")
    add_num_workers(retrieve, of="of --data: ")
    add_untrained(retrieve)
    add_no_cache(retrieve, of="of --data: ")
    retrieve.set_defaults(run=_evaluate_retrieve)


def add_copies(tasks: SubCommands) -> None:
    """Add `evaluate copies`."""
    copies = tasks.add_parser(
        "copies",
        help="find the originals of edited pictures (copy detection, mAP)",
        description="Copy detection by the protocol of the DINO paper: squares of 320 pixels, CLS"
        " token and pooled patches, whitening learned from other images, the first 20 ranks. With"
        " --originals and --queries (Copydays): every folder of queries is a separate block"
        " (strong, jpegqual/3, ...). A query belongs to the original with the longest name that the"
        " query's name begins with before a separator (sea.jpg, sea_crop.jpg), or by --prefix or"
        " --pairs. With --data and --make-copies: copies of some images of any set are made (crop,"
        " jpeg, blur, color, rotation, and all of them: strong), and their originals are searched"
        " among all of its images.",
        epilog="example: dinoscale evaluate copies weights.safetensors"
        " --originals copydays/original --queries copydays/queries --prefix 4"
        " --distractors yfcc10k --whitening yfcc20k",
    )
    add_weights(copies)
    _add_given_copies(copies)
    copies.add_argument("--data", metavar="DATA", help="images to make copies of")
    copies.add_argument("--make-copies", action="store_true", help="of images of --data")
    add_number(copies, "--num-queries", "of --make-copies: images copied, default 157")
    add_number(copies, "--seed", "of --make-copies: of the choice and the edits, default 0")
    copies.add_argument(
        "--whitening", metavar="DATA", help="other images to learn a whitening from, default none"
    )
    add_number(copies, "--size", "side of the squares", default=320, metavar="PIXELS")
    add_batch_size(copies)
    add_num_workers(copies)
    add_untrained(copies)
    add_no_cache(copies)
    copies.set_defaults(run=_evaluate_copies)


def _add_given_copies(copies: argparse.ArgumentParser) -> None:
    copies.add_argument("--originals", metavar="DIR", help="folder of the originals")
    copies.add_argument(
        "--queries", metavar="DIR", help="folder of copies, each subfolder is a block"
    )
    copies.add_argument(
        "--distractors", metavar="DATA", help="more images of the database, default none"
    )
    copies.add_argument(
        "--pairs", metavar="FILE", help="CSV with the columns query and original (relative paths)"
    )
    says = "file names share their first N characters (Copydays: 4)"
    add_number(copies, "--prefix", says)


def _evaluate_video(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.data.sources.videos import read_names
    from dinoscale.evaluate.video.davis import evaluate_video
    from dinoscale.evaluate.video.propagation import Settings

    return evaluate_video(
        options.weights,
        options.data,
        out=options.out,
        names=None if options.sequences is None else read_names(options.sequences),
        settings=Settings(
            size=options.size,
            context=options.context,
            radius=options.radius,
            top=options.top,
            temp=options.temp,
        ),
        untrained=options.untrained,
        fingerprint=options.fingerprint,
        options=load_options(options),
    )


def _evaluate_retrieve(options: argparse.Namespace) -> dict[str, Any]:
    landmarks = (options.images, options.ground_truth)
    if options.data is not None:
        _refuse_beside(options, "--data", ("images", "ground_truth", "imsize"))
        from dinoscale.evaluate.retrieval.retrieve import evaluate_retrieve

        return evaluate_retrieve(
            options.weights,
            options.data,
            queries=options.queries,
            multi_scale=options.multi_scale,
            untrained=options.untrained,
            options=extraction_options(options, batch_size=options.batch_size),
        )
    if None in landmarks:
        raise ConfigError("retrieve: give --data DATA, or --images DIR and --ground-truth FILE")
    _refuse_beside(options, "--images", ("queries",))
    from dinoscale.evaluate.retrieval.landmarks import SIZE, evaluate_landmarks

    return evaluate_landmarks(
        options.weights,
        options.images,
        options.ground_truth,
        size=SIZE if options.imsize is None else options.imsize,
        multi_scale=options.multi_scale,
        untrained=options.untrained,
        options=load_options(options),
    )


def _evaluate_copies(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.evaluate.retrieval.copies import (
        MADE_QUERIES,
        Settings,
        evaluate_copies,
        evaluate_made_copies,
    )

    settings = Settings(size=options.size, whitening=options.whitening, untrained=options.untrained)
    extraction = extraction_options(options, batch_size=options.batch_size)
    if options.make_copies and options.data is not None:
        unused = ("originals", "queries", "distractors", "pairs", "prefix")
        _refuse_beside(options, "--make-copies", unused)
        return evaluate_made_copies(
            options.weights,
            options.data,
            queries=MADE_QUERIES if options.num_queries is None else options.num_queries,
            seed=options.seed or 0,
            settings=settings,
            options=extraction,
        )
    if options.originals is None or options.queries is None:
        raise ConfigError("copies: give --originals and --queries, or --data with --make-copies")
    _refuse_beside(options, "--originals", ("data", "make_copies", "num_queries", "seed"))
    return evaluate_copies(
        options.weights,
        options.originals,
        options.queries,
        distractors=options.distractors,
        pairs=options.pairs,
        prefix=options.prefix,
        settings=settings,
        options=extraction,
    )


def _refuse_beside(options: argparse.Namespace, mode: str, names: Sequence[str]) -> None:
    """Refuse options that another one makes meaningless, rather than ignore them."""
    for name in names:
        if getattr(options, name) not in (None, False):
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} has no meaning beside {mode}. Leave one of them out.")
