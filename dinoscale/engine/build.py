"""From configuration and plan to student, teacher and schedules."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dinoscale import distributed
from dinoscale.config.resolve import RunPlan
from dinoscale.config.schema import RunConfig
from dinoscale.engine.student import Student, gather_whole_blocks
from dinoscale.engine.teacher import Teacher
from dinoscale.models.heads import DinoHead
from dinoscale.models.network import DinoNetwork
from dinoscale.models.sync_bn import convert_sync_batch_norm
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.zoo import build_backbone
from dinoscale.schedules import Schedules

_NOTHING = torch.empty(0)  # in place of what rank 0 has


@dataclass(frozen=True, eq=False)
class Start:
    """Weights to begin with instead of random ones.

    Attributes:
        backbone: every tensor of the backbone, on the CPU.
        head: every tensor of the projection head; None leaves it random.
    """

    backbone: Mapping[str, Tensor]
    head: Mapping[str, Tensor] | None = None


def build_networks(
    config: RunConfig, start: Start | None = None
) -> tuple[DinoNetwork, DinoNetwork]:
    """Student and teacher networks in float32 on the CPU, drawn one after the other.

    A run begins with the student's values alone (`build_pair`).
    """
    student, teacher = drawn_network(config, start), _build_network(config)
    if start is not None:
        _load(teacher, start)
    _set_up(student, config)
    return student, teacher


def drawn_network(config: RunConfig, start: Start | None = None) -> DinoNetwork:
    """The network that a run begins with, float32 on the CPU: 4 bytes a weight.

    The seed is set here and only here: everything random later is a function of (seed, step).
    """
    torch.manual_seed(config.seed)
    network = _build_network(config)
    if start is not None:
        _load(network, start)
    return network


def _load(network: DinoNetwork, start: Start) -> None:
    network.backbone.load_state_dict(start.backbone)
    if start.head is not None:
        network.head.load_state_dict(start.head)


def _set_up(student: DinoNetwork, config: RunConfig) -> None:
    """Tell the student's backbone what it recomputes, and what it leaves out."""
    student.backbone.checkpoint_every = config.engine.checkpoint_every_k_blocks
    student.backbone.recompute = config.engine.recompute
    if config.model.drop_path_mode == "subset":
        student.backbone.subset_rate = config.model.drop_path_rate


def _build_network(config: RunConfig) -> DinoNetwork:
    network = _local_network(config)
    convert_sync_batch_norm(network, distributed.sum_with_gradient)  # a ViT has none
    return network


def _local_network(config: RunConfig) -> DinoNetwork:
    model = config.model
    backbone = build_backbone(
        model.backbone,
        img_size=config.crops.global_size,
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        in_chans=config.data.channels,
    )
    head = DinoHead(backbone.embed_dim, **config.head.model_dump())
    return DinoNetwork(backbone, head)


def shapes_only(config: RunConfig) -> DinoNetwork:
    """The student's network on the meta device: shapes without weights, takes no memory.

    Raises:
        ConfigError: there is no such backbone.
    """
    with torch.device("meta"):
        return _local_network(config)


def num_parameters(config: RunConfig) -> int:
    """Scalars in the weights of the student, with its head.

    Raises:
        ConfigError: there is no such backbone.
    """
    return sum(parameter.numel() for parameter in shapes_only(config).parameters())


def build_pair(
    config: RunConfig, plan: RunPlan, start: Start | None = None, *, values: bool = True
) -> tuple[Student, Teacher]:
    """The sharded student and its teacher, both with the same weights: of `start`, or random.

    Rank 0 alone draws or has them, 4 bytes a weight, and hands them out tensor by tensor, of which
    a rank keeps its fragments. Collective.

    Args:
        config: of the run.
        plan: of the run.
        start: on rank 0; what other ranks give does not matter.
        values: whether the values matter; zeros if not.
    """
    with torch.device("meta"):
        student_network, teacher_network = _build_network(config), _build_network(config)
    _set_up(student_network, config)
    _compile_blocks(student_network, teacher_network, config, plan)
    if config.engine.zero_stage == 3:
        gather_whole_blocks(student_network, teacher_network)
    skeleton = student_network.state_dict()  # on the meta device
    initial = _handed_out(config, start, skeleton) if values else _zeros(skeleton)
    student = Student(student_network, config, plan, initial)
    return student, Teacher(teacher_network, student, config, plan)


def _handed_out(
    config: RunConfig, start: Start | None, skeleton: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each tensor of the network, from rank 0; one at a time is in memory."""
    whole = drawn_network(config, start).state_dict() if distributed.rank() == 0 else {}
    for name in skeleton:
        yield name, distributed.broadcast_object(whole.get(name, _NOTHING))


def _zeros(skeleton: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, torch.zeros(()).expand(value.shape)) for name, value in skeleton.items())


def _compile_blocks(
    student: DinoNetwork, teacher: DinoNetwork, config: RunConfig, plan: RunPlan
) -> None:
    """Compile the blocks for the crops of a micro-batch, on a GPU or where it is asked for."""
    wanted, crops, images = config.engine.compile, config.crops, plan.micro_batch_size
    if wanted is False or (wanted == "auto" and not torch.cuda.is_available()):
        return
    of_teacher = [(2 * images, crops.global_size)]
    of_student = list(of_teacher)
    if crops.num_local:
        of_student.append((crops.num_local * images, crops.local_size))
    for network, sizes in ((student, of_student), (teacher, of_teacher)):
        if isinstance(network.backbone, VisionTransformer):
            network.backbone.compiled_for = frozenset({network.backbone.layout_of(sizes)})


def schedules_of(config: RunConfig, plan: RunPlan) -> Schedules:
    """The schedules of a run, from the recipe and the plan."""
    dino, optim = config.dino, config.optim
    return Schedules(
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        peak_lr=plan.peak_lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        weight_decay_end=optim.weight_decay_end,
        momentum=dino.momentum,
        momentum_end=dino.momentum_end,
        warmup_teacher_temp=dino.warmup_teacher_temp,
        teacher_temp=dino.teacher_temp,
        warmup_teacher_temp_epochs=dino.warmup_teacher_temp_epochs,
        freeze_last_layer_epochs=dino.freeze_last_layer_epochs,
    )
