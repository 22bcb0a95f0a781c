"""Bytes of one rank at the peak of a training step, from sizes alone.

What a rank holds between steps is a sum. The peak is not: it is the largest of a few moments, and
each is worked out by itself, for no two of them have everything at once. The terms follow what the
engine and DeepSpeed 0.19 allocate; `tests/benchmarks/plan.py` compares them with real steps.

Letters: P scalars of weights, W ranks, s bytes of a weight in the forward, c bytes of a number that
is summed over ranks, T tokens of a micro-batch, D width, K prototypes.
"""

from dataclasses import dataclass
from typing import Literal

from dinoscale.engine.model_sizes import Dims
from dinoscale.losses.dino import CHUNK, PROTOTYPES
from dinoscale.planning.plan.activations import activations, in_work, is_recomputed, kept_by_block
from dinoscale.planning.plan.partition import FP32, Setup

PARTS = ("parameters", "gradients", "optimizer", "teacher", "activations", "loss", "buffers")

Terms = dict[str, float]  # bytes of each of `PARTS`; a part that is not there has none


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a step.

    Attributes:
        moment: in words.
        terms: bytes of each of `PARTS`.
    """

    moment: str
    terms: Terms

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.terms.values())


def peak(dims: Dims, setup: Setup) -> Peak:
    """The fullest moment of a step that is not the first."""
    always = held(dims, setup)
    found = {moment: _sum(always, terms) for moment, terms in _moments(dims, setup).items()}
    moment = max(found, key=lambda name: sum(found[name].values()))
    return Peak(moment, {part: found[moment].get(part, 0) for part in PARTS})


def held(dims: Dims, setup: Setup) -> Terms:
    """What a rank holds between steps, the crops of the next one included."""
    weights, ranks, s = dims.parameters, setup.world_size, setup.weight_bytes
    stage = setup.zero_stage
    # At stage 0 in float32 the weights are their own master; everywhere else it is a copy.
    master = 0 if stage == 0 and not setup.bf16 else FP32
    states = (master + FP32 * setup.moments) * weights / (ranks if stage else 1)
    summed = 2 if setup.bf16 and not setup.sums_in_fp32 else FP32
    average, forward = FP32 * weights / ranks, s * weights / (ranks if stage == 3 else 1)
    if setup.offload_optimizer:
        states = average = 0
    return {
        "parameters": forward,
        # Stage 3 keeps the buffers that gradients are summed in; the others make them anew.
        "gradients": summed * weights / ranks if stage == 3 else 0,
        "optimizer": states,
        "teacher": average + forward + 4 * FP32 * dims.prototypes,  # center, sums, mean target
        "activations": FP32 * setup.micro_batch_size * dims.pixels,  # crops of one, in float32
        "buffers": setup.communication_bytes * setup.reduce_bucket_size if stage == 3 else 0,
    }


def _moments(dims: Dims, setup: Setup) -> dict[str, Terms]:
    """What there is besides, at each moment that can be the fullest."""
    carried = _carried(dims, setup)
    return {
        "teacher forward": _sum(carried, _teacher_forward(dims, setup)),
        "loss": _sum(carried, _loss(dims, setup)),
        "start of backward": _sum(carried, _backward_begins(dims, setup)),
        "backward of a block": _sum(carried, _backward_of_block(dims, setup)),
        "first reduction of gradients": _first_reduction(dims, setup),
        "last reduction of gradients": _last_reduction(dims, setup),
        "optimizer step": _optimizer_step(dims, setup),
    }


def _sum(*summands: Terms) -> Terms:
    parts = {part for terms in summands for part in terms}
    return {part: sum(terms.get(part, 0) for terms in summands) for part in parts}


def _prototype_scalars(dims: Dims) -> int:
    return dims.prototypes * dims.bottleneck


def _targets(dims: Dims, setup: Setup) -> float:
    """Two rows of K float32 for each image; the logits are overwritten by them."""
    return 2 * FP32 * setup.micro_batch_size * dims.prototypes


def _carried(dims: Dims, setup: Setup) -> Terms:
    """What the micro-batches before the last one leave behind."""
    if setup.accumulation_steps == 1:
        return {}
    s, stage = setup.weight_bytes, setup.zero_stage
    gradients: float = 0
    if stage < 2:
        gradients = s * dims.parameters  # whole, until the last one
    elif stage == 2:
        gradients = _own_gradients(dims, setup)
    return {
        "gradients": gradients,
        "buffers": s * setup.reduce_bucket_size if stage == 1 else 0,  # released at the step only
    }


def _own_gradients(dims: Dims, setup: Setup) -> float:
    """Summed gradients of a rank's part, at stages 1 and 2."""
    weights, ranks = dims.parameters, setup.world_size
    if setup.sums_in_fp32:
        return FP32 * weights / ranks
    # Whole tensors that the part touches: each rank's touches the one tensor of prototypes.
    shared = _prototype_scalars(dims)
    return setup.weight_bytes * (shared + (weights - shared) / ranks)


def _gathered(
    dims: Dims, setup: Setup, *, during: Literal["teacher", "forward", "backward"]
) -> float:
    """Weights of other ranks at stage 3: those in use, those ahead, those that autograd keeps."""
    if setup.zero_stage < 3 or setup.world_size == 1:
        return 0
    weights, most = dims.parameters, setup.stage3_max_live_parameters
    copies = 0 if during == "teacher" else _second_copies(dims, setup)
    live = min(weights, most)  # stage3_max_live_parameters
    if during != "teacher":
        plain = sum(not is_recomputed(setup, index=index) for index in range(dims.depth))
        pinned = plain * dims.block  # memory_efficient_linear is off
        again = during == "backward" and weights > live  # the backward gathers them all the same
        live = live + pinned if again else max(live, pinned)
    ahead = min(weights, most // 2)  # stage3_prefetch_bucket_size
    return setup.weight_bytes * (live + ahead) + copies


def _second_copies(dims: Dims, setup: Setup) -> float:
    """The student's and the teacher's in a node, from their first forward to the optimizer step."""
    if setup.zero_stage < 3 or setup.zero_hpz_partition_size == 1:
        return 0
    return 2 * setup.weight_bytes * dims.parameters / setup.zero_hpz_partition_size


def _teacher_forward(dims: Dims, setup: Setup) -> Terms:
    """Its widest layer, or the prototypes on their way to unit length."""
    s, images = setup.weight_bytes, setup.micro_batch_size
    tokens = images * dims.global_tokens
    # In a block: the residual, the norm, both sides of the activation.
    block = s * tokens * (2 * dims.embed_dim + dims.mlp_kept)
    prototypes = (2 if setup.bf16 else 1) * FP32 * _prototype_scalars(dims)
    pixels = s * images * dims.global_pixels if setup.bf16 else 0
    return {
        "activations": pixels + max(block, prototypes),
        "loss": _targets(dims, setup),
        "buffers": _gathered(dims, setup, during="teacher"),
    }


def _loss(dims: Dims, setup: Setup) -> Terms:
    """All activations, the prototypes' gradient as it is made, and one chunk of logits."""
    images = setup.micro_batch_size
    rows = images * dims.num_crops
    at_once = min(dims.prototypes, PROTOTYPES, max(1, CHUNK // rows))
    copies = 4 if setup.bf16 else 3  # of the prototypes: v, w, the gradient, and times v
    chunk = FP32 * at_once * (2 * rows + copies * dims.bottleneck)
    cast = (
        2 * setup.micro_batch_size * dims.pixels if setup.bf16 else 0
    )  # as the network takes them
    return {
        "activations": activations(dims, setup, blocks=dims.depth) + cast,
        "gradients": setup.weight_bytes * _prototype_scalars(dims),
        "loss": _targets(dims, setup) + chunk,
        "buffers": _gathered(dims, setup, during="forward"),
    }


def _backward_begins(dims: Dims, setup: Setup) -> Terms:
    """The gradient of the prototypes is put into a fresh bucket."""
    return {
        "activations": activations(dims, setup, blocks=dims.depth),
        "gradients": setup.weight_bytes * _prototype_scalars(dims),
        "loss": _targets(dims, setup),
        "buffers": _bucket(setup) + _gathered(dims, setup, during="backward"),
    }


def _bucket(setup: Setup) -> float:
    """Stages 1 and 2 make it at the first gradient of a micro-batch, in full."""
    fresh = setup.zero_stage == 2 or (setup.zero_stage == 1 and setup.accumulation_steps == 1)
    return setup.weight_bytes * setup.reduce_bucket_size if fresh else 0


def _backward_of_block(dims: Dims, setup: Setup) -> Terms:
    """Of the block where most is there: one of the last, or the last of those made again."""
    s, width = setup.weight_bytes, dims.embed_dim
    head = s * dims.head if setup.zero_stage < 2 and setup.accumulation_steps == 1 else 0
    return {
        "activations": max(
            activations(dims, setup, blocks=index + 1) + in_work(dims, setup, index=index)
            for index in range(dims.depth)
        ),
        "gradients": head + s * width * dims.mlp_hidden,
        "loss": _targets(dims, setup),
        "buffers": _bucket(setup) + _gathered(dims, setup, during="backward"),
    }


def _first_reduction(dims: Dims, setup: Setup) -> Terms:
    """Stages 2 and 3 sum a full bucket over ranks in the middle of the backward."""
    if setup.zero_stage < 2 or dims.parameters <= setup.reduce_bucket_size:
        return {}
    done = max(0, setup.reduce_bucket_size - dims.head) / dims.block  # blocks, when it is full
    index = max(0, dims.depth - 1 - int(done))
    working: float = 0  # at stage 2 a block is on its way; stage 3 waits for its end
    if setup.zero_stage == 2:
        left = 1 - done % 1
        tokens = setup.micro_batch_size * dims.tokens
        working = in_work(dims, setup, index=index)
        working += left * tokens * kept_by_block(dims, setup, index=index)
    return {
        "activations": activations(dims, setup, blocks=index) + working,
        "gradients": _own_gradients(dims, setup) if setup.zero_stage == 2 else 0,
        "loss": _targets(dims, setup),
        "buffers": _bucket(setup)
        + _reduction(dims, setup)
        + _gathered(dims, setup, during="backward"),
    }


def _reduction(dims: Dims, setup: Setup) -> float:
    """Copies of a bucket while it is summed over ranks."""
    s, c, ranks = setup.weight_bytes, setup.communication_bytes, setup.world_size
    fill = min(dims.parameters, setup.reduce_bucket_size)
    if setup.zero_stage == 3:  # reordered by rank; gloo makes another copy of it
        return c * fill * (1 if setup.on_gpu else 2)
    # Laid end to end again where the parts of several ranks, or of several tensors, are in it.
    several = ranks > 1 or (setup.zero_stage == 2 and setup.sums_in_fp32)
    return fill * ((s if several else 0) + (c if c != s else 0))


def _last_reduction(dims: Dims, setup: Setup) -> Terms:
    """Stage 0 lays all gradients end to end, stage 1 begins with its buckets, 2 and 3 end."""
    s, c, weights = setup.weight_bytes, setup.communication_bytes, dims.parameters
    stage, fill = setup.zero_stage, min(dims.parameters, setup.reduce_bucket_size)
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
        "activations": activations(dims, setup, blocks=0),
        "gradients": gradients,
        "loss": _targets(dims, setup),
        "buffers": buffers,
    }


def _optimizer_step(dims: Dims, setup: Setup) -> Terms:
    """The summed gradients, and those of one group in float32; the fused AdamW needs no more."""
    stage = setup.zero_stage
    if setup.offload_optimizer:
        own = _own_gradients(dims, setup) if stage < 3 else 0
        return {"gradients": own, "buffers": _second_copies(dims, setup)}
    if stage == 0:
        return {"gradients": dims.parameters * (2 + FP32 if setup.bf16 else FP32)}
    return {
        "gradients": max(_group_step(dims, setup, group=g) for g in range(len(dims.groups))),
        "buffers": _second_copies(dims, setup),
    }


def _group_step(dims: Dims, setup: Setup, *, group: int) -> float:
    """The step of one group of parameters, at stages 1 to 3; groups step one after the other."""
    parts = [scalars / setup.world_size for scalars, _ in dims.groups]
    copied = _copied(parts[group], setup, tensors=dims.groups[group][1])
    own: float = 0  # stage 3 keeps them anyway
    if setup.zero_stage == 2 and setup.sums_in_fp32:
        own = FP32 * sum(parts[group:])  # a buffer for each group
    elif setup.zero_stage < 3 and not (copied and group == len(parts) - 1):
        own = _own_gradients(dims, setup)  # one buffer, which the last copy frees
    return own + copied


def _copied(part: float, setup: Setup, *, tensors: int) -> float:
    """Gradients of a group's part laid end to end in float32, where they are not already so."""
    as_they_are = setup.sums_in_fp32 or not setup.bf16
    in_place = setup.sums_in_fp32 if setup.zero_stage == 2 else as_they_are and tensors == 1
    return 0 if in_place else FP32 * part
