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
        # Its input, qkv, attention, and the sum after attention: 10 D in a plain block.
        elements = 6 * width + dims.mlp_kept
        if setup.compiled:
            elements = _everything(dims, setup)
        return s * elements + statistics + 4 * FP32  # mean, 1/std of two norms
    if setup.recompute == "block":
        return s * width  # its input
    if setup.recompute == "all_but_attention":
        return s * 2 * width + statistics  # its input, and the output of attention
    products = 4 * width + dims.mlp_kept  # qkv, projection, first layer of the MLP
    return s * (2 * width + products) + statistics


def _rotated(dims: Dims) -> int:
    """Elements per token of queries and keys that are rotated beside those that are not.

    Not where nothing is compiled or recomputed: there they take the others' place.
    """
    return 2 * dims.embed_dim if dims.rope_tables else 0


def _everything(dims: Dims, setup: Setup) -> int:
    """Elements per token that autograd keeps of a block: 17 D of a plain one.

    Beside the others the two norms, attention both by resolution and packed, what lies between the
    MLP's matrices, and in a compiled block what layer scale multiplies; else it multiplies the
    weights.
    """
    scaled = 2 * dims.embed_dim if setup.compiled and dims.layer_scale else 0
    return 9 * dims.embed_dim + scaled + _rotated(dims) + 2 * dims.mlp_kept


def is_recomputed(setup: Setup, *, index: int) -> bool:
    """Whether the backward recomputes more of block `index` than of any."""
    if setup.recompute == "pointwise" and not setup.compiled:
        return False  # what an eager block makes again anyway
    return setup.checkpoint_every > 0 and index % setup.checkpoint_every == 0


def saved_by_blocks(dims: Dims, setup: Setup, *, blocks: int) -> float:
    """Bytes saved by the embedding and the first blocks, of which frozen ones may save nothing."""
    images, s = setup.micro_batch_size, setup.weight_bytes
    saving = range(dims.first_backward, blocks)
    of_blocks = sum(saved_by_block(dims, setup, index=index) for index in saving)
    of_patches = s * dims.pixels
    return images * (of_patches + dims.tokens * of_blocks) + FP32 * dims.rope_tables


def activations(dims: Dims, setup: Setup) -> float:
    """Bytes saved by a whole forward."""
    of_classes = _saved_by_head(dims, setup, dims.head_hidden, dims.head_layers, dims.bottleneck)
    of_patches = _saved_by_head(
        dims, setup, dims.patches.hidden, dims.patches.layers, dims.patches.bottleneck
    )
    of_heads = dims.num_crops * of_classes + dims.patches.masked * of_patches
    return saved_by_blocks(dims, setup, blocks=dims.depth) + setup.micro_batch_size * of_heads


def _saved_by_head(dims: Dims, setup: Setup, hidden: int, layers: int, bottleneck: int) -> float:
    """Bytes per row that the final norm and a head save."""
    elements = 2 * dims.embed_dim + 2 * hidden * (layers - 1)
    return setup.weight_bytes * elements + 3 * FP32 * bottleneck


def added_by_backward(dims: Dims, setup: Setup, *, index: int) -> float:
    """Bytes that the backward of block `index` adds: gradients of activations, recomputed ones."""
    s, width, tokens = setup.weight_bytes, dims.embed_dim, setup.micro_batch_size * dims.tokens
    # Gradients of the block's output, and in the MLP of as many elements as its first layer
    # returns: there are more, but what was kept or made again for them is free by then.
    gradients = s * (width + dims.mlp_kept)
    made_again = 0.0
    if is_recomputed(setup, index=index):
        made_again = s * _everything(dims, setup) - saved_by_block(dims, setup, index=index)
    elif not setup.compiled:
        made_again = s * dims.mlp_kept  # the norms, before and after the MLP, are smaller
    return tokens * (gradients + made_again)
