"""`dinoscale data TOOL ...`: parse, call one function."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.curation.command import add_curation, add_tool
from dinoscale.errors import DataError, UnavailableError
from dinoscale.runtime.cores import available_cores

if TYPE_CHECKING:
    from dinoscale.data.decoding.decode import Decoder

    SubCommands = argparse._SubParsersAction[argparse.ArgumentParser]

_SPEC = (
    "a folder of images, tar shards (a folder of them, one, 'train-{000..099}.tar', a glob), a text"
    " file with one path per line, or a tar of tars such as ImageNet's"
)
_OUT = "; an interrupted run continues from OUT.state beside it"


def add_commands(commands: SubCommands) -> None:
    """Add `data` and its tools."""
    data = commands.add_parser(
        "data",
        help="build, verify, inspect, measure, deduplicate and curate image sets",
        description="Prepare and examine image sets. Every tool prints one JSON object last, and"
        " the same command continues after an interruption.",
    )
    tools = data.add_subparsers(dest="tool", required=True, metavar="TOOL")
    _add_index(tools)
    _add_build(tools)
    _add_synthetic(tools)
    _add_verify(tools)
    _add_inspect(tools)
    _add_stats(tools)
    _add_deduplicate(tools)
    add_curation(tools)


def _tool(
    tools: SubCommands, name: str, description: str, *, short: str, example: str
) -> argparse.ArgumentParser:
    """A tool with an example below its options."""
    example = f"dinoscale data {example}"
    command = add_tool(tools, name, description, short=short, example=example)
    command.add_argument(
        "--workers",
        type=int,
        default=available_cores(),
        metavar="N",
        help="number of processes (default: one per core); does not change the result",
    )
    return command


def _add_index(tools: SubCommands) -> None:
    command = _tool(
        tools,
        "index",
        "Make the index of tar shards that training would make at its first start: about a minute\n"
        "per million images and core. It is kept in the folder DINOSCALE_CACHE, which must be set\n"
        "for the training, too. Only shards that changed are read again. A folder of images needs\n"
        "no index: it is listed, to count its images.",
        short="make the index of shards before a job",
        example="index '/data/train-{000000..000499}.tar' --workers 32",
    )
    command.add_argument("spec", metavar="SPEC", help="one source of data.train")
    command.set_defaults(run=_index)


def _index(options: argparse.Namespace) -> dict[str, Any]:
    from data_tools.index import make_index

    return make_index(options.spec, workers=options.workers)


def _add_shard_bytes(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--shard-bytes",
        default="256MiB",
        metavar="SIZE",
        help="largest size of a shard, unless one picture is larger (default 256MiB)",
    )


def _add_channels(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--channels", type=int, default=3, metavar="C", help="as data.channels (default 3)"
    )
    command.add_argument(
        "--max-pixel-value",
        type=float,
        metavar="X",
        help="as data.max_pixel_value: the value of 1.0 in deep pixels",
    )
    command.add_argument("--white", help=argparse.SUPPRESS)


def _decoder(options: argparse.Namespace) -> Decoder:
    from dinoscale.data.decoding.decode import Decoder

    if options.white is not None:
        raise DataError("--white: renamed, write --max-pixel-value")
    channels, largest = options.channels, options.max_pixel_value
    if channels < 1 or (largest is not None and not largest > 0):
        raise DataError(f"need --channels >= 1 and --max-pixel-value > 0: {channels}, {largest}")
    return Decoder(channels, largest)


def _add_build(tools: SubCommands) -> None:
    command = _tool(
        tools,
        "build-shards",
        "Pack images into WebDataset tar shards. Subfolders (or inner tars) are the classes and\n"
        "become KEY.cls and classes.txt. Files are copied byte for byte; what is not an image\n"
        "is left out and listed. Also writes manifest.json with counts and checksums, and\n"
        "names.jsonl with the original names of keys 0, 1, 2, ..., one per line.",
        short="pack a folder, a list or ImageNet's tars into shards",
        example="build-shards ILSVRC2012_img_train.tar shards/ --shard-bytes 512MiB --workers 16",
    )
    command.add_argument("src", metavar="SRC", help=_SPEC)
    command.add_argument("out", type=Path, metavar="OUT_DIR", help="folder of the shards")
    _add_shard_bytes(command)
    command.add_argument(
        "--max-side",
        type=int,
        metavar="PIXELS",
        help="shrink larger pictures to this side (Lanczos, same aspect ratio) and encode them as"
        " 8-bit RGB JPEG of quality 95; decodes all others as a check",
    )
    command.add_argument(
        "--prefix", default="train", help="prefix of the shard names (default train)"
    )
    order = command.add_mutually_exclusive_group()
    order.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the shuffle (default 0)"
    )
    order.add_argument("--no-shuffle", action="store_true", help="keep the order of the source")
    command.set_defaults(run=_build)


def _build(options: argparse.Namespace) -> dict[str, Any]:
    from data_tools.build_shards import build_shards
    from data_tools.shard_writer import parse_bytes

    return build_shards(
        options.src,
        options.out,
        shard_bytes=parse_bytes(options.shard_bytes),
        max_side=options.max_side,
        seed=None if options.no_shuffle else options.seed,
        prefix=options.prefix,
        workers=options.workers,
    )


def _add_synthetic(tools: SubCommands) -> None:
    command = _tool(
        tools,
        "synthetic",
        "Draw the built-in labelled set and write it as shards: KEY.png, KEY.cls, KEY.mask.png.",
        short="write the drawn image set as shards with classes and masks",
        example="synthetic shapes/ --images 10000 --size 96 --seed 1",
    )
    command.add_argument("out", type=Path, metavar="OUT_DIR", help="folder of the shards")
    command.add_argument("--images", type=int, default=2000, metavar="N", help="default 2000")
    command.add_argument("--size", type=int, default=96, metavar="PIXELS", help="default 96")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    command.add_argument("--split", choices=("train", "test"), default="train")
    _add_shard_bytes(command)
    command.set_defaults(run=_synthetic)


def _synthetic(options: argparse.Namespace) -> dict[str, Any]:
    from data_tools.shard_writer import parse_bytes
    from data_tools.synthetic import synthetic

    return synthetic(
        options.out,
        images=options.images,
        size=options.size,
        seed=options.seed,
        split=options.split,
        shard_bytes=parse_bytes(options.shard_bytes),
        workers=options.workers,
    )


def _add_verify(tools: SubCommands) -> None:
    command = _tool(
        tools,
        "verify-shards",
        "Decode every picture, and compare shards with the manifest.json beside them. Exit code 1\n"
        "if anything is bad, 69 if nothing is but some files cannot be read: whether they are bad\n"
        "is unknown, and the same command reads them again.",
        short="decode everything and compare checksums; exit code 1 if anything is bad",
        example="verify-shards '/data/train-{000000..000499}.tar' --out bad.jsonl",
    )
    command.add_argument("spec", metavar="SPEC", help=_SPEC)
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="list of bad files, JSON lines" + _OUT
    )
    _add_channels(command)
    command.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    from data_tools.verify_shards import verify_shards

    summary = verify_shards(
        options.spec, _decoder(options), out=options.out, workers=options.workers
    )
    if summary["bad"] or summary["unavailable"]:
        print(json.dumps(summary), flush=True)
        raise SystemExit(1 if summary["bad"] else UnavailableError.exit_code)
    return summary


def _add_inspect(tools: SubCommands) -> None:
    command = _tool(
        tools,
        "inspect-shards",
        "Count images, sizes, formats, modes and classes from the headers; draw a contact sheet.",
        short="counts, sizes, formats, class balance, and a contact sheet",
        example="inspect-shards shards/ --sheet sheet.png",
    )
    command.add_argument("spec", metavar="SPEC", help=_SPEC)
    command.add_argument("--images", type=int, metavar="N", help="read only N images (default all)")
    command.add_argument("--sheet", type=Path, metavar="FILE.png", help="contact sheet to draw")
    command.add_argument(
        "--sheet-images", type=int, default=64, metavar="N", help="pictures on it (default 64)"
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="summary as a file" + _OUT)
    command.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> dict[str, Any]:
    from data_tools.inspect_shards import inspect_shards

    return inspect_shards(
        options.spec,
        images=options.images,
        sheet=options.sheet,
        sheet_images=options.sheet_images,
        out=options.out,
        workers=options.workers,
    )


def _add_stats(tools: SubCommands) -> None:
    command = _tool(
        tools,
        "dataset-stats",
        "Mean and standard deviation of the pixels of each channel, in 0..1, over whole pictures\n"
        "at full resolution. Prints data.mean=... data.std=... for the command line of a\n"
        "training, then the JSON.",
        short="mean and standard deviation of the pixels, as overrides for a training",
        example="dataset-stats /data/images --images 20000",
    )
    command.add_argument("spec", metavar="SPEC", help=_SPEC)
    command.add_argument(
        "--images",
        type=int,
        default=10000,
        metavar="N",
        help="measure N pictures, the same every time (default 10000)",
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="summary as a file" + _OUT)
    _add_channels(command)
    command.set_defaults(run=_stats)


def _stats(options: argparse.Namespace) -> dict[str, Any]:
    from data_tools.dataset_stats import dataset_stats

    summary = dataset_stats(
        options.spec,
        _decoder(options),
        images=options.images,
        out=options.out,
        workers=options.workers,
    )
    print(" ".join(summary["overrides"]))
    return summary


def _add_deduplicate(tools: SubCommands) -> None:
    command = _tool(
        tools,
        "deduplicate",
        "Group files with the same bytes and pictures that look alike: re-encoded or resized (by\n"
        "a perceptual hash of 64 bits), or with similar features of a backbone (--weights).\n"
        "Nothing is deleted: build shards from the list of pictures to keep.",
        short="find exact and near copies, and list what to keep",
        example="deduplicate /data/images --out groups.jsonl --keep-list keep.txt\n"
        "  dinoscale data build-shards keep.txt shards/",
    )
    command.add_argument("spec", metavar="SPEC", help=_SPEC)
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="groups of copies, JSON lines" + _OUT
    )
    command.add_argument(
        "--keep-list", type=Path, metavar="FILE", help="list of the pictures to keep"
    )
    how = command.add_mutually_exclusive_group()
    how.add_argument(
        "--exact", action="store_true", help="only files with the same bytes; decodes nothing"
    )
    how.add_argument(
        "--radius",
        type=int,
        default=6,
        metavar="BITS",
        help="most bits of 64 in which the hashes of two copies differ (default 6, up to 8; each"
        " bit costs time)",
    )
    how.add_argument(
        "--weights",
        metavar="FILE",
        help="compare features of this backbone; time grows quadratically",
    )
    command.add_argument(
        "--threshold",
        type=float,
        default=0.95,
        metavar="COSINE",
        help="least cosine of features (default 0.95)",
    )
    command.add_argument(
        "--num-heads", type=int, metavar="N", help="of a DINO .pth with heads not 64 wide"
    )
    command.set_defaults(run=_deduplicate)


def _deduplicate(options: argparse.Namespace) -> dict[str, Any]:
    from data_tools.deduplicate import ByFeatures, ByHash, Near, deduplicate

    near: Near = None if options.exact else ByHash(options.radius)
    if options.weights is not None:
        near = ByFeatures(options.weights, options.threshold, options.num_heads)
    return deduplicate(
        options.spec,
        near,
        out=options.out,
        keep_list=options.keep_list,
        workers=options.workers,
    )
