"""`dinoscale data cluster`, `balance`, `retrieve`, ...: parse, call one function."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dinoscale.errors import DataError

if TYPE_CHECKING:
    from data_tools.curation.search import Way

    SubCommands = argparse._SubParsersAction[argparse.ArgumentParser]


T = TypeVar("T")


def add_curation(tools: SubCommands) -> None:
    """Add the tools that choose images by their embeddings."""
    _add_cluster(tools)
    _add_balance(tools)
    _add_retrieve(tools)
    _add_deduplicate(tools)


def add_tool(
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
    command = add_tool(
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
    _add_embeddings(command)
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
    _add_features(command)
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
    command = add_tool(
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
    _add_list(command)
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
    _add_image_root(command)
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


def _add_retrieve(tools: SubCommands) -> None:
    command = add_tool(
        tools,
        "retrieve",
        "Choose images like those of a seed set, as for DINOv2: the nearest images of every seed,\n"
        "or, with --clusters, images of the clusters that have several seeds, for small sets.\n"
        "Writes a list for data.train, a JSON that says how it was made, and a page with examples.",
        short="choose images like those of a seed set, as a list to train on",
        example="dinoscale data retrieve features/ near.txt --seeds seed_features/ --neighbours 4\n"
        "  dinoscale data retrieve features/ near.txt --seeds seed_features/ --clusters clusters/",
    )
    _add_embeddings(command)
    _add_list(command)
    command.add_argument(
        "--seeds", type=Path, required=True, metavar="DIR", help="embeddings of the seeds"
    )
    command.add_argument(
        "--neighbours", type=int, metavar="K", help="images of each seed (default 4)"
    )
    command.add_argument(
        "--threshold",
        type=float,
        metavar="COSINE",
        help="least cosine of an image and its seed (default -1: any)",
    )
    command.add_argument(
        "--clusters",
        type=Path,
        metavar="DIR",
        help="draw images of the seeds' clusters, of this folder of `dinoscale data cluster`",
    )
    command.add_argument(
        "--min-seeds", type=int, metavar="N", help="seeds of a cluster that counts (default 4)"
    )
    command.add_argument(
        "--per-cluster", type=int, metavar="N", help="images of a cluster at most (default 10000)"
    )
    command.add_argument("--images", type=int, metavar="N", help="at most so many (default: all)")
    command.add_argument("--seed", type=int, metavar="S", help="of the images drawn (default 0)")
    _add_image_root(command)
    command.add_argument(
        "--seed-image-root", metavar="DIR", help="that of the seeds' images, for the page"
    )
    _add_search(command)
    command.set_defaults(run=_retrieve, several_ranks=True)


def _retrieve(options: argparse.Namespace) -> dict[str, Any]:
    from data_tools.curation import retrieve
    from dinoscale.evaluate.features import find_device

    out = retrieve.Output(options.out, options.image_root, options.seed_image_root)
    of_seeds = {"neighbours": options.neighbours, "threshold": options.threshold}
    of_clusters = {
        "min-seeds": options.min_seeds,
        "per-cluster": options.per_cluster,
        "seed": options.seed,
    }
    if options.clusters is None:
        _refuse(of_clusters, "without --clusters")
        return retrieve.retrieve_neighbours(
            options.embeddings,
            options.seeds,
            out,
            retrieve.BySeed(
                k=_or(options.neighbours, 4),
                at_least=_or(options.threshold, -1.0),
                images=options.images,
            ),
            way=_way(options),
            features=options.features,
        )
    approximate = {"approximate": options.approximate or None, "features": options.features or None}
    _refuse({**of_seeds, **approximate}, "with --clusters")
    return retrieve.retrieve_clusters(
        options.embeddings,
        options.seeds,
        options.clusters,
        out,
        retrieve.ByCluster(
            min_seeds=_or(options.min_seeds, 4),
            per_cluster=_or(options.per_cluster, 10000),
            images=options.images,
            seed=_or(options.seed, 0),
        ),
        device=find_device(None),
    )


def _refuse(given: dict[str, object], where: str) -> None:
    """Refuse options that would do nothing."""
    for name, value in given.items():
        if value is not None:
            raise DataError(f"--{name} means nothing {where}: leave it out")


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _add_deduplicate(tools: SubCommands) -> None:
    command = add_tool(
        tools,
        "deduplicate-embeddings",
        "Leave out copies by their embeddings, as for DINOv2: images are joined with those of\n"
        "their nearest neighbours that are similar enough, and of all images so joined the\n"
        "largest one is kept; none, if one of them is similar to an image of a test set. Writes\n"
        "a list for data.train, the groups, a JSON that says how it was made, and a page with the\n"
        "pairs that only just count as copies. Nothing is deleted.",
        short="find copies by embeddings, also of test images, and list what to keep",
        example="dinoscale data deduplicate-embeddings features/ unique.txt --threshold 0.97\n"
        "  dinoscale data deduplicate-embeddings features/ unique.txt --against test_features/",
    )
    _add_embeddings(command)
    _add_list(command)
    command.add_argument(
        "--threshold",
        type=float,
        default=0.95,
        metavar="COSINE",
        help="least cosine of two copies (default 0.95; see the page)",
    )
    command.add_argument(
        "--neighbours",
        type=int,
        default=64,
        metavar="K",
        help="compare each image with its K nearest ones (default 64)",
    )
    command.add_argument(
        "--against",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="embeddings of test sets; images similar to theirs are left out",
    )
    command.add_argument(
        "--against-threshold",
        type=float,
        metavar="COSINE",
        help="least cosine to a test image (default: that of --threshold)",
    )
    _add_image_root(command)
    _add_search(command)
    command.set_defaults(run=_deduplicate, several_ranks=True)


def _deduplicate(options: argparse.Namespace) -> dict[str, Any]:
    from data_tools.curation.duplicates import deduplicate_embeddings
    from data_tools.curation.groups import Similar

    return deduplicate_embeddings(
        options.embeddings,
        options.out,
        against=options.against,
        similar=Similar(
            threshold=options.threshold,
            against=_or(options.against_threshold, options.threshold),
            k=options.neighbours,
        ),
        way=_way(options),
        features=options.features,
        images=options.image_root,
    )


def _add_embeddings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "embeddings", type=Path, metavar="EMBEDDINGS", help="folder that `dinoscale embed` wrote"
    )


def _add_list(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", type=Path, metavar="OUT_LIST", help="list to write, NAME.txt")


def _add_image_root(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--image-root", metavar="DIR", help="folder of the images, if it has moved"
    )


def _add_features(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--features",
        nargs="+",
        default=[],
        metavar="NAME",
        help="cls, mean_patch or both side by side; of a ResNet-50 pooled (default: the first"
        " that is there of cls, pooled)",
    )


def _add_search(command: argparse.ArgumentParser) -> None:
    """How neighbours are searched."""
    _add_features(command)
    command.add_argument(
        "--block",
        type=int,
        default=8192,
        metavar="ROWS",
        help="images searched at once, which are kept as finished work; 8 D bytes each. More save"
        " reading on a GPU; does not change the result (default 8192)",
    )
    command.add_argument(
        "--approximate",
        action="store_true",
        help="search with inverted lists of faiss (pip install 'dinoscale[curation]') instead of"
        " comparing all pairs; holds 4 D bytes of every image, and misses some neighbours, not the"
        " same ones with other ranks or threads. Test sets (--against) are compared whole",
    )


def _way(options: argparse.Namespace) -> Way:
    from data_tools.curation.search import Way
    from dinoscale.evaluate.features import find_device

    return Way(options.block, find_device(None), options.approximate)
