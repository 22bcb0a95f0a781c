"""FLOPs of branches that stochastic depth leaves out, of those that a step is counted with."""

from collections.abc import Iterator

from dinoscale.engine.flops import NUM_GLOBAL
from dinoscale.engine.model_sizes import Dims
from dinoscale.models.stochastic_depth import kept_images


def dropped_flops(dims: Dims, *, micro_batch_size: int) -> float:
    """FLOPs per image that `flops_of` counts and stochastic depth leaves out, forward and backward.

    On average over the steps of a mixture of sizes; 0 where branches are computed and multiplied.
    """
    return sum(
        share
        * (
            dropped_forward_flops(part, micro_batch_size=micro_batch_size)
            + _dropped_backward_flops(part, micro_batch_size=micro_batch_size)
        )
        for share, part in dims.of_sizes
    )


def dropped_forward_flops(dims: Dims, *, micro_batch_size: int, attention: bool = True) -> float:
    """FLOPs per image of the student's branches that are not computed in a forward of one size.

    Args:
        dims: with one size.
        micro_batch_size: images whose crops share the dropped branches out.
        attention: count the products of queries, keys and values too, not the linear layers alone.
    """
    of_all = sum(
        _block_flops(dims, tokens, attention=attention) * sum(dropped)
        for tokens, dropped in _dropped(dims, micro_batch_size)
    )
    return of_all / micro_batch_size


def _dropped_backward_flops(dims: Dims, *, micro_batch_size: int) -> float:
    """The same of the backward, of whose products in a block `skipped` are not counted either."""
    first = dims.first_backward
    skipped = dims.skipped or (0,) * (dims.depth - first)
    of_all = sum(
        2 * (_block_flops(dims, tokens) - tokens * scalars) * crops
        for tokens, dropped in _dropped(dims, micro_batch_size)
        for scalars, crops in zip(skipped, dropped[first:], strict=True)
    )
    return of_all / micro_batch_size


def _block_flops(dims: Dims, tokens: int, *, attention: bool = True) -> int:
    """FLOPs of a block's forward over one crop."""
    products = 4 * tokens**2 * dims.embed_dim if attention else 0
    return 2 * tokens * dims.block_matrices + products


def _dropped(dims: Dims, micro_batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Tokens of a crop, and of how many of a micro-batch's each block leaves a branch out."""
    if not dims.subset_rate:
        return
    for crops, size in ((NUM_GLOBAL, dims.global_size), (dims.num_local, dims.local_size)):
        if not crops:
            continue
        images = crops * micro_batch_size
        kept = kept_images(
            images,
            depth=dims.depth,
            drop_path_rate=dims.subset_rate,
            uniform=dims.subset_uniform,
        )
        yield dims.num_special + (size // dims.patch_size) ** 2, [images - each for each in kept]
