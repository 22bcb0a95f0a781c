"""Floating-point operations of a training step, by formula; only matrix products count.

A product of (m, k) with (k, n) takes 2 m k n, and its backward twice that: one product for the
gradient of each factor, of which weights that do not train need none. Norms, activations, softmax,
loss, optimizer and EMA are linear in their tensors and not counted. Neither is recomputation to
save memory (checkpointing, fused attention, a chunked loss): as in MFU, utilisation compares runs
by the FLOPs that the model needs.

Shape letters: P patches and L tokens of an image, p patch size, C channels, D width, K prototypes.
"""

import functools
import itertools
from dataclasses import dataclass

NUM_GLOBAL = 2  # crops that the teacher sees too


def vit_forward_flops(
    *,
    num_patches: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    in_chans: int = 3,
    num_special: int = 1,
    block_weights: int | None = None,
) -> int:
    """Forward of a ViT over one image.

    Per block 2 L W for the linear layers and 4 L^2 D for attention (logits, and their product with
    the values); once 2 P C p^2 D for the patch projection.

    Args:
        num_patches: P, for a crop of side h: (h // p)^2.
        patch_size: p in pixels.
        embed_dim: D.
        depth: blocks.
        in_chans: C.
        num_special: class token and registers, L = P + num_special.
        block_weights: W, scalars in the matrices of a block; None for 12 D^2, the plain block (3
            for qkv, 1 for the projection, 8 for an MLP of ratio 4).
    """
    tokens = num_patches + num_special
    weights = 12 * embed_dim**2 if block_weights is None else block_weights
    blocks = depth * (2 * tokens * weights + 4 * tokens**2 * embed_dim)
    return blocks + _patch_projection_flops(num_patches, patch_size, embed_dim, in_chans)


def vit_backward_flops(
    *,
    num_patches: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    in_chans: int = 3,
    num_special: int = 1,
    block_weights: int | None = None,
    skipped: int = 0,
    trains_projection: bool = True,
) -> int:
    """Backward of a ViT over one image; pixels need no gradient. Other arguments as in the forward.

    Args:
        num_patches: P.
        patch_size: p.
        embed_dim: D.
        depth: blocks that gradients reach, the last ones.
        in_chans: C.
        num_special: class token and registers.
        block_weights: W.
        skipped: scalars of these blocks' matrices, once for each of the two products (gradient of
            the matrix, gradient of its input) that nothing needs.
        trains_projection: whether the patch projection trains.
    """
    forward = vit_forward_flops(
        num_patches=num_patches,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        in_chans=in_chans,
        num_special=num_special,
        block_weights=block_weights,
    )
    projection = _patch_projection_flops(num_patches, patch_size, embed_dim, in_chans)
    left_out = 2 * (num_patches + num_special) * skipped
    return 2 * forward - left_out - (1 if trains_projection else 2) * projection


def _patch_projection_flops(num_patches: int, patch_size: int, embed_dim: int, chans: int) -> int:
    return 2 * num_patches * chans * patch_size**2 * embed_dim


def head_forward_flops(
    *, in_dim: int, hidden_dim: int, bottleneck_dim: int, num_layers: int, num_prototypes: int
) -> int:
    """Forward of a DINO head over one token; its backward takes twice as many.

    Args:
        in_dim: D.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width before the prototypes.
        num_layers: linear layers of the MLP.
        num_prototypes: K.
    """
    widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim, num_prototypes]
    return sum(2 * wide * out for wide, out in itertools.pairwise(widths))


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a step on one image, all its crops together.

    Attributes:
        teacher_backbone: forward of the backbone over the global crops.
        teacher_head: forward of the heads over the global crops and the masked patches.
        student_global: forward of the backbone over the global crops.
        student_local: forward of the backbone over the local crops.
        student_head: forward of the heads over all crops and the masked patches, and of the maps to
            the width of features that are followed.
        student_backward: backward of backbone and heads over all crops.
        gram: forward of the Gram network; products of similarities are left out, 1 % of it or less.
        anchor: forward of the anchor.
        followed: forward of a frozen teacher whose features are followed.
        average: forward of the average beside a frozen teacher, which keeps its batch norm; without
            the products with prototypes.
    """

    teacher_backbone: int
    teacher_head: int
    student_global: int
    student_local: int
    student_head: int
    student_backward: int
    gram: int = 0
    anchor: int = 0
    followed: int = 0
    average: int = 0

    @property
    def teacher(self) -> int:
        """Forward of the teacher."""
        return self.teacher_backbone + self.teacher_head

    @property
    def student_forward(self) -> int:
        """Forward of the student."""
        return self.student_global + self.student_local + self.student_head

    @property
    def total(self) -> int:
        """The whole step."""
        beside = self.gram + self.anchor + self.followed + self.average
        return self.teacher + beside + self.student_forward + self.student_backward


def step_flops(
    *,
    global_size: int,
    local_size: int,
    num_local: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    hidden_dim: int,
    bottleneck_dim: int,
    num_layers: int,
    num_prototypes: int,
    in_chans: int = 3,
    num_special: int = 1,
    block_weights: int | None = None,
    patch_head: int = 0,
    gram_size: int = 0,
    anchor: bool = False,
    backward_depth: int | None = None,
    skipped: int = 0,
    trains_projection: bool = True,
) -> StepFlops:
    """FLOPs of a step of DINO per image: the teacher sees two crops, the student 2 + num_local.

    Args:
        global_size: side of a global crop in pixels.
        local_size: side of a local crop in pixels.
        num_local: local crops.
        patch_size: as in `vit_forward_flops`, like the other sizes of the backbone.
        embed_dim: D.
        depth: blocks.
        hidden_dim: as in `head_forward_flops`, like the other sizes of the head.
        bottleneck_dim: width before the prototypes.
        num_layers: linear layers of the head's MLP.
        num_prototypes: K.
        in_chans: C.
        num_special: class token and registers.
        block_weights: scalars in the matrices of a block, None for a plain one.
        patch_head: forward of the head of the patch tokens over the masked patches of an image.
        gram_size: side of the Gram network's two crops in pixels; 0 without one.
        anchor: whether there is an anchor, which sees the global crops.
        backward_depth: the last blocks, which gradients reach; None for all.
        skipped: as in `vit_backward_flops`.
        trains_projection: likewise.
    """
    head = head_forward_flops(
        in_dim=embed_dim,
        hidden_dim=hidden_dim,
        bottleneck_dim=bottleneck_dim,
        num_layers=num_layers,
        num_prototypes=num_prototypes,
    )
    crops = ((NUM_GLOBAL, global_size), (num_local, local_size))
    seen_by_gram = (NUM_GLOBAL if gram_size else 0, gram_size)
    of_forward = functools.partial(vit_forward_flops, depth=depth)
    of_backward = functools.partial(
        vit_backward_flops,
        depth=depth if backward_depth is None else backward_depth,
        skipped=skipped,
        trains_projection=trains_projection,
    )
    forward, backward = (
        tuple(
            count
            * of_crop(
                num_patches=(size // patch_size) ** 2,
                patch_size=patch_size,
                embed_dim=embed_dim,
                in_chans=in_chans,
                num_special=num_special,
                block_weights=block_weights,
            )
            for count, size in sizes
        )
        for of_crop, sizes in (
            (of_forward, (*crops, seen_by_gram)),
            (of_backward, crops),
        )
    )
    student_head = (NUM_GLOBAL + num_local) * head + patch_head
    return StepFlops(
        teacher_backbone=forward[0],
        teacher_head=NUM_GLOBAL * head + patch_head,
        student_global=forward[0],
        student_local=forward[1],
        student_head=student_head,
        student_backward=sum(backward) + 2 * student_head,
        gram=forward[2],
        anchor=forward[0] if anchor else 0,
    )
