"""Bytes that a forward keeps for its backward, and that the backward of a block adds.

Letters: s bytes of an element, T tokens of a micro-batch, D width.
"""

from dinoscale.engine.model_sizes import Dims
from dinoscale.planning.plan.partition import FP32, Setup


def kept_by_block(dims: Dims, setup: Setup, *, index: int) -> float:
    """Bytes a token that block `index` keeps for its backward, its input included."""
    s, width = setup.weight_bytes, dims.embed_dim
    statistics = FP32 * dims.num_heads  # log sum exp of attention
    if not is_recomputed(setup, index=index):
        return s * _kept_elements(dims) + statistics + 4 * FP32  # mean, 1/std of two norms
    if setup.recompute == "block":
        return s * width  # its input
    if setup.recompute == "all_but_attention":
        return s * 2 * width + statistics  # and what attention returned
    products = 4 * width + dims.mlp_kept // 2  # qkv, projection, first of the MLP
    return s * (2 * width + products) + statistics


def is_recomputed(setup: Setup, *, index: int) -> bool:
    """Whether block `index` is."""
    return setup.checkpoint_every > 0 and index % setup.checkpoint_every == 0


def _kept_elements(dims: Dims) -> int:
    """Elements a token that a block keeps if nothing is recomputed: 17 D for a plain one."""
    width = dims.embed_dim
    residuals = 2 * width  # its input, and the sum after attention
    attention = 6 * width  # norm, qkv (3), attention by resolution, and packed
    scales = 2 * width if dims.layer_scale else 0  # what is scaled
    return residuals + attention + scales + width + dims.mlp_kept  # norm; MLP


def activations(dims: Dims, setup: Setup, *, blocks: int) -> float:
    """What is kept of the first blocks, the embedding, and (with all blocks) the head."""
    images, s = setup.micro_batch_size, setup.weight_bytes
    tokens, crops = images * dims.tokens, images * dims.num_crops
    kept = tokens * sum(kept_by_block(dims, setup, index=index) for index in range(blocks))
    kept += s * images * dims.pixels  # patches
    if blocks == dims.depth:
        hidden = 2 * dims.head_hidden * (dims.head_layers - 1)
        kept += s * crops * (2 * dims.embed_dim + hidden) + 3 * FP32 * crops * dims.bottleneck
        kept += s * tokens * dims.embed_dim  # result of the last block
    return kept


def in_work(dims: Dims, setup: Setup, *, index: int) -> float:
    """Of block `index` while its backward runs: slopes, and what has to be made again."""
    s, width, tokens = setup.weight_bytes, dims.embed_dim, setup.micro_batch_size * dims.tokens
    # By its result, by a branch and by the inner side of the MLP.
    slopes = s * tokens * (2 * width + dims.mlp_hidden)
    if not is_recomputed(setup, index=index):
        return slopes
    again = s * _kept_elements(dims) - kept_by_block(dims, setup, index=index)
    return slopes + tokens * again
