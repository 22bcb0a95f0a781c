"""`dinoscale data cluster` and `balance`: parse, call one function."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    SubCommands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_curation(tools: SubCommands) -> None:
    """Add the tools that choose images by their embeddings."""
    _add_cluster(tools)
    _add_balance(tools)


def _tool(
    tools: SubCommands, name: str, description: str, *, short: str, example: str
) -> argparse.ArgumentParser:
    """A tool with an example below its options."""
    return tools.add_parser(
        name,
        help=short,
        description=description,
        epilog="example:\n  " + example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_seed(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")


def _add_cluster(tools: SubCommands) -> None:
    command = _tool(
        tools,
        "cluster",
        "Cluster the images of a folder of embeddings by hierarchical k-means with resampling\n"
        "(Vo et al. 2024): level 1 clusters the images, each further level the centroids below.\n"
        "Uses the GPU if there is one; several ranks share the images. Reads the embeddings from\n"
        "disk again and again; memory grows with the clusters, and by 48 bytes an image. Writes\n"
        "centroids, the cluster of each image and its distance as NPY, and manifest.json. Keeps\n"
        "every iteration: after an interruption the same command goes on.",
        short="cluster embeddings, level upon level",
        example="dinoscale data cluster features/ clusters/ --levels 800 100 25\n"
        "  torchrun --nproc-per-node 8 -m dinoscale data cluster features/ clusters/ --levels"
        " 800 100 25",
    )
    command.add_argument(
        "embeddings", type=Path, metavar="EMBEDDINGS", help="folder that `dinoscale embed` wrote"
    )
    command.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    command.add_argument(
        "--levels",
        type=int,
        nargs="+",
        required=True,
        metavar="K",
        help="clusters of each level, from the most to the fewest",
    )
    command.add_argument(
        "--iterations",
        type=int,
        default=50,
        metavar="N",
        help="most iterations of each k-means (default 50)",
    )
    command.add_argument(
        "--resampling",
        type=int,
        nargs="+",
        default=[10],
        metavar="N",
        help="times that the images closest to the centroids are clustered anew: one number, or"
        " one for each level; 0 is plain k-means (default 10)",
    )
    command.add_argument(
        "--start",
        choices=("kmeans++", "random"),
        default="kmeans++",
        help="first centroids; kmeans++ takes time that grows with the square of the clusters"
        " (default kmeans++)",
    )
    command.add_argument(
        "--features",
        nargs="+",
        default=[],
        metavar="NAME",
        help="cls, mean_patch or both side by side; of a ResNet-50 pooled (default: the first"
        " that is there of cls, pooled)",
    )
    command.add_argument(
        "--no-normalize", action="store_true", help="do not divide embeddings by their length"
    )
    _add_seed(command)
    command.set_defaults(run=_cluster, several_ranks=True)


def _cluster(options: argparse.Namespace) -> dict[str, Any]:
    from data_tools.curation.hierarchy import ClusterOptions, cluster

    return cluster(
        options.embeddings,
        options.out,
        ClusterOptions(
            levels=tuple(options.levels),
            iterations=options.iterations,
            resampling=tuple(options.resampling),
            start=options.start,
            features=tuple(options.features),
            normalize=not options.no_normalize,
            seed=options.seed,
        ),
    )


def _add_balance(tools: SubCommands) -> None:
    command = _tool(
        tools,
        "balance",
        "Choose images evenly over clusters: the number is split equally over the top clusters,\n"
        "each share equally over the clusters below it, and so on; a cluster smaller than its\n"
        "share gives all its images, and the others share the rest. Writes a list for data.train\n"
        "(of pictures in shards, shard.tar::member, one for `dinoscale data build-shards`), and a\n"
        "JSON with settings, checksums, and the entropy over clusters and classes before and\n"
        "after.",
        short="choose images evenly over clusters, as a list to train on",
        example="dinoscale data balance clusters/ balanced.txt --images 100000\n"
        "  dinoscale train vit_s16 data.train=balanced.txt",
    )
    command.add_argument(
        "clusters", type=Path, metavar="CLUSTERS", help="folder that `dinoscale data cluster` wrote"
    )
    command.add_argument("out", type=Path, metavar="OUT_LIST", help="list to write, NAME.txt")
    command.add_argument(
        "--images", type=int, required=True, metavar="N", help="number of images to choose"
    )
    command.add_argument(
        "--pick",
        choices=("random", "closest", "furthest"),
        default="random",
        help="which images of a cluster: at random, or by the distance to its centroid"
        " (default random)",
    )
    command.add_argument(
        "--repeat",
        action="store_true",
        help="give small clusters their equal share, too, by naming their images more than once;"
        " by default each is chosen at most once",
    )
    _add_seed(command)
    command.add_argument(
        "--embeddings", type=Path, metavar="DIR", help="folder of the embeddings, if it has moved"
    )
    command.add_argument(
        "--image-root", metavar="DIR", help="folder of the images, if it has moved"
    )
    command.set_defaults(run=_balance)


def _balance(options: argparse.Namespace) -> dict[str, Any]:
    from data_tools.curation.balance import BalanceOptions, balance

    return balance(
        options.clusters,
        options.out,
        BalanceOptions(options.images, options.pick, options.repeat, options.seed),
        embeddings=options.embeddings,
        images=options.image_root,
    )
