"""Peak memory of one rank in a training step, in bytes, from sizes alone.

A step passes several moments at which its memory can peak. Each adds its own tensors to those that
a rank holds all the time, and the largest total is the peak. The terms follow what the engine and
DeepSpeed 0.19 allocate; `tests/benchmarks/plan.py` compares them with real steps.

Letters: P weights, W ranks, s bytes of a weight in the forward, c bytes of a number that is reduced
over ranks, T tokens of a micro-batch, D width, K prototypes.
"""

from dataclasses import dataclass
from typing import Literal

from dinoscale.engine.model_sizes import Dims
from dinoscale.losses import gram
from dinoscale.losses.dino import CHUNK
from dinoscale.losses.prototypes import PROTOTYPES
from dinoscale.planning.plan.activations import (
    activations,
    added_by_backward,
    saved_by_block,
    saved_by_blocks,
)
from dinoscale.planning.plan.frozen_networks import (
    anchor_features,
    features,
    followed_forward,
    frozen_forward,
    gram_features,
    kept,
    widest,
)
from dinoscale.planning.plan.partition import FP32, Setup

PARTS = ("parameters", "gradients", "optimizer", "teacher", "activations", "loss", "buffers")

Terms = dict[str, float]  # bytes of each of `PARTS`; a missing part has none


@dataclass(frozen=True)
class Peak:
    """The moment of a step with the most memory in use.

    Attributes:
        moment: its name, in words.
        terms: bytes of each of `PARTS`.
    """

    moment: str
    terms: Terms

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.terms.values())


def peak(dims: Dims, setup: Setup) -> Peak:
    """The peak of any step but the first; of a mixture of sizes that of the step with most."""
    return max((_peak_of_size(part, setup) for _, part in dims.of_sizes), key=lambda p: p.total)


def _peak_of_size(dims: Dims, setup: Setup) -> Peak:
    always = persistent(dims, setup)
    found = {moment: _sum(always, terms) for moment, terms in _moments(dims, setup).items()}
    moment = max(found, key=lambda name: sum(found[name].values()))
    return Peak(moment, {part: found[moment].get(part, 0) for part in PARTS})


def persistent(dims: Dims, setup: Setup) -> Terms:
    """Memory of a rank between steps; on a GPU, which lags behind, with the next step's crops."""
    weights, ranks, s = dims.trained, setup.world_size, setup.weight_bytes
    stage = setup.zero_stage
    # At stage 0 in float32 the weights are the master weights; otherwise those are a copy.
    master = 0 if stage == 0 and not setup.bf16 else FP32
    states = (master + FP32 * setup.moments) * weights / (ranks if stage else 1)
    summed = 2 if setup.bf16 and not setup.sums_in_fp32 else FP32
    parts = ranks if stage == 3 else 1
    average, forward = FP32 * weights / ranks, s * weights / parts
    compared = s * (dims.backbone - dims.frozen) / parts * dims.frozen_networks
    for teacher in (dims.frozen_teacher, dims.followed):
        compared += 0 if teacher is None else s * teacher.parameters / parts
    if dims.stored_targets:  # patches may share the head of class tokens
        compared += s * sum(dims.target_prototypes[: len(dims.stored_targets)])
    if setup.offload_optimizer:
        states = average = 0
    return {
        # Of frozen ones the teacher has none of its own. Their slices are in host memory.
        "parameters": forward + (s + (0 if setup.on_gpu else FP32 / ranks)) * dims.frozen,
        # Stage 3 keeps the buffers that accumulate gradients; the others allocate them each step.
        "gradients": summed * weights / ranks if stage == 3 else 0,
        "optimizer": states,
        # center, sums, mean target
        "teacher": average
        + forward
        + compared
        + 4 * FP32 * (dims.prototypes + dims.patches.prototypes),
        "activations": _crops(dims, setup) if setup.on_gpu else 0,
        "buffers": setup.communication_bytes * setup.reduce_bucket_size if stage == 3 else 0,
    }


def _moments(dims: Dims, setup: Setup) -> dict[str, Terms]:
    """Additional memory at each moment that can be the peak."""
    accumulated, crops = _accumulated(dims, setup), _crops(dims, setup)
    in_forward = {"activations": 0 if setup.on_gpu else crops}
    # The next micro-batch of the step, which is made after the forward.
    in_backward = in_forward if setup.accumulation_steps > 1 else {}
    return {
        "teacher forward": _sum(accumulated, in_forward, _teacher_forward(dims, setup)),
        "forward of the average": _sum(accumulated, in_forward, _average_forward(dims, setup)),
        "Gram forward": _sum(accumulated, in_forward, _gram_forward(dims, setup)),
        "anchor forward": _sum(accumulated, in_forward, _anchor_forward(dims, setup)),
        "forward of the followed": _sum(accumulated, in_forward, _followed_forward(dims, setup)),
        "anchor loss": _sum(accumulated, in_forward, _anchor_loss(dims, setup)),
        "Gram loss": _sum(accumulated, in_forward, _gram_loss(dims, setup)),
        "loss": _sum(accumulated, in_forward, _loss(dims, setup)),
        "loss of patches": _sum(accumulated, in_forward, _patch_loss(dims, setup)),
        "start of backward": _sum(accumulated, in_backward, _start_of_backward(dims, setup)),
        "backward of a block": _sum(accumulated, in_backward, _backward_of_block(dims, setup)),
        "first reduction of gradients": _sum(in_backward, _first_reduction(dims, setup)),
        "last reduction of gradients": _last_reduction(dims, setup),
        "optimizer step": _optimizer_step(dims, setup),
    }


def _sum(*summands: Terms) -> Terms:
    parts = {part for terms in summands for part in terms}
    return {part: sum(terms.get(part, 0) for terms in summands) for part in parts}


def _crops(dims: Dims, setup: Setup) -> float:
    """The crops of a micro-batch, in float32; those of the Gram network, too."""
    return FP32 * setup.micro_batch_size * (dims.pixels + dims.gram_pixels)


def _prototype_scalars(dims: Dims) -> int:
    return dims.prototypes * dims.bottleneck


def _patch_prototype_scalars(dims: Dims) -> int:
    return dims.patches.prototypes * dims.patches.bottleneck


def _targets(dims: Dims, setup: Setup) -> float:
    """Targets of the teacher: two rows of K float32 per image, which overwrite its logits."""
    return 2 * FP32 * setup.micro_batch_size * dims.prototypes


def _accumulated(dims: Dims, setup: Setup) -> Terms:
    """What earlier micro-batches of the step leave in memory."""
    if setup.accumulation_steps == 1:
        return {}
    s, stage = setup.weight_bytes, setup.zero_stage
    gradients: float = 0
    if stage < 2:
        gradients = s * dims.trained  # unreduced until the last micro-batch
    elif stage == 2:
        gradients = _own_gradients(dims, setup)
    return {
        "gradients": gradients,
        "buffers": s * setup.reduce_bucket_size if stage == 1 else 0,  # freed at the optimizer step
    }


def _own_gradients(dims: Dims, setup: Setup) -> float:
    """Reduced gradients of a rank's partition, at stages 1 and 2."""
    weights, ranks = dims.trained, setup.world_size
    if setup.sums_in_fp32:
        return FP32 * weights / ranks
    # Whole tensors that overlap the partition: every rank's overlaps the tensor of prototypes.
    shared = _prototype_scalars(dims)
    return setup.weight_bytes * (shared + (weights - shared) / ranks)


def _gathered(
    dims: Dims, setup: Setup, *, during: Literal["teacher", "forward", "backward"]
) -> float:
    """Weights gathered at stage 3: in use, prefetched, and saved by autograd."""
    if setup.zero_stage < 3 or setup.world_size == 1:
        return 0
    weights = (dims.of_targets if during == "teacher" else dims).parameters
    return _in_flight(weights, setup) + (0 if during == "teacher" else _second_copies(dims, setup))


def _in_flight(weights: int, setup: Setup) -> float:
    """Of so many weights of a network, those that stage 3 has gathered."""
    if setup.zero_stage < 3 or setup.world_size == 1:
        return 0
    most = setup.stage3_max_live_parameters
    live = min(weights, most)  # stage3_max_live_parameters
    prefetched = min(weights, most // 2)  # stage3_prefetch_bucket_size
    return setup.weight_bytes * (live + prefetched)


def _second_copies(dims: Dims, setup: Setup) -> float:
    """HpZ copies of student and teacher in a node, from the first forward to the optimizer step."""
    if setup.zero_stage < 3 or setup.zero_hpz_partition_size == 1:
        return 0
    weights = dims.parameters + dims.of_targets.parameters
    return setup.weight_bytes * weights / setup.zero_hpz_partition_size


def _teacher_forward(dims: Dims, setup: Setup) -> Terms:
    """The teacher's widest layer, or its prototypes while they are normalized."""
    if not dims.prototypes:  # nobody asks it
        return {}
    s, images, teacher = setup.weight_bytes, setup.micro_batch_size, dims.of_targets
    block = 0.0 if dims.stored_targets else widest(teacher, setup, tokens=teacher.global_tokens)
    if teacher is not dims:  # the inputs of the block and of its MLP
        block += 2 * s * images * teacher.global_tokens * teacher.embed_dim
    prototypes = (2 if setup.bf16 else 1) * FP32 * dims.target_prototypes[0]
    pixels = s * images * dims.global_pixels if setup.bf16 and block else 0
    return {
        "activations": pixels + max(block, prototypes),
        "loss": _targets(dims, setup),
        "buffers": _gathered(dims, setup, during="teacher") if block else 0,
    }


def _average_forward(dims: Dims, setup: Setup) -> Terms:
    """The widest layer of an average that follows a frozen teacher's images."""
    if not dims.average_follows:
        return {}
    pixels, tokens = dims.global_pixels, dims.global_tokens
    return {
        "activations": frozen_forward(dims, setup, pixels=pixels, tokens=tokens),
        "buffers": _in_flight(dims.parameters, setup),
    }


def _gram_forward(dims: Dims, setup: Setup) -> Terms:
    """The Gram network's widest layer, once the targets are there."""
    if not dims.gram_size:
        return {}
    activations = frozen_forward(dims, setup, pixels=dims.gram_pixels, tokens=dims.gram_tokens)
    return {
        "activations": activations,
        "loss": _targets(dims, setup),
        "buffers": _gathered(dims, setup, during="teacher"),
    }


def _anchor_forward(dims: Dims, setup: Setup) -> Terms:
    """The anchor's widest layer over the global crops, once the other targets are there."""
    if not dims.anchor:
        return {}
    pixels, tokens = dims.global_pixels, dims.global_tokens
    return {
        "activations": frozen_forward(dims, setup, pixels=pixels, tokens=tokens),
        "loss": _targets(dims, setup) + gram_features(dims, setup),
        "buffers": _gathered(dims, setup, during="teacher"),
    }


def _anchor_loss(dims: Dims, setup: Setup) -> Terms:
    """All activations but the head's, the unit vectors of both sides, and squared differences."""
    if not dims.anchored_patches:
        return {}
    scalars = setup.micro_batch_size * dims.global_patches * dims.embed_dim
    return {
        "activations": saved_by_blocks(dims, setup, blocks=dims.depth),
        "loss": _targets(dims, setup)
        + features(dims, setup)
        + kept(dims, setup)
        + 3 * FP32 * scalars,
        "buffers": _gathered(dims, setup, during="forward"),
    }


def _followed_forward(dims: Dims, setup: Setup) -> Terms:
    """The widest layer of the backbone whose features are followed, once the others are there."""
    teacher = dims.followed
    if teacher is None:
        return {}
    return {
        "activations": followed_forward(dims, setup),
        "loss": _targets(dims, setup) + gram_features(dims, setup) + anchor_features(dims, setup),
        "buffers": _in_flight(teacher.parameters, setup),
    }


def _gram_loss(dims: Dims, setup: Setup) -> Terms:
    """All activations but the head's, and two chunks of similarities."""
    if not dims.gram_size:
        return {}
    similarities = setup.micro_batch_size * dims.global_patches**2
    return {
        "activations": saved_by_blocks(dims, setup, blocks=dims.depth),
        "loss": _targets(dims, setup)
        + features(dims, setup)
        + kept(dims, setup)
        + 2 * FP32 * min(gram.CHUNK, similarities),
        "buffers": _gathered(dims, setup, during="forward"),
    }


def _loss(dims: Dims, setup: Setup) -> Terms:
    """All activations, the gradient of the prototypes, and one chunk of logits."""
    images = setup.micro_batch_size
    rows = images * dims.num_crops
    at_once = min(dims.prototypes, PROTOTYPES, max(1, CHUNK // rows))
    copies = 4 if setup.bf16 else 3  # of the prototypes: v, w, the gradient, and times v
    chunk = FP32 * at_once * (2 * rows + copies * dims.bottleneck)
    cast = 2 * setup.micro_batch_size * dims.pixels if setup.bf16 else 0  # crops in bfloat16
    return {
        "activations": activations(dims, setup) + cast,
        "gradients": setup.weight_bytes * _prototype_scalars(dims),
        "loss": _targets(dims, setup) + chunk + features(dims, setup) + kept(dims, setup),
        "buffers": _gathered(dims, setup, during="forward"),
    }


def _patch_loss(dims: Dims, setup: Setup) -> Terms:
    """After the loss of class tokens: prototypes in float32, their gradient, a chunk of logits."""
    scalars, s = _patch_prototype_scalars(dims), setup.weight_bytes
    _, of_teacher = dims.target_prototypes
    prototypes = FP32 * (2 * scalars + of_teacher)  # normalized, and the gradient
    if setup.bf16:
        prototypes += s * scalars  # the gradient in bfloat16
    logits = setup.micro_batch_size * dims.patches.masked * dims.patches.prototypes
    copied = s * of_teacher if setup.zero_stage == 3 else 0  # kept for the step
    return {
        "activations": activations(dims, setup),
        "gradients": s * _prototype_scalars(dims),
        "loss": _targets(dims, setup)
        + prototypes
        + 3 * FP32 * min(CHUNK, logits)
        + features(dims, setup)
        + kept(dims, setup),
        "buffers": copied + _gathered(dims, setup, during="forward"),
    }


def _start_of_backward(dims: Dims, setup: Setup) -> Terms:
    """The gradient of the prototypes is copied into a new bucket."""
    return {
        "activations": activations(dims, setup),
        "gradients": setup.weight_bytes
        * (_prototype_scalars(dims) + _patch_prototype_scalars(dims)),
        "loss": _targets(dims, setup) + kept(dims, setup),
        "buffers": _bucket(setup) + _gathered(dims, setup, during="backward"),
    }


def _bucket(setup: Setup) -> float:
    """Stages 1 and 2 allocate a whole bucket at the first gradient of a micro-batch."""
    is_new = setup.zero_stage == 2 or (setup.zero_stage == 1 and setup.accumulation_steps == 1)
    return setup.weight_bytes * setup.reduce_bucket_size if is_new else 0


def _backward_of_block(dims: Dims, setup: Setup) -> Terms:
    """Backward of the block with the most memory: one of the last, or the last recomputed one."""
    s, width = setup.weight_bytes, dims.embed_dim
    head = s * dims.head if setup.zero_stage < 2 and setup.accumulation_steps == 1 else 0
    return {
        "activations": max(
            saved_by_blocks(dims, setup, blocks=index + 1)
            + added_by_backward(dims, setup, index=index)
            for index in range(dims.first_backward, dims.depth)
        ),
        "gradients": head + s * width * dims.mlp_hidden,
        "loss": _targets(dims, setup),
        "buffers": _bucket(setup) + _gathered(dims, setup, during="backward"),
    }


def _first_reduction(dims: Dims, setup: Setup) -> Terms:
    """Stages 2 and 3 reduce a full bucket over ranks during the backward."""
    if setup.zero_stage < 2 or dims.trained <= setup.reduce_bucket_size:
        return {}
    done = max(0, setup.reduce_bucket_size - dims.head) / dims.block  # blocks, when it is full
    index = max(0, dims.depth - 1 - int(done))
    working: float = 0  # stage 2 reduces within the backward of a block, stage 3 after it
    if setup.zero_stage == 2:
        left = 1 - done % 1
        tokens = setup.micro_batch_size * dims.tokens
        working = added_by_backward(dims, setup, index=index)
        working += left * tokens * saved_by_block(dims, setup, index=index)
    return {
        "activations": saved_by_blocks(dims, setup, blocks=index) + working,
        "gradients": _own_gradients(dims, setup) if setup.zero_stage == 2 else 0,
        "loss": _targets(dims, setup),
        "buffers": _bucket(setup)
        + _reduction(dims, setup)
        + _gathered(dims, setup, during="backward"),
    }


def _reduction(dims: Dims, setup: Setup) -> float:
    """Copies of a bucket while it is reduced over ranks."""
    s, c, ranks = setup.weight_bytes, setup.communication_bytes, setup.world_size
    fill = min(dims.trained, setup.reduce_bucket_size)
    if setup.zero_stage == 3:  # reordered by rank; gloo makes another copy of it
        return c * fill * (1 if setup.on_gpu else 2)
    # Flattened again if it holds partitions of several ranks, or several tensors.
    several = ranks > 1 or (setup.zero_stage == 2 and setup.sums_in_fp32)
    return fill * ((s if several else 0) + (c if c != s else 0))


def _last_reduction(dims: Dims, setup: Setup) -> Terms:
    """Stage 0 flattens all gradients, 1 reduces its first bucket, 2 and 3 their last."""
    s, c, weights = setup.weight_bytes, setup.communication_bytes, dims.trained
    stage, fill = setup.zero_stage, min(dims.trained, setup.reduce_bucket_size)
    gradients: float
    if stage == 0:
        gradients, buffers = s * weights, weights * (s + (c if c != s else 0.0))
    elif stage == 1:
        gradients = s * max(weights - fill, 0)
        if weights > fill:
            gradients = max(gradients, _own_gradients(dims, setup))
        buffers = s * setup.reduce_bucket_size + _reduction(dims, setup)
    else:
        gradients = _own_gradients(dims, setup) if stage == 2 else 0
        buffers = _bucket(setup) + _reduction(dims, setup) + _second_copies(dims, setup)
    return {
        "activations": saved_by_blocks(dims, setup, blocks=0),
        "gradients": gradients,
        "loss": _targets(dims, setup),
        "buffers": buffers,
    }


def _optimizer_step(dims: Dims, setup: Setup) -> Terms:
    """The reduced gradients, and a float32 copy of one group's; the fused AdamW adds nothing."""
    stage = setup.zero_stage
    if setup.offload_optimizer:
        own = _own_gradients(dims, setup) if stage < 3 else 0
        return {"gradients": own, "buffers": _second_copies(dims, setup)}
    if stage == 0:
        return {"gradients": dims.trained * (2 + FP32 if setup.bf16 else FP32)}
    return {
        "gradients": max(_group_step(dims, setup, group=g) for g in range(len(dims.groups))),
        "buffers": _second_copies(dims, setup),
    }


def _group_step(dims: Dims, setup: Setup, *, group: int) -> float:
    """Gradients during the step of one parameter group at stages 1 to 3; groups go in turn."""
    parts = [scalars / setup.world_size for scalars, _ in dims.groups]
    copied = _copied(parts[group], setup, tensors=dims.groups[group][1])
    own: float = 0  # stage 3 keeps them anyway
    if setup.zero_stage == 2 and setup.sums_in_fp32:
        own = FP32 * sum(parts[group:])  # a buffer for each group
    elif setup.zero_stage < 3 and not (copied and group == len(parts) - 1):
        own = _own_gradients(dims, setup)  # one buffer, freed once the last group is copied
    return own + copied


def _copied(part: float, setup: Setup, *, tensors: int) -> float:
    """The flat float32 copy of a group's gradients, if they are not stored that way already."""
    as_they_are = setup.sums_in_fp32 or not setup.bf16
    in_place = setup.sums_in_fp32 if setup.zero_stage == 2 else as_they_are and tensors == 1
    return 0 if in_place else FP32 * part
