"""Memory of networks beside student and teacher, and of losses on features, in bytes of one rank.

Letters as in `memory_model.py`.
"""

from dinoscale.engine.model_sizes import Dims
from dinoscale.models.convnet import ForwardCounts
from dinoscale.planning.plan.partition import FP32, Setup


def widest(dims: Dims, setup: Setup, *, tokens: int) -> float:
    """A block over so many tokens an image: residual, norm, input and output of the activation."""
    of_token = setup.weight_bytes * (2 * dims.embed_dim + 2 * dims.mlp_kept)
    return setup.micro_batch_size * tokens * of_token


def frozen_forward(dims: Dims, setup: Setup, *, pixels: int, tokens: int) -> float:
    """Activations of a frozen backbone's widest layer, over so many pixels and tokens an image."""
    s, images = setup.weight_bytes, setup.micro_batch_size
    pictures = s * images * pixels if setup.bf16 else 0
    inputs = 2 * s * images * tokens * dims.embed_dim  # of the block and of its MLP
    return pictures + inputs + widest(dims, setup, tokens=tokens)


def followed_forward(dims: Dims, setup: Setup) -> float:
    """Activations of the backbone whose features are followed, over the global crops."""
    teacher, pixels = dims.followed, dims.global_pixels
    if teacher is None or not teacher.parameters:  # or its features are stored
        return 0
    if not isinstance(teacher, ForwardCounts):
        return frozen_forward(teacher, setup, pixels=pixels, tokens=teacher.global_tokens)
    pictures = setup.weight_bytes * pixels if setup.bf16 else 0
    return setup.micro_batch_size * (pictures + teacher.live_bytes)


def features(dims: Dims, setup: Setup) -> float:
    """Those of the frozen networks."""
    of_run = gram_features(dims, setup) + anchor_features(dims, setup)
    return of_run + _followed_features(dims, setup)


def gram_features(dims: Dims, setup: Setup) -> float:
    """Those of the Gram network, on the student's grid, until the student's forward has ended."""
    if not dims.gram_size:
        return 0
    as_computed = dims.gram_size == dims.global_size  # else resized, in float32
    size = setup.weight_bytes if as_computed else FP32
    return size * setup.micro_batch_size * dims.global_patches * dims.embed_dim


def anchor_features(dims: Dims, setup: Setup) -> float:
    """Those of the anchor, until the student's forward has ended."""
    if not dims.anchor:
        return 0
    return setup.weight_bytes * setup.micro_batch_size * dims.global_patches * dims.embed_dim


def _followed_features(dims: Dims, setup: Setup) -> float:
    """Those of the followed backbone, until the student's forward has ended."""
    resized = dims.followed is not None and dims.followed.patch_size != dims.patch_size
    return (FP32 if resized else setup.weight_bytes) * _followed_scalars(dims, setup)


def _followed_scalars(dims: Dims, setup: Setup) -> int:
    """Scalars of the patch features that are followed, on the student's grid."""
    if dims.followed is None or not dims.followed_patches:
        return 0
    return setup.micro_batch_size * dims.global_patches * dims.followed.embed_dim


def kept(dims: Dims, setup: Setup) -> float:
    """What the losses of patch features keep for the backward."""
    return _gram_kept(dims, setup) + _anchor_kept(dims, setup) + _followed_kept(dims, setup)


def _gram_kept(dims: Dims, setup: Setup) -> float:
    """What the Gram loss keeps for the backward: unit vectors of both sides, and the gradient.

    Beside it the student's patches before and after the norm, the latter in float32 too.
    """
    if not dims.gram_size:
        return 0
    return _patches_kept(dims, setup, loss_bytes=3 * FP32)


def _anchor_kept(dims: Dims, setup: Setup) -> float:
    """What the anchor's loss keeps for the backward: the difference of unit vectors.

    Beside it the student's patches before and after the norm, the latter in float32 too.
    """
    if not dims.anchored_patches:
        return 0
    return _patches_kept(dims, setup, loss_bytes=FP32)


def _followed_kept(dims: Dims, setup: Setup) -> float:
    """What following patches keeps for the backward: mapped features, and both sides in float32.

    Beside it the student's patches before and after the norm.
    """
    scalars = _followed_scalars(dims, setup)
    own = _patches_kept(dims, setup, loss_bytes=0) if scalars else 0
    return (setup.weight_bytes + 2 * FP32) * scalars + own


def _patches_kept(dims: Dims, setup: Setup, *, loss_bytes: int) -> float:
    """What a loss on patches keeps of the student's, with its own bytes a scalar."""
    scalars = setup.micro_batch_size * dims.global_patches * dims.embed_dim
    own = 2 * setup.weight_bytes + (FP32 if setup.bf16 else 0)
    return scalars * (loss_bytes + own)
