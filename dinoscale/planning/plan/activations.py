"""Bytes of activations that a forward saves for its backward, and that a block's backward adds.

Letters: s bytes per element, T tokens of a micro-batch, D width.
"""

from dinoscale.engine.model_sizes import Dims
from dinoscale.planning.plan.partition import FP32, Setup


def saved_by_block(dims: Dims, setup: Setup, *, index: int) -> float:
    """Bytes per token that block `index` saves for its backward, including its input."""
    s, width = setup.weight_bytes, dims.embed_dim
    statistics = FP32 * dims.num_heads  # logsumexp of attention
    if not is_recomputed(setup, index=index):
        return s * _saved_elements(dims) + statistics + 4 * FP32  # mean, 1/std of two norms
    if setup.recompute == "block":
        return s * width  # its input
    if setup.recompute == "all_but_attention":
        return s * 2 * width + statistics  # its input, and the output of attention
    products = 4 * width + dims.mlp_kept // 2  # qkv, projection, first layer of the MLP
    return s * (2 * width + products) + statistics


def is_recomputed(setup: Setup, *, index: int) -> bool:
    """Whether the backward recomputes block `index`."""
    return setup.checkpoint_every > 0 and index % setup.checkpoint_every == 0


def _saved_elements(dims: Dims) -> int:
    """Elements per token that a block saves if nothing is recomputed: 17 D for a plain block."""
    width = dims.embed_dim
    residuals = 2 * width  # its input, and the sum after attention
    attention = 6 * width  # norm, qkv (3), attention by resolution, and packed
    if dims.rope_tables:
        attention += 2 * width  # rotated queries and keys; the others stay with the values
    scales = 2 * width if dims.layer_scale else 0  # inputs of the two layer scales
    return residuals + attention + scales + width + dims.mlp_kept  # norm; MLP


def activations(dims: Dims, setup: Setup, *, blocks: int) -> float:
    """Bytes saved by the embedding, the first blocks and, if these are all blocks, the head."""
    images, s = setup.micro_batch_size, setup.weight_bytes
    tokens, crops = images * dims.tokens, images * dims.num_crops
    saved = tokens * sum(saved_by_block(dims, setup, index=index) for index in range(blocks))
    saved += s * images * dims.pixels  # patches
    saved += FP32 * dims.rope_tables
    if blocks == dims.depth:
        saved += crops * _saved_by_head(
            dims, setup, dims.head_hidden, dims.head_layers, dims.bottleneck
        )
        saved += (images * dims.patches.masked) * _saved_by_head(
            dims, setup, dims.patches.hidden, dims.patches.layers, dims.patches.bottleneck
        )
        saved += s * tokens * dims.embed_dim  # output of the last block
    return saved


def _saved_by_head(dims: Dims, setup: Setup, hidden: int, layers: int, bottleneck: int) -> float:
    """Bytes per row that the final norm and a head save."""
    elements = 2 * dims.embed_dim + 2 * hidden * (layers - 1)
    return setup.weight_bytes * elements + 3 * FP32 * bottleneck


def added_by_backward(dims: Dims, setup: Setup, *, index: int) -> float:
    """Bytes that the backward of block `index` adds: gradients of activations, recomputed ones."""
    s, width, tokens = setup.weight_bytes, dims.embed_dim, setup.micro_batch_size * dims.tokens
    # Gradients of the block's output and of a branch, and in the MLP of half as many elements as it
    # keeps: there are more, but what it kept for them is free by then.
    gradients = s * tokens * (2 * width + dims.mlp_kept // 2)
    if not is_recomputed(setup, index=index):
        return gradients
    recomputed = s * _saved_elements(dims) - saved_by_block(dims, setup, index=index)
    return gradients + tokens * recomputed
