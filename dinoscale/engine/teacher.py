"""The teacher: a float32 EMA of the student, sharded like the student's master weights.

    theta_T <- m theta_T + (1 - m) theta_S          (Caron et al. 2021, algorithm 1)

Each rank averages its own shard, without communication. What the forward needs is derived, see
`frozen/weights.py`. Bytes per rank, with P parameters of s bytes in the compute dtype on W ranks:
4 P / W + s P at stages 0-2, where P counts what trains (the student's forward has the rest), and
(4 + s) P / W plus the layers in flight at stage 3 (each parameter or
group padded to W parts), and s P / zero_hpz_partition_size from the first forward of a step to its
end, where hpZ keeps a second copy per node.

An EMA in bf16 would not move: (1 - m)(s - t) is below half a bf16 ulp of t for m near 1.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinoscale.config.resolve import RunPlan
from dinoscale.config.schema import RunConfig
from dinoscale.engine.ds_config import teacher_config
from dinoscale.engine.frozen.anchor import anchor_targets
from dinoscale.engine.frozen.features import FeatureTeacher
from dinoscale.engine.frozen.gram import GramNetwork
from dinoscale.engine.frozen.network import FrozenBackbone
from dinoscale.engine.frozen.seen import Projected, Seen
from dinoscale.engine.frozen.stored import StoredFeatures, StoredHeads
from dinoscale.engine.frozen.teacher import FrozenTeacher
from dinoscale.engine.frozen.weights import Partitioned, Replicated
from dinoscale.engine.gradients import compute_device
from dinoscale.engine.micro_batch import MicroBatch, Targets
from dinoscale.engine.shards import empty_shards
from dinoscale.engine.student import Student
from dinoscale.losses.centering import ROWS, teacher_probs, updated_center
from dinoscale.losses.ibot import PatchTargets
from dinoscale.losses.sinkhorn import sinkhorn_center
from dinoscale.models.heads import prototype_logits
from dinoscale.models.network import DinoNetwork
from dinoscale.runtime import distributed
from dinoscale.runtime.float32 import tensor_cores

Frozen = FrozenTeacher[Any] | StoredHeads | StoredFeatures


class _ClassTokens(Seen):
    """Those of a forward, before the heads."""

    tokens: Tensor  # (N, D) float32

    def of_class_tokens(self, tokens: Tensor) -> None:
        """Keep them."""
        self.tokens = tokens.float()


@dataclass
class _Sums:
    """Over the targets of this rank's micro-batches of a step, for one kind of token.

    Attributes:
        logits: (K,), for the center.
        targets: (K,), for the collapse monitor.
        rows: how many there were.
    """

    logits: Tensor
    targets: Tensor
    rows: int = 0

    @classmethod
    def like(cls, center: Tensor) -> "_Sums":
        return cls(torch.zeros_like(center), torch.zeros_like(center))


class Teacher:
    """The EMA network, its centers, and the targets it gives.

    Both target rules are p = softmax((z - c) / temp). With centering, c is a moving average of the
    outputs of earlier steps; with Sinkhorn-Knopp it follows from the outputs of this step.

    Attributes:
        ema: float32 views of the average, one (numel,) view per fragment of `student.layout`.
        deepspeed_config: DeepSpeed's configuration at stage 3; None at stages 0-2, which use none.
        center: c of the class tokens, (K,) float32, equal on all ranks; empty without heads.
        patch_center: c of the masked patches, likewise; None without a patch loss.
        gram: the network whose patches anchor the student's; None without a Gram loss.
        anchor: the network as the run began; None without an anchor.
        frozen: the network of another run that gives the targets, or features to follow; None where
            the average alone teaches.
        mean_target: (K,) float32, mean of all class targets of the last step, equal on all ranks;
            None without heads.
        mean_patch_target: the same of the patch targets; None without a patch loss.
    """

    def __init__(
        self,
        network: DinoNetwork,
        student: Student,
        config: RunConfig,
        plan: RunPlan,
        gram: GramNetwork | None = None,
        anchor: FrozenBackbone | None = None,
        frozen: Frozen | None = None,
    ) -> None:
        """Start as a copy of the student.

        Args:
            network: of the student's architecture, on any device; its values are not used.
            student: gives the layout and the initial weights.
            config: of the run.
            plan: of the run.
            gram: an earlier teacher, which the average refreshes.
            anchor: the network as the run began, which nothing changes.
            frozen: the network of another run, which gives the targets, or features to follow; or
                what is stored of it.
        """
        self.gram, self.anchor, self.frozen = gram, anchor, frozen
        self._features: FeatureTeacher | StoredFeatures | None = None
        self._heads: FrozenTeacher[Any] | StoredHeads | None = None
        if isinstance(frozen, FeatureTeacher | StoredFeatures):
            self._features = frozen
        else:
            self._heads = frozen
        # A rank without a fragment has shards all the same, on the student's device.
        students = (*student.flats, *student.master)
        device = students[0].device if students else compute_device()
        self.layout = student.layout
        self._shards = empty_shards(self.layout, device=device)
        self.ema = [fragment.of(self._shards) for fragment in self.layout.fragments]
        self._averages = self._shards if student.flats else self.ema
        torch._foreach_copy_(self.ema, student.master)
        self._center_momentum = config.dino.center_momentum
        self._has_heads = config.has_heads
        self._sinkhorn = config.dino.targets == "sinkhorn_knopp" and self._has_heads
        prototypes = config.head.num_prototypes if self._has_heads else 0
        self.center = torch.zeros(prototypes, device=compute_device())
        # Until the first update.
        self.mean_target = torch.zeros_like(self.center) if self._has_heads else None
        self.patch_center = self.mean_patch_target = None
        if config.ibot.loss_weight:
            head = config.patch_head or config.head
            self.patch_center = torch.zeros(head.num_prototypes, device=compute_device())
            self.mean_patch_target = torch.zeros_like(self.patch_center)
        self._seen: deque[Seen] = deque()
        self._reset_sums()
        network.requires_grad_(False)
        self.deepspeed_config: dict[str, Any] | None = None
        self._weights: Partitioned[DinoNetwork] | Replicated[DinoNetwork]
        if config.engine.zero_stage == 3:
            self.deepspeed_config = teacher_config(config, plan)
            self._weights = Partitioned(
                network, self.layout, student.compute_dtype, self.deepspeed_config
            )
        else:
            self._weights = Replicated(
                network, self.layout, student.compute_dtype, shared=student.frozen.parameters
            )
        self._compute_dtype = student.compute_dtype
        for name, buffer in self.buffers().items():
            buffer.copy_(student.buffers()[name])
        self._weights.publish(self._shards)

    @torch.no_grad()
    def begin(self, micro_batches: Iterable[MicroBatch], *, temp: float) -> None:
        """Begin a step; Sinkhorn-Knopp sees all its global crops first, on all ranks.

        Args:
            micro_batches: of this rank; with Sinkhorn-Knopp a sequence, read one by one.
            temp: the teacher's temperature.
        """
        self._buffers_before = [value.clone() for value in self.buffers().values()]
        self._seen.clear()
        if not self._sinkhorn:
            return
        # By index: iterating over them would free the last one, which is the first one again if
        # there is no other.
        assert isinstance(micro_batches, Sequence)
        for index in range(len(micro_batches)):
            earlier = self._seen[0] if self._seen else None
            self._seen.append(self._look(micro_batches[index], earlier))
        self.center = _sinkhorn_center([seen.classes for seen in self._seen], temp)
        if self.patch_center is not None:
            patches = [seen.patches for seen in self._seen if seen.patches is not None]
            self.patch_center = _sinkhorn_center(patches, temp)

    @torch.no_grad()
    def targets(self, batch: MicroBatch, *, temp: float, gram_counts: bool) -> Targets:
        """Targets of the next micro-batch of a step, in order.

        Args:
            batch: the micro-batch.
            temp: the teacher's temperature.
            gram_counts: run the Gram network, too; the same on all ranks.
        """
        probs, patches = self._outputs(batch, temp=temp)
        gram = self.gram.features(batch) if self.gram is not None and gram_counts else None
        anchor = None if self.anchor is None else anchor_targets(self.anchor, batch)
        features = None if self._features is None else self._features.targets(batch)
        return Targets(probs, patches, gram, anchor, features)

    def _outputs(self, batch: MicroBatch, *, temp: float) -> tuple[Tensor, PatchTargets | None]:
        """Targets of the heads: of class tokens (2, B, K), and of masked patches."""
        views, images = batch.global_crops.shape[:2]
        if not self._has_heads:
            if self.buffers():  # statistics of batch norm follow the images
                self._look(batch)
            return self.center.new_empty(views, images, 0), None
        seen = self._seen.popleft() if self._sinkhorn else self._look(batch)
        with tensor_cores(self._compute_dtype, batch.global_crops.device):
            probs = prototype_logits(*seen.classes)  # (2B, K): logits, overwritten below
        for rows in probs.split(ROWS):
            if not self._sinkhorn:
                self._class_sums.logits += rows.sum(0)
            rows.copy_(teacher_probs(rows, self.center, temp=temp))
            self._class_sums.targets += rows.sum(0)
        self._class_sums.rows += views * images
        patches = None
        if seen.patches is not None:
            assert self.patch_center is not None
            if not self._sinkhorn:
                total = seen.patches.units.sum(0, keepdim=True)
                self._patch_sums.logits += prototype_logits(total, *seen.patches[1:])[0]
            self._patch_sums.rows += len(seen.patches.units)
            units, weight_v, weight_g, plain = seen.patches
            patches = PatchTargets(
                units, weight_v, weight_g, center=self.patch_center, temp=temp, plain=plain
            )
        return probs.view(views, images, -1), patches

    def count_patch_targets(self, target_sum: Tensor | None) -> None:
        """Add the sum (K,) of a micro-batch's patch targets, which only the loss computes."""
        if target_sum is not None:
            self._patch_sums.targets += target_sum

    def _look(self, batch: MicroBatch, earlier: Seen | None = None) -> Seen:
        """What the network whose heads give the targets makes of a micro-batch."""
        frozen = self._heads
        gathered = isinstance(self._weights, Partitioned) and not isinstance(frozen, StoredHeads)
        seen = Seen(copies=gathered, earlier=earlier)
        if frozen is not None:
            frozen.look(batch, seen)
        if frozen is None or self.buffers():
            # Not asked, its statistics of batch norm follow the images all the same.
            images = batch.global_crops.flatten(0, 1).to(self._compute_dtype)
            rows = None if batch.masks is None else batch.masks.rows
            own = seen if frozen is None else Seen(copies=False)
            with tensor_cores(self._compute_dtype, images.device):
                self._weights.forward([images], None, own, None, rows)
        return seen

    @torch.no_grad()
    def update(self, student: Student, *, step: int, momentum: float, skipped: Tensor) -> None:
        """Average the student, move the centers, refresh the weights of the forward.

        Once per optimizer step, after the student's. The center averages the logits of all
        micro-batches and ranks of the step, so it takes effect from the next step on; that of the
        patches averages the means of the ranks, as the authors' code does.

        Args:
            student: after its step.
            step: zero-based optimizer step.
            momentum: weight of the old average, 0 to 1.
            skipped: whether the step was skipped, () bool. The teacher then stays as it was before
                the step's targets; the device decides, and the host launches the same work.
        """
        weight = ~skipped * (1.0 - momentum)  # () float32: 0 leaves the average as it is
        masters = student.flats or student.master
        if masters:
            weights = [weight.to(masters[0].device)] * len(masters)
            torch._foreach_lerp_(self._averages, masters, weights)
        self._move_centers(skipped)
        self._reset_sums()
        for value, before in zip(self.buffers().values(), self._buffers_before, strict=True):
            value.copy_(torch.where(skipped, before, value))
        if self.gram is not None:
            self.gram.update(step, self.ema)
        self._weights.publish(self._shards)  # last: no other collective queues behind it

    def _move_centers(self, skipped: Tensor) -> None:
        """Centers and mean targets of the step, with one collective."""
        if self.mean_target is None:
            return
        classes, patches = self._class_sums, self._patch_sums
        sums = [classes.logits, classes.targets]
        if self.patch_center is not None:
            any_rows = float(patches.rows > 0)
            sums += [
                patches.logits / max(patches.rows, 1),  # the mean over this rank
                patches.targets,
                torch.full_like(patches.logits[:1], any_rows),
                torch.full_like(patches.logits[:1], float(patches.rows)),
            ]
        total = distributed.all_reduce_sum(torch.cat(sums)).split([len(part) for part in sums])
        rows = classes.rows * distributed.world_size()  # equal micro-batches on all ranks
        mean_target = total[1] / rows
        self.mean_target = torch.where(skipped, self.mean_target, mean_target)
        if not self._sinkhorn:
            self.center = self._moved(self.center, total[0] / rows, skipped)
        if self.patch_center is None or self.mean_patch_target is None:
            return
        mean, target_sum, ranks, patch_rows = total[2:]
        self.mean_patch_target = torch.where(
            skipped, self.mean_patch_target, target_sum / patch_rows.clamp(min=1)
        )
        if not self._sinkhorn:
            unmoved = skipped | (ranks[0] == 0)
            self.patch_center = self._moved(self.patch_center, mean / ranks.clamp(min=1), unmoved)

    def _moved(self, center: Tensor, mean_logit: Tensor, unmoved: Tensor) -> Tensor:
        moved = updated_center(center, mean_logit, momentum=self._center_momentum)
        return torch.where(unmoved, center, moved)

    def _reset_sums(self) -> None:
        self._class_sums = _Sums.like(self.center)
        patch_center = self.center[:0] if self.patch_center is None else self.patch_center
        self._patch_sums = _Sums.like(patch_center)

    def centers(self) -> dict[str, Tensor]:
        """What centering averages over steps, by its name in a checkpoint; equal on all ranks."""
        if self._sinkhorn or not self._has_heads:
            return {}
        named = {"center": self.center, "patch_center": self.patch_center}
        return {name: center for name, center in named.items() if center is not None}

    def restore(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Set the average from full tensors; the caller sets center and buffers.

        Collective.

        Args:
            read: (parameter name, first element, count) -> (count,) float32.

        Raises:
            DinoscaleError: on every rank, if `read` raises it on one.
        """

        def set_all() -> None:
            for fragment, view in zip(self.layout.fragments, self.ema, strict=True):
                view.copy_(read(fragment.name, fragment.start, fragment.numel))

        distributed.together(set_all)
        self._weights.publish(self._shards)

    @torch.no_grad()
    def class_tokens(self, images: Tensor) -> Tensor:
        """Class tokens (N, D) float32 of images (N, C, H, W), by the forward of a step; collective.

        No rank gets a copy of all weights, and buffers keep their values. The heads run, too: at
        stage 3 DeepSpeed expects the same layers in every forward.
        """
        before = [value.clone() for value in self.buffers().values()]
        pixels, seen = images.to(compute_device(), self._compute_dtype), _ClassTokens(copies=False)
        rows = None if self.patch_center is None else pixels.new_zeros(1, dtype=torch.int64)
        with tensor_cores(self._compute_dtype, pixels.device):
            self._weights.forward([pixels], None, seen, None, rows)
        for value, old in zip(self.buffers().values(), before, strict=True):
            value.copy_(old)
        return seen.tokens

    def plain_network(self) -> DinoNetwork:
        """The teacher as an ordinary network in the compute dtype; collective."""
        return self._weights.plain(lambda network: network)

    def plain_backbone(self) -> nn.Module:
        """Its backbone alone, likewise, for evaluation; errors as of `Partitioned.plain`."""
        return self._weights.plain(lambda network: network.backbone)

    def buffers(self) -> dict[str, Tensor]:
        """Buffers of the network (batch norm statistics); empty for a ViT."""
        return self._weights.buffers

    def wait(self) -> None:
        """Wait for the all-gather that `update` began; call it before a rank leaves."""
        self._weights.wait()

    def num_bytes(self) -> int:
        """Bytes this rank holds: float32 shard, weights for the forward, and frozen networks."""
        frozen = (None if self.gram is None else self.gram.backbone, self.anchor, self.frozen)
        shards = sum(4 * size for size in self.layout.shard_sizes)
        return shards + self._weights.num_bytes() + sum(n.num_bytes() for n in frozen if n)


def _sinkhorn_center(seen: Iterable[Projected], temp: float) -> Tensor:
    """C of all micro-batches and ranks, (K,) float32."""
    projected = list(seen)
    return sinkhorn_center(
        [some.units for some in projected],
        *projected[0][1:],
        temp=temp,
        sum_over_ranks=distributed.all_reduce_sum,
        max_over_ranks=distributed.all_reduce_max,
    )
