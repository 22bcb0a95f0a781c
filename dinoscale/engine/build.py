"""From configuration and plan to student, teacher and schedules."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dinoscale.config import ModelConfig
from dinoscale.config.resolve import RunPlan
from dinoscale.config.schema import RunConfig
from dinoscale.config.sections.training import CurveConfig
from dinoscale.engine.frozen.features import FeatureTeacher
from dinoscale.engine.frozen.gram import GramNetwork, crop_size_of
from dinoscale.engine.frozen.network import FrozenBackbone
from dinoscale.engine.frozen.stored import StoredFeatures, StoredHeads
from dinoscale.engine.frozen.teacher import DistillingNetwork, FrozenTeacher
from dinoscale.engine.initialization import Write, build_on_meta
from dinoscale.engine.micro_batch import LossWeights
from dinoscale.engine.param_groups import trained_names
from dinoscale.engine.schedules import Curve, Schedules
from dinoscale.engine.student import Student, gather_whole_blocks
from dinoscale.engine.teacher import Frozen, Teacher
from dinoscale.errors import ConfigError
from dinoscale.models.block import add_adapters
from dinoscale.models.convnet import ConvNet
from dinoscale.models.heads import DinoHead
from dinoscale.models.network import DinoNetwork, FeatureNetwork, TokenNetwork
from dinoscale.models.rope import Rope
from dinoscale.models.sync_bn import convert_sync_batch_norm
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.zoo import build_backbone
from dinoscale.runtime import distributed


@dataclass(frozen=True, eq=False)
class StepZero:
    """A backbone's features of a fixed picture at step 0, against those of the weights' source.

    Attributes:
        pictures: (1, C, H, W) float32, normalised pixels.
        class_tokens: (1, D) float32, of the source; None of a ResNet, whose batch norm takes other
            statistics in training.
        difference: of the run's tokens in float32, over the length of the source's; the largest.
        bound: what rounding explains of it.
    """

    pictures: Tensor
    class_tokens: Tensor | None
    difference: float
    bound: float


@dataclass(frozen=True, eq=False)
class InitialWeights:
    """Weights that a network begins with, read before it is built.

    Those of `train.init_from`, which replace random initialization, `gram.teacher` or
    `distill.teacher`.

    Attributes:
        backbone: every tensor of the backbone, on the CPU.
        head: every tensor of the projection head; None leaves it random.
        patch_head: every tensor of the patch tokens' own head; None leaves it random.
        maps: those to another network's features, by their names in the network; others are random.
        step_zero: what the backbone computes; None where nothing was compared.
        licence: what is known of theirs, None if they began as random ones.
        identity: digest of them as they were read; None where nobody asks for it.
    """

    backbone: Mapping[str, Tensor]
    head: Mapping[str, Tensor] | None = None
    patch_head: Mapping[str, Tensor] | None = None
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    step_zero: StepZero | None = None
    licence: str | None = None
    identity: str | None = None

    def by_name(self) -> dict[str, Tensor]:
        """All tensors by their names in the network."""
        parts = {"backbone": self.backbone, "head": self.head, "patch_head": self.patch_head}
        named = {
            f"{part}.{k}": v for part, state in parts.items() for k, v in (state or {}).items()
        }
        return named | {**self.maps}


def build_networks(
    config: RunConfig, init_from: InitialWeights | None = None
) -> tuple[DinoNetwork, DinoNetwork]:
    """Student and teacher networks in float32 on the CPU, initialized one after the other.

    In a run both start from the student's values (`build_pair`).
    """
    torch.manual_seed(config.seed)
    networks = _build_network(config), _build_network(config)
    if init_from is not None:
        for network in networks:
            network.load_state_dict(network.state_dict() | init_from.by_name())
    _configure_student(networks[0], config)
    return networks


def _configure_student(student: DinoNetwork, config: RunConfig) -> None:
    """Set the student's activation checkpointing and drop path mode."""
    student.backbone.checkpoint_every = config.engine.checkpoint_every_k_blocks
    student.backbone.recompute = config.engine.recompute
    _set_drop_path(student.backbone, config)


def _set_drop_path(backbone: VisionTransformer | ConvNet, config: RunConfig) -> None:
    if config.model.drop_path_mode == "subset":
        backbone.subset_rate = config.model.drop_path_rate
        backbone.subset_uniform = config.model.drop_path_uniform


def _build_network(config: RunConfig) -> DinoNetwork:
    network = _local_network(config)
    convert_sync_batch_norm(network, distributed.sum_with_gradient)  # a ViT has none
    return network


def _backbone(config: RunConfig) -> VisionTransformer | ConvNet:
    model = config.model
    return build_backbone(
        model.backbone,
        img_size=config.crops.global_size,
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        in_chans=config.data.channels,
        position_resize=model.position_resize,
        # A frozen teacher without patches may stand beside a patch loss.
        mask_token=config.ibot.loss_weight > 0 and model.convnet is None,
        local_norm=model.local_norm,
        **layers_of(model),
    )


def _local_network(config: RunConfig) -> DinoNetwork:
    backbone = _backbone(config)
    if config.lora.rank and isinstance(backbone, VisionTransformer):
        add_adapters(backbone.blocks, rank=config.lora.rank, alpha=config.lora.alpha)
    head = patch_head = None
    if config.has_heads:
        head = DinoHead(backbone.embed_dim, **config.head.model_dump())
    if config.patch_head is not None:
        patch_head = DinoHead(backbone.embed_dim, **config.patch_head.model_dump())
    network = DinoNetwork(backbone, head, patch_head, *_feature_maps(config, backbone.embed_dim))
    _freeze(network, config)
    return network


def _feature_maps(config: RunConfig, width: int) -> list[nn.Linear | None]:
    """Maps of class and patch features to the width of a frozen teacher's, None for no term."""
    weights = config.distill.class_feature_weight, config.distill.patch_feature_weight
    wanted = config.of_teacher.model.width
    assert wanted is not None or not any(weights)  # checked with the settings
    return [nn.Linear(width, wanted or 0) if weight else None for weight in weights]


def _freeze(network: DinoNetwork, config: RunConfig) -> None:
    """Take the gradient from what does not train.

    Raises:
        ConfigError: there are fewer blocks than are to train.
    """
    blocks, lora = config.optim.trained_blocks, config.lora
    if blocks is not None and blocks > network.backbone.depth:
        raise ConfigError(
            f"optim.trained_blocks: {config.model.backbone} has {network.backbone.depth} blocks, "
            f"need at most as many or null, got {blocks}"
        )
    parameters = dict(network.named_parameters())
    trained = trained_names(
        parameters.keys(),
        adapters=lora.rank > 0,
        norms=lora.norms,
        patch_embed=lora.patch_embed,
        blocks=blocks,
    )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)


def layers_of(model: ModelConfig) -> dict[str, Any]:
    """The chosen layers, as arguments of `build_backbone`; None for the named model's own."""
    keys = ("norm_eps", "layer_scale", "ffn", "ffn_ratio", "ffn_multiple", "registers")
    layers = {key: getattr(model, key) for key in (*keys, "qkv_bias", "mask_key_bias")}
    chosen, rope = model.rope, None
    if chosen is not None:
        ends = chosen.min_period, chosen.max_period
        rope = Rope(chosen.base, *ends, coordinates=chosen.coordinates)
    return {**layers, "rope": rope}


def shapes_only(config: RunConfig) -> DinoNetwork:
    """The student's network on the meta device: shapes only, without memory.

    Raises:
        ConfigError: the backbone is unknown.
    """
    with torch.device("meta"):
        return _local_network(config)


def num_parameters(config: RunConfig) -> int:
    """Number of parameters of the student, head included.

    Raises:
        ConfigError: the backbone is unknown.
    """
    return sum(parameter.numel() for parameter in shapes_only(config).parameters())


def build_pair(
    config: RunConfig,
    plan: RunPlan,
    init_from: InitialWeights | None = None,
    *,
    values: bool = True,
    heartbeat: Callable[[], None] = lambda: None,
) -> tuple[Student, Teacher]:
    """The sharded student and its teacher with equal weights, from `init_from` or random.

    Initialization hands out one float32 tensor at a time, of which a rank keeps its fragments. At
    stages 0-2 every rank also holds all weights of both forwards in the compute dtype, on the
    device that it computes on. Collective.

    Args:
        config: of the run.
        plan: of the run.
        init_from: on rank 0; ignored on other ranks.
        values: whether the values matter; if not, all weights are zero.
        heartbeat: called after each of the parts, and with each tensor that is handed out.
    """
    student_network, writes = build_on_meta(lambda: _build_network(config))
    with torch.device("meta"):
        teacher_network = _build_network(config)
        gram_network = _token_network(config) if config.gram.loss_weight else None
        anchor_network = _token_network(config) if config.anchor.counts else None
        frozen_network = _frozen_network(config) if config.distill.teacher is not None else None
    _configure_student(student_network, config)
    networks = (student_network, teacher_network, gram_network, anchor_network, frozen_network)
    _compile_blocks(networks, config, plan)
    if config.engine.zero_stage == 3:
        gather_whole_blocks(*(network for network in networks if network is not None))
    heartbeat()
    initial = initial_values(config, writes, init_from) if values else _zeros(writes)
    student = Student(student_network, config, plan, _beating(initial, heartbeat))
    heartbeat()
    gram = anchor = None
    if gram_network is not None:
        gram = GramNetwork(FrozenBackbone(gram_network, student, config, plan), config.gram)
    if anchor_network is not None:
        _set_drop_path(anchor_network.backbone, config)  # as the student's, see frozen/anchor.py
        anchor = FrozenBackbone(anchor_network, student, config, plan)
        anchor.take(student.master)
    frozen: Frozen | None = None
    if frozen_network is not None:
        frozen = _frozen_teacher(frozen_network, config, plan, student.compute_dtype)
    elif config.distill.targets is not None:
        frozen = _stored_teacher(config, student.compute_dtype)
    return student, Teacher(teacher_network, student, config, plan, gram, anchor, frozen)


def _frozen_network(config: RunConfig) -> DistillingNetwork | FeatureNetwork:
    """The frozen teacher's network, for the outputs of its heads or for its features."""
    if config.distill.by_features:
        backbone = _backbone(config.of_teacher)
        # In evaluation the same, and weights in bfloat16 meet its statistics in float32.
        convert_sync_batch_norm(backbone, distributed.sum_with_gradient)
        return FeatureNetwork(backbone, patches=config.distill.patch_feature_weight > 0)
    return DistillingNetwork(
        _build_network(config.of_teacher), patch_size=config.model.effective_patch_size
    )


def _frozen_teacher(
    network: DistillingNetwork | FeatureNetwork,
    config: RunConfig,
    plan: RunPlan,
    dtype: torch.dtype,
) -> FrozenTeacher[Any]:
    if isinstance(network, FeatureNetwork):
        return FeatureTeacher(network, config, plan, dtype)
    return FrozenTeacher(network, config, plan, dtype)


def _stored_teacher(config: RunConfig, dtype: torch.dtype) -> StoredHeads | StoredFeatures:
    """What a run keeps of a frozen teacher whose outputs are stored."""
    if config.distill.by_features:
        return StoredFeatures()
    return StoredHeads(shapes_only(config.of_teacher), dtype)


def build_frozen_teacher(config: RunConfig, plan: RunPlan) -> FrozenTeacher[Any]:
    """The frozen teacher of a run without the run's own networks, all weights zero; collective."""
    with torch.device("meta"):
        network = _frozen_network(config)
    _compile_blocks((None, None, None, None, network), config, plan)
    if config.engine.zero_stage == 3:
        gather_whole_blocks(network)
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    return _frozen_teacher(network, config, plan, dtype)


def _token_network(config: RunConfig) -> TokenNetwork:
    """A backbone of the run's architecture."""
    backbone = _local_network(config).backbone
    assert isinstance(backbone, VisionTransformer)  # others have no patches, and are refused
    return TokenNetwork(backbone)


def _beating(
    initial: Iterable[tuple[str, Tensor]], heartbeat: Callable[[], None]
) -> Iterator[tuple[str, Tensor]]:
    for name, value in initial:
        heartbeat()
        yield name, value
        del value  # before the next is there


def initial_values(
    config: RunConfig, writes: Sequence[Write], init_from: InitialWeights | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 value on the CPU of each tensor of the network, equal on all ranks.

    Rank 0 draws one tensor at a time and broadcasts it; a rank holds one if the caller drops each
    before it takes the next. Collective. The seed is set only here: everything random later is a
    function of (seed, step).

    Args:
        config: of the run.
        writes: of the network, from `build_on_meta`.
        init_from: on rank 0, values that replace the drawn ones.
    """
    first = distributed.rank() == 0
    given = init_from.by_name() if first and init_from is not None else {}
    if first:
        torch.manual_seed(config.seed)
    for write in writes:
        value = write.value() if first else torch.empty_like(write.target, device="cpu")
        if write.name is not None:
            if write.name in given:
                value.copy_(given[write.name])
            distributed.broadcast(value)
            yield write.name, value
        del value  # before the next one is drawn


def _zeros(writes: Sequence[Write]) -> Iterator[tuple[str, Tensor]]:
    for write in writes:
        if write.name is not None:
            yield write.name, torch.zeros(()).expand(write.target.shape)


def _compile_blocks(
    networks: Sequence[DinoNetwork | TokenNetwork | FeatureNetwork | None],
    config: RunConfig,
    plan: RunPlan,
) -> None:
    """Compile the blocks for a micro-batch's crops of each size; `auto` does so on a GPU only.

    Args:
        networks: student, teacher, Gram network, anchor and frozen teacher, None for one that is
            not there.
        config: of the run.
        plan: of the run.
    """
    wanted = config.engine.compile
    if wanted is False or (wanted == "auto" and not torch.cuda.is_available()):
        return
    of_sizes = [_forwards(run, images=plan.micro_batch_size) for run in config.of_sizes]
    for network, forwards in zip(networks, zip(*of_sizes, strict=True), strict=True):
        backbone = None if network is None else network.backbone
        if isinstance(backbone, VisionTransformer):
            backbone.compiled_for = frozenset(backbone.layout_of(crops) for crops in forwards)


def _forwards(config: RunConfig, *, images: int) -> tuple[list[tuple[int, int]], ...]:
    """Crops of a micro-batch that each of the networks sees, as (number, side)."""
    crops = config.crops
    of_teacher = [(2 * images, crops.global_size)]
    of_student = list(of_teacher)
    if crops.num_local:
        of_student.append((crops.num_local * images, crops.local_size))
    of_gram = [(2 * images, crop_size_of(config))]
    return of_student, of_teacher, of_gram, of_teacher, of_teacher


def loss_weights_of(config: RunConfig) -> LossWeights:
    """The weights of a run's objectives."""
    return LossWeights(
        student_temp=config.dino.student_temp,
        dino=config.dino.loss_weight,
        ibot=config.ibot.loss_weight,
        koleo=config.koleo.loss_weight,
        local_is_scheduled=config.schedules.local_weight is not None,
        same_view_pairs=config.dino.same_view_pairs,
        koleo_over_ranks=config.koleo.scope != "rank",
        koleo_group=config.koleo.group_size,
        koleo_neighbours=config.koleo.num_neighbours,
        gram=config.gram.loss_weight,
        gram_per_crop=config.gram.compare == "within_crops",
        gram_negatives=config.gram.negatives,
        gram_tokens=config.gram.tokens,
        anchor_class=config.anchor.class_weight,
        anchor_patch=config.anchor.patch_weight,
        feature_class=config.distill.class_feature_weight,
        feature_patch=config.distill.patch_feature_weight,
        feature_loss=config.distill.feature_loss,
        unmasked_share=1 - config.ibot.masked_share if config.ibot.loss_weight else 1.0,
    )


def schedules_of(config: RunConfig, plan: RunPlan) -> Schedules:
    """The schedules of a run, from the recipe and the plan."""
    dino, optim, given = config.dino, config.optim, config.schedules
    wanted = given.curves | ({} if config.lr_curve is None else {"lr": config.lr_curve})
    curves = {name: _curve(curve, plan) for name, curve in wanted.items()}
    return Schedules(
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        peak_lr=plan.peak_lr,
        min_lr=plan.min_lr,
        weight_decay=optim.weight_decay,
        weight_decay_end=optim.weight_decay_end,
        momentum=dino.momentum,
        momentum_end=dino.momentum_end,
        warmup_teacher_temp=dino.warmup_teacher_temp,
        teacher_temp=dino.teacher_temp,
        warmup_teacher_temp_epochs=dino.warmup_teacher_temp_epochs,
        teacher_temp_per_step=dino.teacher_temp_changes == "per_step",
        freeze_last_layer_epochs=dino.freeze_last_layer_epochs,
        cosine_extra=given.cosine_extra,
        lr_curve=curves.get("lr"),
        weight_decay_curve=curves.get("weight_decay"),
        momentum_curve=curves.get("momentum"),
        teacher_temp_curve=curves.get("teacher_temp"),
        local_weight=curves.get("local_weight"),
        gram_weight=curves.get("gram_weight"),
    )


def _curve(config: CurveConfig, plan: RunPlan) -> Curve:
    """The curve in steps."""
    warmup = config.warmup_epochs * plan.steps_per_epoch
    rest = plan.total_steps - warmup
    epochs = config.cosine_epochs
    return Curve(
        start=config.start,
        peak=config.peak,
        end=config.end,
        warmup_steps=warmup,
        cosine_steps=rest if epochs is None else epochs * plan.steps_per_epoch,
    )
