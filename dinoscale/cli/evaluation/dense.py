"""`dinoscale evaluate {attention,segment,pca} WEIGHTS ...`: parse, call one function."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dinoscale.cli.arguments import (
    IMAGES_HELP,
    add_number,
    add_size,
    add_weights,
    load_options,
    whole_images_options,
)
from dinoscale.errors import ConfigError

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands

_LIMIT_HELP = "the first N images (or frames of each video) only, default all"


def add_dense(tasks: SubCommands) -> None:
    """Add the tasks on patch tokens and attention."""
    _add_attention(tasks)
    _add_segment(tasks)
    _add_pca(tasks)


def _add_attention(tasks: SubCommands) -> None:
    attention = tasks.add_parser(
        "attention",
        help="draw where the class token of a ViT looks, per head",
        description="Attention of the class token in the last block, of every head and their mean."
        " With --out: one sheet, and for every image a folder with overlays (attn-*.png: the map in"
        " colors, mass-*.png: the patches that hold --mass of it) and the numbers (attention.npz)."
        " With OUT.png: only a sheet of some images, squeezed to squares; for synthetic sets, whose"
        " masks are known, also how well attention covers the objects. With --also the sheet has a"
        " column for each of the weights, on one scale; with --video IMAGES are videos, and the"
        " result is an animation of each, NAME-attention.webp, with the mean over the heads.",
        epilog="example: dinoscale evaluate attention weights.safetensors photos/ --out attention/",
    )
    add_weights(attention)
    attention.add_argument("images", metavar="IMAGES", help=IMAGES_HELP)
    where = attention.add_mutually_exclusive_group(required=True)
    where.add_argument("sheet", nargs="?", metavar="OUT.png", help="write a sheet only")
    where.add_argument("--out", metavar="DIR", help="write files for every image")
    add_size(attention, also="; with OUT.png WEIGHTS' crop, at least 24 patches")
    _add_mass(attention)
    add_number(attention, "--limit", _LIMIT_HELP)
    _add_side_by_side(attention)
    attention.set_defaults(run=_evaluate_attention)


def _add_segment(tasks: SubCommands) -> None:
    segment = tasks.add_parser(
        "segment",
        help="how well attention covers objects: Jaccard index against masks",
        description="Compare the patches that hold --mass of a head's attention with masks of"
        " objects: intersection over union of each object with the head that covers it best, mean"
        " over the objects of an image, then over images. Baselines that trained weights should"
        " beat: the same architecture untrained, and a centered box. Masks are KEY.mask.png beside"
        " KEY.jpg in shards, or files of --masks named as the images. A mask with a palette (PASCAL"
        " VOC, DAVIS) or of 16 bits holds object numbers, 255 is ignored; a gray one of 8 bits is"
        " one object, brighter than 127. Masks in color are refused.",
        epilog="example: dinoscale evaluate segment weights.safetensors VOC2012/JPEGImages"
        " --masks VOC2012/SegmentationObject",
    )
    add_weights(segment)
    segment.add_argument("images", metavar="DATA", help=IMAGES_HELP)
    segment.add_argument(
        "--masks", metavar="DIR", help="masks named as the images; default: KEY.mask.png in DATA"
    )
    segment.add_argument(
        "--indexed", action="store_true", help="gray masks of 8 bits hold object numbers too"
    )
    add_size(segment)
    _add_mass(segment)
    segment.add_argument(
        "--out", metavar="DIR", help="write a sheet of the best, median and worst images there"
    )
    segment.set_defaults(run=_evaluate_segment)


def _add_pca(tasks: SubCommands) -> None:
    pca = tasks.add_parser(
        "pca",
        help="draw patch features as colors",
        description="The first three principal components of the last block's patch features, over"
        " all images together, as red, green and blue: patches of one color have similar features."
        " Writes pca.png and pca.npz into a folder for every image, one sheet and the basis. The"
        " components of --also are turned to agree with those of WEIGHTS (orthogonal Procrustes),"
        " so that a color means the same in every column. With --video IMAGES are videos, and the"
        " result is an animation of each, NAME-pca.webp, with one basis over all frames.",
        epilog="example: dinoscale evaluate pca weights.safetensors photos/ --out pca/",
    )
    add_weights(pca)
    pca.add_argument("images", metavar="IMAGES", help=IMAGES_HELP)
    pca.add_argument("--out", required=True, metavar="DIR", help="folder to write into")
    add_size(pca)
    pca.add_argument(
        "--foreground",
        action="store_true",
        help="color only the foreground, found by the first component",
    )
    pca.add_argument("--smooth", action="store_true", help="enlarge patches bilinearly")
    add_number(pca, "--limit", _LIMIT_HELP)
    _add_side_by_side(pca)
    pca.set_defaults(run=_evaluate_pca)


def _add_mass(task: argparse.ArgumentParser) -> None:
    says = "share of a head's attention that its mask keeps, default 0.6"
    add_number(task, "--mass", says, kind=float, metavar="SHARE")


def _add_side_by_side(task: argparse.ArgumentParser) -> None:
    task.add_argument(
        "--also", nargs="+", default=[], metavar="OTHER", help="other weights, side by side"
    )
    task.add_argument(
        "--video",
        action="store_true",
        help="IMAGES are videos: a folder or tars of numbered frames, or a GIF, APNG or WebP file",
    )
    says = "of --video: frames per second, default that of the file, else 10"
    add_number(task, "--fps", says, kind=float)


def _evaluate_attention(options: argparse.Namespace) -> dict[str, Any]:
    _check_fps(options)
    _check_kind_of_result(options)
    if options.sheet:
        from dinoscale.evaluate.dense.attention import evaluate_attention

        return evaluate_attention(
            options.weights,
            options.images,
            options.sheet,
            size=options.size,
            options=load_options(options),
        )
    if options.video:
        from dinoscale.evaluate.dense.animate import animate_attention

        return animate_attention(
            options.weights,
            options.images,
            options.out,
            also=options.also,
            fps=options.fps,
            limit=options.limit,
            **whole_images_options(options),
        )
    from dinoscale.evaluate.dense.attention_files import write_attention

    return write_attention(
        options.weights,
        options.images,
        options.out,
        also=options.also,
        limit=options.limit,
        **_mass(options),
        **whole_images_options(options),
    )


def _check_fps(options: argparse.Namespace) -> None:
    if options.fps is not None and not options.video:
        raise ConfigError("--fps has a meaning with --video only. Add that, or leave it out.")


def _check_kind_of_result(options: argparse.Namespace) -> None:
    """Refuse options that a sheet alone or a video makes meaningless, rather than ignore them."""
    of_folder = {
        "--video": options.video,
        "--also": options.also != [],
        "--mass": options.mass is not None,
        "--limit": options.limit is not None,
    }
    given = [option for option, is_given in of_folder.items() if is_given]
    if options.sheet and given:
        raise ConfigError(f"{given[0]} needs a folder: give --out DIR in place of OUT.png.")
    if options.video and "--mass" in given:
        raise ConfigError("--mass has no meaning with --video, which draws no masks. Omit one.")


def _mass(options: argparse.Namespace) -> dict[str, Any]:
    return {} if options.mass is None else {"mass": options.mass}


def _evaluate_segment(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.evaluate.dense.segment import evaluate_segment

    return evaluate_segment(
        options.weights,
        options.images,
        masks=options.masks,
        indexed=options.indexed,
        out=options.out,
        **_mass(options),
        **whole_images_options(options),
    )


def _evaluate_pca(options: argparse.Namespace) -> dict[str, Any]:
    _check_fps(options)
    arguments = {
        "also": options.also,
        "foreground": options.foreground,
        "smooth": options.smooth,
        "limit": options.limit,
        **whole_images_options(options),
    }
    if options.video:
        from dinoscale.evaluate.dense.animate import animate_pca

        return animate_pca(
            options.weights, options.images, options.out, fps=options.fps, **arguments
        )
    from dinoscale.evaluate.dense.pca import evaluate_pca

    return evaluate_pca(options.weights, options.images, options.out, **arguments)
