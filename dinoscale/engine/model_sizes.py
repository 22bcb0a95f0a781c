"""Sizes of a run's network and crops, from which memory, time and communication follow."""

from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from dinoscale.config import RunConfig
from dinoscale.config.sections.convnets import STRIDE
from dinoscale.engine.build import shapes_only
from dinoscale.engine.flops import NUM_GLOBAL, StepFlops, head_forward_flops, step_flops
from dinoscale.engine.frozen.gram import crop_size_of
from dinoscale.engine.param_groups import param_groups
from dinoscale.errors import ConfigError
from dinoscale.models.block import Block
from dinoscale.models.convnet import ConvNet, ForwardCounts, forward_counts
from dinoscale.models.network import DinoNetwork
from dinoscale.models.vit import VisionTransformer


@dataclass(frozen=True)
class PatchDims:
    """Shapes of the patch loss; all 0 without one.

    Attributes:
        masked: masked patches of an image, on average.
        hidden: width of their head's hidden layers.
        layers: linear layers of its MLP.
        bottleneck: width before its prototypes.
        prototypes: their number.
    """

    masked: float = 0.0
    hidden: int = 0
    layers: int = 0
    bottleneck: int = 0
    prototypes: int = 0


@dataclass(frozen=True)
class Dims:
    """Counts; nothing here depends on ranks or batch.

    Attributes:
        groups: scalars and tensors of each optimizer group.
        backbone: scalars of the backbone.
        head: scalars of the heads, prototypes included.
        largest: scalars of the largest tensor.
        block: scalars of one transformer block.
        block_matrices: scalars of the block's matrices.
        depth: blocks.
        embed_dim: D.
        num_heads: of attention.
        mlp_hidden: width between the matrices of a block's MLP.
        mlp_matrices: scalars of the MLP's matrices, without adapters.
        layer_scale: whether each branch is scaled per channel.
        patch_size: p, in pixels.
        channels: of an image.
        head_hidden: width of the head's hidden layers.
        head_layers: linear layers of the head's MLP.
        bottleneck: width before the prototypes.
        prototypes: K.
        global_size: side of a global crop in pixels.
        local_size: side of a local crop in pixels.
        num_local: local crops of an image.
        num_special: class token and registers.
        patches: the patch loss.
        rope_tables: scalars in the sines and cosines of rotary positions; 0 with learned ones.
        gram_size: side of the Gram network's crops in pixels; 0 without one.
        subset_rate: rate of stochastic depth at which dropped branches are not computed; 0 where
            all are.
        subset_uniform: whether it is the rate of all blocks, or rises linearly to the last.
        anchor: whether there is an anchor.
        anchored_patches: whether patches are compared with it.
        frozen: scalars of the backbone that do not train.
        first_backward: index of the first block that gradients reach; those before it have no
            backward and keep nothing for one.
        skipped: of each block that gradients reach the scalars of its matrices, once for each
            product of the backward that nothing needs; empty where all are needed.
        trains_projection: whether the patch projection trains.
        frozen_teacher: counts of the network of another run that gives the targets, and of the
            patches that the student is asked about; None where the average gives them.
        stored_targets: of each head of a frozen teacher whose outputs are stored the width before
            its prototypes, patches having the last one; then the average is not asked, and no
            other network is there. Empty without.
        average_follows: whether the average takes a forward of its own beside it, as statistics of
            batch norm follow the images.
        followed: counts of a frozen teacher's backbone whose features are followed, of others than
            a ViT those of its forward alone, of stored features without one; None without.
        followed_patches: whether those of patches are.
        mixture: with sizes that differ from step to step, of which these are the largest: the
            share of the steps and the counts of each; empty with one size.
    """

    groups: tuple[tuple[int, int], ...]
    backbone: int
    head: int
    largest: int
    block: int
    block_matrices: int
    depth: int
    embed_dim: int
    num_heads: int
    mlp_hidden: int
    mlp_matrices: int
    layer_scale: bool
    patch_size: int
    channels: int
    head_hidden: int
    head_layers: int
    bottleneck: int
    prototypes: int
    global_size: int
    local_size: int
    num_local: int
    num_special: int
    patches: PatchDims = PatchDims()
    rope_tables: int = 0
    gram_size: int = 0
    subset_rate: float = 0.0
    subset_uniform: bool = False
    anchor: bool = False
    anchored_patches: bool = False
    frozen: int = 0
    first_backward: int = 0
    skipped: tuple[int, ...] = ()
    trains_projection: bool = True
    frozen_teacher: "Dims | None" = None
    stored_targets: tuple[int, ...] = ()
    average_follows: bool = False
    followed: "Dims | ForwardCounts | None" = None
    followed_patches: bool = False
    mixture: tuple[tuple[float, "Dims"], ...] = ()

    @property
    def of_targets(self) -> "Dims":
        """Counts of the network whose forward gives the targets."""
        return self.frozen_teacher or self

    @property
    def target_prototypes(self) -> tuple[int, int]:
        """Scalars of the prototypes that give the targets, those of class tokens and of patches."""
        teacher = self.of_targets
        widths = self.stored_targets or (teacher.bottleneck, teacher.patches.bottleneck)
        return self.prototypes * widths[0], self.patches.prototypes * widths[-1]

    @property
    def of_sizes(self) -> tuple[tuple[float, "Dims"], ...]:
        """The share of the steps and the counts of each size of the crops, at least one."""
        return self.mixture or ((1.0, self),)

    @property
    def mean_tokens(self) -> float:
        """Tokens of all crops of an image, on average over the steps."""
        return sum(share * dims.tokens for share, dims in self.of_sizes)

    @property
    def parameters(self) -> int:
        """Scalars in the weights of the student; its average has as many."""
        return self.backbone + self.head

    @property
    def trained(self) -> int:
        """Those that train, and of which the teacher has others than the student."""
        return self.parameters - self.frozen

    @property
    def num_crops(self) -> int:
        """Crops of an image that the student sees."""
        return NUM_GLOBAL + self.num_local

    @property
    def global_tokens(self) -> int:
        """Tokens of the global crops of an image, all that the teacher sees."""
        return NUM_GLOBAL * (self.num_special + (self.global_size // self.patch_size) ** 2)

    @property
    def tokens(self) -> int:
        """Tokens of all crops of an image."""
        local = self.num_special + (self.local_size // self.patch_size) ** 2
        return self.global_tokens + self.num_local * local

    @property
    def global_pixels(self) -> int:
        """Values in the global crops of an image, channels included."""
        return NUM_GLOBAL * self.channels * self.global_size**2

    @property
    def global_patches(self) -> int:
        """Patches of the global crops of an image."""
        return NUM_GLOBAL * (self.global_size // self.patch_size) ** 2

    @property
    def frozen_networks(self) -> int:
        """Backbones beside student and teacher: Gram network and anchor."""
        return bool(self.gram_size) + self.anchor

    @property
    def gram_tokens(self) -> int:
        """Tokens of an image that the Gram network sees."""
        if not self.gram_size:
            return 0
        return NUM_GLOBAL * (self.num_special + (self.gram_size // self.patch_size) ** 2)

    @property
    def gram_pixels(self) -> int:
        """Values in the Gram network's crops of an image, channels included."""
        return NUM_GLOBAL * self.channels * self.gram_size**2

    @property
    def pixels(self) -> int:
        """Values in all crops of an image, channels included."""
        return self.global_pixels + self.num_local * self.channels * self.local_size**2

    @property
    def mlp_kept(self) -> int:
        """Elements per token that an MLP keeps for the backward: what its first layer returns.

        A plain MLP keeps the input of its activation; a gated one, with a third matrix, the other
        factor too. Between its matrices are as many more: the activation, the product.
        """
        gated = self.mlp_matrices > 2 * self.embed_dim * self.mlp_hidden
        return (2 if gated else 1) * self.mlp_hidden


def dims_of(config: RunConfig) -> Dims:
    """Measure the shapes of a run's network; of a mixture of sizes those of the largest.

    Raises:
        ConfigError: the backbone is unknown or not a ViT.
    """
    network = shapes_only(config)
    teacher = shapes_only(config.of_teacher) if config.distill.teacher is not None else None

    def of_size(run: RunConfig) -> Dims:
        dims = _dims_of_size(run, network)
        if not run.distill.is_given:
            return dims
        if run.distill.by_features:
            if teacher is None:
                return _with_stored_features(dims, run)
            return _with_followed(dims, run, teacher)
        tracks = any(True for _ in network.buffers())  # as in `Teacher`
        dims = replace(dims, average_follows=tracks)
        if teacher is None:
            heads = run.of_teacher.head, run.of_teacher.patch_head
            widths = tuple(head.bottleneck_dim for head in heads if head is not None)
            return replace(dims, stored_targets=widths)
        return _with_teacher(dims, run, teacher)

    largest = of_size(config.of_largest_size)
    if not config.crops.mixture:
        return largest
    found = [of_size(run) for run in config.of_sizes]
    return replace(largest, mixture=tuple(zip(config.size_weights, found, strict=True)))


def _with_teacher(dims: Dims, config: RunConfig, network: DinoNetwork) -> Dims:
    """The student's counts with those of its frozen teacher, asked about the same patches."""
    teacher = _dims_of_size(config.of_teacher, network, "distill.model")
    patches = replace(teacher.patches, masked=dims.patches.masked)
    return replace(dims, frozen_teacher=replace(teacher, patches=patches))


def _with_followed(dims: Dims, config: RunConfig, network: DinoNetwork) -> Dims:
    """The student's counts with those of the backbone whose features it follows."""
    followed: Dims | ForwardCounts
    if isinstance(network.backbone, ConvNet):
        size = config.crops.global_size
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        followed = forward_counts(network.backbone, images=NUM_GLOBAL, size=size, dtype=dtype)
    else:
        followed = replace(_dims_of_size(config.of_teacher, network, "distill.model"), head=0)
    patches = config.distill.patch_feature_weight > 0
    return replace(dims, followed=followed, followed_patches=patches)


def _with_stored_features(dims: Dims, config: RunConfig) -> Dims:
    """The student's counts with those of the features it follows, which no network computes."""
    model = config.of_teacher.model
    assert model.width is not None  # the configuration asks for it
    followed = ForwardCounts(
        parameters=0,
        embed_dim=model.width,
        patch_size=model.effective_patch_size or STRIDE,
        flops=0,
        live_bytes=0,
    )
    patches = config.distill.patch_feature_weight > 0
    return replace(dims, followed=followed, followed_patches=patches)


def _dims_of_size(config: RunConfig, network: DinoNetwork, section: str = "model") -> Dims:
    backbone, crops, model = network.backbone, config.crops, config.model
    head = config.head if config.has_heads else None
    if not isinstance(backbone, VisionTransformer):
        raise ConfigError(f"{section}.backbone: plan supports only ViTs, not {model.backbone!r}")
    block = backbone.blocks[0]
    assert isinstance(block, Block)
    patch, channels = backbone.patch_size, config.data.channels
    ((_, global_tokens),) = backbone.layout_of([(1, crops.global_size)])
    num_special = global_tokens - (crops.global_size // patch) ** 2
    first = _first_backward(backbone)
    return Dims(
        groups=tuple(
            (sum(p.numel() for p in group["params"]), len(group["params"]))
            for group in param_groups(network)
        ),
        frozen=sum(p.numel() for p in network.parameters() if not p.requires_grad),
        first_backward=first,
        skipped=_skipped(backbone, first=first),
        trains_projection=backbone.patch_embed.proj.weight.requires_grad,
        backbone=_scalars(backbone),
        head=_scalars(network) - _scalars(backbone),
        largest=max(parameter.numel() for parameter in network.parameters()),
        block=_scalars(block),
        block_matrices=_scalars(block, matrices_only=True),
        depth=backbone.depth,
        embed_dim=backbone.embed_dim,
        num_heads=block.attn.num_heads,
        mlp_hidden=block.mlp.fc2.in_features,
        mlp_matrices=sum(
            p.numel() for n, p in block.mlp.named_parameters() if p.ndim == 2 and "lora_" not in n
        ),
        layer_scale=_scalars(block.ls1) > 0,
        patch_size=patch,
        channels=channels,
        head_hidden=head.hidden_dim if head else 0,
        head_layers=head.num_layers if head else 0,
        bottleneck=head.bottleneck_dim if head else 0,
        prototypes=head.num_prototypes if head else 0,
        global_size=crops.global_size,
        local_size=crops.local_size,
        num_local=crops.num_local,
        num_special=num_special,
        patches=_patch_dims(config, num_patches=global_tokens - num_special),
        rope_tables=_rope_tables(config, backbone),
        gram_size=crop_size_of(config) if config.gram.loss_weight else 0,
        subset_rate=model.drop_path_rate if model.drop_path_mode == "subset" else 0.0,
        subset_uniform=model.drop_path_uniform,
        anchor=config.anchor.counts,
        anchored_patches=config.anchor.patch_weight > 0,
    )


def _embedding_trains(backbone: VisionTransformer) -> bool:
    """Whether tokens need a gradient before the first block, such as for the mask token."""
    return any(
        parameter.requires_grad and name.split(".")[0].endswith(("_embed", "_token"))
        for name, parameter in backbone.named_parameters()
    )


def _first_backward(backbone: VisionTransformer) -> int:
    """Index of the first block that gradients reach; the depth if none."""
    if _embedding_trains(backbone):
        return 0
    trained = (any(p.requires_grad for p in block.parameters()) for block in backbone.blocks)
    return next((index for index, trains in enumerate(trained) if trains), backbone.depth)


def _skipped(backbone: VisionTransformer, *, first: int) -> tuple[int, ...]:
    """`Dims.skipped`, of the blocks from `first` on."""
    skipped = [
        sum(p.numel() for p in block.parameters() if p.ndim == 2 and not p.requires_grad)
        for block in backbone.blocks[first:]
    ]
    if skipped and not _embedding_trains(backbone):
        block = backbone.blocks[first]
        assert isinstance(block, Block)
        if not any(p.requires_grad for p in block.norm1.parameters()):
            # Queries, keys and values of tokens that need no gradient: none for the input.
            of_input = ("weight", "lora_a")
            skipped[0] += sum(
                p.numel() for name, p in block.attn.qkv.named_parameters() if name in of_input
            )
    return tuple(skipped) if any(skipped) else ()


def _rope_tables(config: RunConfig, backbone: VisionTransformer) -> int:
    if backbone.rope is None:
        return 0
    crops = config.crops
    sizes = {crops.global_size, *([crops.local_size] if crops.num_local else [])}
    tokens = sum(length for _, length in backbone.layout_of([(1, size) for size in sizes]))
    rope = config.model.rope
    tables = backbone.depth if rope is not None and rope.changes else 1
    block = backbone.blocks[0]
    assert isinstance(block, Block)
    return 2 * tables * tokens * block.attn.head_dim


def _patch_dims(config: RunConfig, *, num_patches: int) -> PatchDims:
    ibot, head = config.ibot, config.patch_head or config.head
    if not ibot.loss_weight:
        return PatchDims()
    low, high = ibot.mask_ratio
    share = (low + high) / 2
    if ibot.mask_rule == "dinov3":  # the upper end of each crop's bin
        share += (high - low) / (2 * ibot.masked_crops)
    return PatchDims(
        masked=NUM_GLOBAL * ibot.mask_prob * num_patches * share,
        hidden=head.hidden_dim,
        layers=head.num_layers,
        bottleneck=head.bottleneck_dim,
        prototypes=head.num_prototypes,
    )


def _scalars(module: nn.Module, *, matrices_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim == 2 or not matrices_only)


def flops_of(dims: Dims) -> StepFlops:
    """FLOPs of a training step per image, of a mixture of sizes on average over the steps."""
    found = [(share, _flops_of_size(of_size)) for share, of_size in dims.of_sizes]
    if len(found) == 1:
        return found[0][1]
    return StepFlops(
        **{
            field.name: round(sum(share * getattr(flops, field.name) for share, flops in found))
            for field in fields(StepFlops)
        }
    )


def _flops_of_size(dims: Dims) -> StepFlops:
    own = _flops_of_networks(dims)
    scalars = dims.bottleneck * dims.prototypes, dims.patches.bottleneck * dims.patches.prototypes
    average = own.teacher - _products(dims, *scalars) if dims.average_follows else 0
    if not dims.prototypes:  # nobody asks the average
        own = replace(own, teacher_backbone=0)
    if dims.followed is not None:
        tokens = NUM_GLOBAL + (dims.global_patches if dims.followed_patches else 0)
        maps = 2 * tokens * dims.embed_dim * dims.followed.embed_dim
        own = replace(
            own,
            student_head=own.student_head + maps,
            student_backward=own.student_backward + 2 * maps,
            followed=dims.followed.flops
            if isinstance(dims.followed, ForwardCounts)
            else _flops_of_networks(dims.followed).student_global,
        )
    if dims.stored_targets:
        products = _products(dims, *dims.target_prototypes)
        return replace(own, teacher_backbone=0, teacher_head=products, average=average)
    if dims.frozen_teacher is None:
        return own
    theirs = _flops_of_networks(dims.frozen_teacher)
    return replace(
        own,
        teacher_backbone=theirs.teacher_backbone,
        teacher_head=theirs.teacher_head,
        average=average,
    )


def _products(dims: Dims, of_classes: int, of_patches: int) -> int:
    """Those of the vectors of an image with prototypes of so many scalars."""
    return round(2 * (NUM_GLOBAL * of_classes + dims.patches.masked * of_patches))


def _flops_of_networks(dims: Dims) -> StepFlops:
    """Those of a run whose teacher is as its student."""
    of_patch = head_forward_flops(
        in_dim=dims.embed_dim,
        hidden_dim=dims.patches.hidden,
        bottleneck_dim=dims.patches.bottleneck,
        num_layers=dims.patches.layers,
        num_prototypes=dims.patches.prototypes,
    )
    return step_flops(
        global_size=dims.global_size,
        local_size=dims.local_size,
        num_local=dims.num_local,
        patch_size=dims.patch_size,
        embed_dim=dims.embed_dim,
        depth=dims.depth,
        hidden_dim=dims.head_hidden,
        bottleneck_dim=dims.bottleneck,
        num_layers=dims.head_layers,
        num_prototypes=dims.prototypes,
        in_chans=dims.channels,
        num_special=dims.num_special,
        block_weights=dims.block_matrices,
        patch_head=round(dims.patches.masked * of_patch),
        gram_size=dims.gram_size,
        anchor=dims.anchor,
        backward_depth=dims.depth - dims.first_backward,
        skipped=sum(dims.skipped),
        trains_projection=dims.trains_projection,
    )
