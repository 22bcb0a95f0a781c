"""`dinoscale evaluate video`, `retrieve` and `copies`: parse, call one function."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dinoscale.cli.arguments import (
    BATCH_HELP,
    DATA_HELP,
    UNTRAINED_HELP,
    WORKERS_HELP,
    add_weights,
)
from dinoscale.errors import ConfigError

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands


def add_video(tasks: SubCommands) -> None:
    """`evaluate video`."""
    video = tasks.add_parser(
        "video",
        help="follow the objects of a first frame through a video (J and F of DAVIS)",
        description="Video object segmentation without training: the masks of the first frame are"
        " carried to the later frames by the similarity of patch features (DAVIS 2017 protocol of"
        " the DINO paper). Reports region similarity J, boundary measure F and their mean, beside"
        " the floor: the first mask copied to every frame. DATA is the folder of DAVIS (JPEGImages,"
        " Annotations; its validation sequences are taken), or tars or a folder with"
        " SEQUENCE/00000.jpg and SEQUENCE/00000.mask.png; only first frames need masks if nothing"
        " is to be scored.",
        epilog="example: dinoscale evaluate video weights.safetensors DAVIS --out masks/",
    )
    add_weights(video)
    video.add_argument("data", metavar="DATA", help="folder of DAVIS, folder of sequences, or tars")
    video.add_argument(
        "--out", metavar="DIR", help="write SEQUENCE/00000.png, scores.json and SEQUENCE.gif there"
    )
    video.add_argument(
        "--sequences", metavar="FILE", help="text file with the names to take, one a line"
    )
    video.add_argument(
        "--size", type=int, default=480, metavar="PIXELS", help="short side of a frame, default 480"
    )
    video.add_argument(
        "--context", type=int, default=7, metavar="N", help="recent frames looked at, default 7"
    )
    video.add_argument(
        "--radius",
        type=int,
        default=12,
        metavar="N",
        help="of the neighbourhood, patches, default 12",
    )
    video.add_argument(
        "--top", type=int, default=5, metavar="N", help="patches that vote, default 5"
    )
    video.add_argument(
        "--temp", type=float, default=0.1, metavar="T", help="of the votes, default 0.1"
    )
    video.add_argument("--untrained", action="store_true", help=UNTRAINED_HELP)
    video.set_defaults(run=_evaluate_video)


def add_retrieve(tasks: SubCommands) -> None:
    """`evaluate retrieve`."""
    retrieve = tasks.add_parser(
        "retrieve",
        help="find images of the same class or landmark (mAP)",
        description="Image retrieval by the cosine similarity of CLS features. With --data every"
        " image is a query, and the other images of its class are to be found. With --images and"
        " --ground-truth the protocol of revisited Oxford and Paris: easy, medium and hard, junk"
        " left out. The ground truth is JSON: {imlist: [names], qimlist: [names], gnd: [{easy:"
        " [numbers], hard: [...], junk: [...]}, one a query]}; the benchmark's pickles are not"
        " opened, the message tells how to convert one that you trust.",
        epilog="example: dinoscale evaluate retrieve weights.safetensors --images roxford5k"
        " --ground-truth gnd_roxford5k.json",
    )
    add_weights(retrieve)
    retrieve.add_argument("--data", metavar="DATA", help=DATA_HELP)
    retrieve.add_argument(
        "--queries", type=int, metavar="N", help="of --data: images that are queries, default all"
    )
    retrieve.add_argument("--images", metavar="DIR", help="folder of NAME.jpg or jpg/NAME.jpg")
    retrieve.add_argument("--ground-truth", metavar="FILE", help="JSON, see above")
    retrieve.add_argument(
        "--imsize", type=int, metavar="PIXELS", help="of --images: longer side at most, default 224"
    )
    retrieve.add_argument(
        "--multi-scale", action="store_true", help="mean of scales 1, 1/sqrt(2) and 1/2"
    )
    retrieve.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help=f"of --data: {BATCH_HELP}"
    )
    retrieve.add_argument(
        "--num-workers", type=int, default=2, metavar="N", help=f"of --data: {WORKERS_HELP}"
    )
    retrieve.add_argument("--untrained", action="store_true", help=UNTRAINED_HELP)
    retrieve.set_defaults(run=_evaluate_retrieve)


def add_copies(tasks: SubCommands) -> None:
    """`evaluate copies`."""
    copies = tasks.add_parser(
        "copies",
        help="find the originals of edited pictures (copy detection, mAP)",
        description="Copy detection by the protocol of the DINO paper: squares of 320 pixels, CLS"
        " token and pooled patches, whitening learned from other images, the first 20 ranks. With"
        " --originals and --queries (Copydays): every folder of queries is a block of its own"
        " (strong, jpegqual/3, ...). A query belongs to the original with the longest name that its"
        " own begins with before a separator (sea.jpg, sea_crop.jpg), or by --prefix or --pairs."
        " With --data and --make-copies: copies of some images of any set are made (crop, jpeg,"
        " blur, color, rotation, and all of them: strong) and looked for among all images of it.",
        epilog="example: dinoscale evaluate copies weights.safetensors"
        " --originals copydays/original --queries copydays/queries --prefix 4"
        " --distractors yfcc10k --whitening yfcc20k",
    )
    add_weights(copies)
    copies.add_argument("--originals", metavar="DIR", help="folder of the originals")
    copies.add_argument("--queries", metavar="DIR", help="folder of copies, a subfolder a block")
    copies.add_argument(
        "--distractors", metavar="DATA", help="more images of the database, default none"
    )
    copies.add_argument(
        "--pairs", metavar="FILE", help="CSV with the columns query and original (relative paths)"
    )
    copies.add_argument(
        "--prefix",
        type=int,
        metavar="N",
        help="so many first characters of names agree (Copydays: 4)",
    )
    copies.add_argument("--data", metavar="DATA", help="images to make copies of")
    copies.add_argument("--make-copies", action="store_true", help="of images of --data")
    copies.add_argument(
        "--num-queries", type=int, metavar="N", help="of --make-copies: images copied, default 157"
    )
    copies.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of --make-copies: of the choice and the edits, default 0",
    )
    copies.add_argument(
        "--whitening", metavar="DATA", help="other images to learn a whitening from, default none"
    )
    copies.add_argument(
        "--size", type=int, default=320, metavar="PIXELS", help="side of the squares, default 320"
    )
    copies.add_argument("--batch-size", type=int, default=64, metavar="N", help=BATCH_HELP)
    copies.add_argument("--num-workers", type=int, default=2, metavar="N", help=WORKERS_HELP)
    copies.add_argument("--untrained", action="store_true", help=UNTRAINED_HELP)
    copies.set_defaults(run=_evaluate_copies)


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
        network=options.network,
        num_heads=options.num_heads,
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
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            network=options.network,
            num_heads=options.num_heads,
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
        network=options.network,
        num_heads=options.num_heads,
    )


def _evaluate_copies(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.evaluate.retrieval.copies import (
        MADE_QUERIES,
        Settings,
        evaluate_copies,
        evaluate_made_copies,
    )

    settings = Settings(
        size=options.size,
        whitening=options.whitening,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        network=options.network,
        num_heads=options.num_heads,
        untrained=options.untrained,
    )
    if options.make_copies and options.data is not None:
        unused = ("originals", "queries", "distractors", "pairs", "prefix")
        _refuse_beside(options, "--make-copies", unused)
        return evaluate_made_copies(
            options.weights,
            options.data,
            queries=MADE_QUERIES if options.num_queries is None else options.num_queries,
            seed=options.seed or 0,
            settings=settings,
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
    )


def _refuse_beside(options: argparse.Namespace, mode: str, names: Sequence[str]) -> None:
    """Refuse options that mean nothing beside another one; they would be ignored silently."""
    for name in names:
        if getattr(options, name) not in (None, False):
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} has no meaning beside {mode}. Leave one of them out.")
