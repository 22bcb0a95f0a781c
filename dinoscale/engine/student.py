"""The student: a network under DeepSpeed ZeRO, seen as float32 shards with names.

No DeepSpeed name leaves this module, teacher.py and ds_config.py.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinoscale.config.resolve import RunPlan
from dinoscale.config.schema import RunConfig
from dinoscale.data.augmentation.masks import Masks
from dinoscale.engine import shards
from dinoscale.engine.ds_config import student_config
from dinoscale.engine.frozen.parameters import FrozenParameters
from dinoscale.engine.gradients import GradientRule, compute_device
from dinoscale.engine.param_groups import (
    MOMENTS,
    NO_DECAY,
    PROTOTYPES,
    LayerwiseAdamW,
    build_optimizer,
    rate_factors,
)
from dinoscale.engine.schedules import StepValues
from dinoscale.engine.shards import Fragment
from dinoscale.models.block import Block
from dinoscale.models.network import Objective
from dinoscale.runtime import distributed
from dinoscale.runtime.float32 import tensor_cores


def import_deepspeed() -> Any:
    """Import DeepSpeed without compiling an operator that training never calls."""
    # Renamed in torch 2.13; DeepSpeed still calls the old names, on every rank.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{name}", category=FutureWarning)
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # only for CPU inference
    _import_muon()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo",
            dist_init_required=False,
            auto_mpi_discovery=False,
            verbose=False,
        )
    return deepspeed


def _import_muon() -> None:
    """Import DeepSpeed's Muon quickly; DeepSpeed imports it to check the optimizer's type.

    Importing it calls torch.compile, which loads all of Inductor; training never calls Muon.
    """
    disabled = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torch.compile then returns the function unchanged
    try:
        with contextlib.suppress(ImportError):  # optional in DeepSpeed, too
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if disabled is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = disabled


def gather_whole_blocks(*networks: nn.Module) -> None:
    """At stage 3, gather and release each transformer block as a whole, not layer by layer."""
    import_deepspeed()
    from deepspeed.utils import set_z3_leaf_modules

    for network in networks:
        if any(isinstance(module, Block) for module in network.modules()):
            set_z3_leaf_modules(network, [Block])


def materialize(
    network: nn.Module, dtype: torch.dtype, *, zero3_config: Mapping[str, Any] | None = None
) -> None:
    """Allocate a network on the device that it runs on, its weights in `dtype`, uninitialized.

    Args:
        network: on any device.
        dtype: of its parameters; buffers keep theirs.
        zero3_config: DeepSpeed's configuration at stage 3: each parameter is partitioned, and this
            rank keeps its shard, before the next one is allocated. DeepSpeed alone would partition
            a network that is already whole in memory. Collective.
    """
    for name, buffer in network.named_buffers():
        owner, _, own_name = name.rpartition(".")
        setattr(network.get_submodule(owner), own_name, _allocate(buffer, buffer.dtype))
    parameters = _allocated(network, dtype)
    if zero3_config is None:
        for _ in parameters:
            pass
        return
    deepspeed, first = import_deepspeed(), next(parameters)
    deepspeed.zero.Init(
        module=nn.ParameterList([first]),
        config_dict_or_path=zero3_config,
        dtype=dtype,
        zero_param_parallel_group=deepspeed.utils.groups._get_zero_param_intra_parallel_group(),
    )
    first.convert_to_zero_parameters(param_list=parameters)


def _allocated(network: nn.Module, dtype: torch.dtype) -> Iterator[Any]:
    """Allocate the parameters one by one, and yield each."""
    for module in network.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            parameter = nn.Parameter(_allocate(old, dtype), requires_grad=old.requires_grad)
            setattr(module, name, parameter)
            yield parameter


def _allocate(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(like, dtype=dtype, device=compute_device())


class Student:
    """A trained network whose float32 master weights are sharded over ranks.

    Attributes:
        deepspeed_config: DeepSpeed's configuration, with every value that can change a number.
        layout: this rank's fragments of what trains; the teacher and checkpoints use the same.
        frozen: what does not train; nothing at stage 3.
        shapes: parameter name -> full shape.
        master: float32 views of the master weights, one (numel,) view per fragment.
        flats: at stages 1-3 the optimizer's flat master shards, one per group; empty at stage 0.
        compute_dtype: dtype of the weights that the forward uses.
    """

    def __init__(
        self,
        network: nn.Module,
        config: RunConfig,
        plan: RunPlan,
        initial: Iterable[tuple[str, Tensor]] | None = None,
    ) -> None:
        """Shard `network`, and set master weights and buffers to the initial values.

        Args:
            network: on the meta device if `initial` is given.
            config: of the run.
            plan: of the run.
            initial: name and value (float32, CPU) of each parameter and buffer, equal on all ranks,
                read one at a time; None takes the values of `network`.
        """
        if initial is None:
            initial = {
                k: value.detach().clone() for k, value in network.state_dict().items()
            }.items()
        self.shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
        self.compute_dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        self._stage = config.engine.zero_stage
        self.deepspeed_config = student_config(config, plan)
        zero3_config = self.deepspeed_config if self._stage == 3 else None
        materialize(network, self.compute_dtype, zero3_config=zero3_config)
        self._moments = MOMENTS[config.optim.name]
        self._offloaded = config.engine.offload_optimizer
        self._frozen_by_rate = config.dino.freeze_last_layer_by == "zero_rate"
        self._rule = GradientRule(
            clip=config.optim.clip_grad,
            mode=config.optim.clip_mode,
            sharded=self._stage > 0,
        )
        names = shards.parameter_names(network)
        optim = config.optim
        self._rate_factors = rate_factors(
            names.values(),
            layer_decay=optim.layer_decay,
            patch_embed_lr=optim.patch_embed_lr,
            backbone_lr=optim.backbone_lr,
        )
        layerwise = any(factor != 1 for factor in self._rate_factors.values())
        self._torch_optimizer = build_optimizer(
            optim.name, network, betas=optim.betas, layerwise=layerwise
        )
        self._rule.attach(self._torch_optimizer)
        self._group_of = {
            names[id(parameter)]: group["name"]
            for group in self._torch_optimizer.param_groups
            for parameter in group["params"]
        }
        self._engine, *_ = import_deepspeed().initialize(
            model=network,
            optimizer=self._torch_optimizer,
            config=self.deepspeed_config,
            dist_init_required=False,
        )
        self._zero = self._engine.optimizer
        self._skip_host_checks()
        self._buffers = dict(self.network.named_buffers())
        self.frozen = FrozenParameters(self.network)
        self._find_shards(names)
        self._load_initial(initial)
        self._rule.arm()

    @property
    def network(self) -> Any:
        """The network inside the DeepSpeed engine; its weights may be partitioned."""
        return self._engine.module

    def __call__(
        self,
        crops: Sequence[Tensor],
        keep: Tensor | None,
        objective: Objective,
        masks: Masks | None = None,
        coordinates: Tensor | None = None,
    ) -> Tensor:
        """Compute the objective of all crops in one engine forward, scalar float32.

        Args:
            crops: normalised images, (N_i, C, H_i, W_i), one tensor per resolution.
            keep: stochastic depth multipliers (depth, 2, sum of N_i) float32, or None.
            objective: maps what the network computes to the scalar.
            masks: patches of the first resolution's images that the network does not see.
            coordinates: changes of rotary coordinates (resolutions, depth, 5), or None.
        """
        pixels = [crop.to(self.compute_dtype) for crop in crops]
        hidden = (None, None) if masks is None else (masks.masks, masks.rows)
        with tensor_cores(self.compute_dtype, crops[0].device):
            loss: Tensor = distributed.guarded(
                lambda: self._engine(pixels, keep, objective, *hidden, coordinates)
            )
        return loss

    def set_hyperparameters(self, now: StepValues) -> None:
        """Begin a step: set learning rate, weight decay and frozen prototypes in the optimizer."""
        self._buffers_before = [value.clone() for value in self._buffers.values()]
        for group in self._torch_optimizer.param_groups:
            group["lr"] = now.lr
            group["weight_decay"] = 0.0 if group["name"] == NO_DECAY else now.weight_decay
            frozen = group["name"] == PROTOTYPES and now.prototypes_frozen
            group["frozen"] = frozen and not self._frozen_by_rate
            if frozen and self._frozen_by_rate:
                group["lr"] = 0.0  # moments and step counts move, as in DINOv2

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's mean loss; the step averages them."""
        distributed.guarded(lambda: self._engine.backward(loss))

    def accumulate(self) -> None:
        """End a micro-batch that is not the last one of the step."""
        distributed.guarded(self._engine.step)

    def step(self, *, non_finite: Tensor) -> Tensor:
        """End the last micro-batch of the step: clip the gradients and update the weights.

        The host reads nothing from the device, with two exceptions of DeepSpeed's: offloaded
        optimizer states, and at stage 3 on a GPU a wait for the end of each backward pass.

        Args:
            non_finite: whether the loss is not finite, so that the step is skipped, () bool.

        Returns:
            Whether the step was skipped, for `non_finite` or a non-finite gradient, () bool.
            Weights, moments and buffers then keep their values, on all ranks.
        """
        assert self._engine.is_gradient_accumulation_boundary()
        self._rule.measure(self._gradients(), non_finite=non_finite)
        distributed.guarded(self._engine.step)
        skipped = self._rule.skipped
        for value, before in zip(self._buffers.values(), self._buffers_before, strict=True):
            value.copy_(torch.where(skipped, before, value))
        return skipped

    def grad_norm(self) -> Tensor:
        """Global gradient norm of the last step before clipping, scalar."""
        return self._rule.global_norm()

    def grad_norms(self) -> dict[str, float]:
        """Norm of each tensor's gradient of the last step, before clipping."""
        norms = self._rule.squared_norms.sqrt().tolist()
        return dict(zip(self._rule.names, norms, strict=True))

    def network_grad_norms(self) -> dict[str, float]:
        """Gradient norms of backbone and heads in the last step, before clipping, by name."""
        norms = self._rule.network_norms().tolist()
        return dict(zip(self._rule.networks, norms, strict=True))

    @torch.no_grad()
    def _load_initial(self, initial: Iterable[tuple[str, Tensor]]) -> None:
        held: dict[str, list[Fragment]] = {}
        for part in self._held:
            held.setdefault(part.name, []).append(part)
        for name, value in initial:
            if name in self._buffers:
                self._buffers[name].copy_(value)
            if name in self.frozen:
                self.frozen.set(name, value)
            for part in held.get(name, ()):
                self._master_of(part).copy_(value.flatten().narrow(0, part.start, part.numel))
            del value  # before the next one is made
        self._refresh_forward_weights()

    def _master_of(self, part: Fragment) -> Tensor:
        tensor, start = self._optimizer_tensor(part)
        return tensor.view(-1).narrow(0, start, part.numel)

    @torch.no_grad()
    def restore_master(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Set the master weights and the weights of the forward from full tensors; collective.

        Args:
            read: (parameter name, first element, count) -> (count,) float32.

        Raises:
            DinoscaleError: on every rank, if `read` raises it on one.
        """

        def set_all() -> None:
            for part in self._held:
                self._master_of(part).copy_(read(part.name, part.start, part.numel))

        distributed.together(set_all)  # no rank may wait for one that could not read
        self.frozen.restore(read)
        self._refresh_forward_weights()

    def optimizer_state(self) -> dict[str, list[Tensor | None]]:
        """Moment name -> one (numel,) view per fragment; None before its first step."""
        views: dict[str, list[Tensor | None]] = {name: [] for name in self._moments}
        for fragment in self.layout.fragments:
            tensor, start = self._optimizer_tensor(fragment)
            state = self._torch_optimizer.state.get(tensor, {})
            for name in self._moments:
                whole = state.get(name)
                views[name].append(
                    None if whole is None else whole.view(-1).narrow(0, start, fragment.numel)
                )
        return views

    def optimizer_steps(self) -> dict[str, int]:
        """Optimizer group -> steps taken so far; a step in which it was frozen does not count."""
        steps = {}
        for fragment in self.layout.fragments:
            state = self._torch_optimizer.state.get(self._optimizer_tensor(fragment)[0], {})
            steps[self._group_of[fragment.name]] = int(state.get("step", bool(state)))
        return steps

    def restore_optimizer(
        self, read: Callable[[str, str, int, int], Tensor], steps: Mapping[str, int]
    ) -> None:
        """Set moments and step counts; a group with 0 steps gets no state.

        Args:
            read: (moment name, parameter name, first element, count) -> (count,) float32.
            steps: optimizer group -> steps taken.
        """
        for held in self._held:
            count = steps[self._group_of[held.name]]
            tensor, start = self._optimizer_tensor(held)
            if not count:
                self._torch_optimizer.state.pop(tensor, None)
                continue
            state = self._torch_optimizer.state[tensor]
            for name in self._moments:
                if name not in state:
                    state[name] = torch.zeros_like(tensor, requires_grad=False)
                part = state[name].view(-1).narrow(0, start, held.numel)
                part.copy_(read(name, held.name, held.start, held.numel))
            if "exp_avg" in self._moments:
                on_device = tensor.device if torch.cuda.is_available() else "cpu"
                state["step"] = torch.tensor(float(count), device=on_device)

    def buffers(self) -> dict[str, Tensor]:
        """Buffers of the network (batch norm statistics); empty for a ViT."""
        return self._buffers

    def _skip_host_checks(self) -> None:
        """Keep DeepSpeed's optimizers from reading gradient norms on the host.

        `gradients.py` has checked them. Settings do this at stages 1 and 2 (ds_config.py); stage 3
        reads the norm of its groups' norms, here a constant; stage 0 in bf16 reads every tensor.
        """
        if self._stage == 3 and not self._offloaded:
            self._zero._get_norm_groups = lambda: [1.0]
        elif self._stage == 0 and self.compute_dtype is not torch.float32:
            self._zero.step = self._step_unsharded

    @torch.no_grad()
    def _step_unsharded(self) -> None:
        groups = list(zip(self._zero.fp32_groups, self._zero.fp16_groups, strict=True))
        for high, low in groups:
            for master, weight in zip(high, low, strict=True):
                master.grad = weight.grad.float()
        self._torch_optimizer.step()
        for high, low in groups:
            torch._foreach_copy_(low, high)
            for master in high:
                master.grad = None

    def _gradients(self) -> list[Tensor]:
        """Reduced gradients of this rank's shards, one for each piece that the rule watches."""
        if self._stage == 0:
            return [parameter.grad for parameter in self._parameters]
        found: list[Tensor] = []
        if self._offloaded and torch.cuda.is_available():
            torch.cuda.synchronize()  # gradients are still being copied to host memory
        for index, flat in enumerate(self.flats):
            fragments = (f for f in self.layout.fragments if f.group == index)
            if self._offloaded:
                assert flat.grad is not None
                found += [flat.grad.narrow(0, f.offset, f.numel) for f in fragments]
                continue
            parts, offset = {}, 0
            for part in self._zero.averaged_gradients[index]:
                parts[offset] = part.view(-1)
                offset += part.numel()
            found += [parts[f.offset].narrow(0, 0, f.numel) for f in fragments]  # without padding
        return found

    def close(self) -> None:
        """Remove DeepSpeed's hooks, which would keep unused weights in memory."""
        self._engine.destroy()

    def _find_shards(self, names: dict[int, str]) -> None:
        """Read the layout and the master views; register the tensors with the gradient rule."""
        self.flats: list[Tensor] = []
        if self._stage == 0:
            groups, self._tensors = self._unsharded_groups(names)
            self.layout = shards.end_to_end(groups, distributed.world_size())
            self._held = [
                Fragment(place.name, place.shape, place.group, 0, place.numel, place.offset)
                for place in self.layout.placements
            ]
            parameters = dict(self.network.named_parameters())
            self._parameters = [parameters[held.name] for held in self._held]
            for name, tensor in self._tensors.items():
                self._watch(tensor, [name], [(name, 0, tensor.numel())])
        else:
            if self._stage == 3:
                self.flats = self._zero.fp32_partitioned_groups_flat
                self.layout = shards.of_partitioned_optimizer(self._zero, names, distributed.rank())
                members = self._zero.fp16_groups
            else:
                self.flats = self._zero.single_partition_of_fp32_groups
                self.layout = shards.of_flat_optimizer(self._zero, names)
                members = self._zero.bit16_groups
            for index, flat in enumerate(self.flats):
                here = [f for f in self.layout.fragments if f.group == index]
                pieces = [(f.name, f.offset, f.numel) for f in here]
                self._watch(flat, [names[id(p)] for p in members[index]], pieces)
            self._held = list(self.layout.fragments)
        self.master = []
        for fragment in self.layout.fragments:
            tensor, start = self._optimizer_tensor(fragment)
            self.master.append(tensor.detach().view(-1).narrow(0, start, fragment.numel))

    def _watch(
        self, tensor: Tensor, names: Sequence[str], pieces: Sequence[tuple[str, int, int]]
    ) -> None:
        """Register a tensor of the optimizer and its pieces, as `GradientRule.watch` takes them."""
        self._rule.watch(tensor, names, pieces)
        if isinstance(self._torch_optimizer, LayerwiseAdamW):
            factors = self._rate_factors
            parts = [(factors[name], start, numel) for name, start, numel in pieces]
            self._torch_optimizer.set_factors(tensor, parts)

    def _unsharded_groups(
        self, names: dict[int, str]
    ) -> tuple[list[list[tuple[str, Tensor]]], dict[str, Tensor]]:
        """Stage 0: the optimizer's float32 tensors, by group and by name."""
        low = getattr(
            self._zero, "fp16_groups", None
        )  # bf16 keeps the master apart from the network
        groups = []
        for index, group in enumerate(self._torch_optimizer.param_groups):
            of_network = group["params"] if low is None else low[index]
            labels = [names[id(parameter)] for parameter in of_network]
            groups.append(list(zip(labels, group["params"], strict=True)))
        return groups, {name: tensor for group in groups for name, tensor in group}

    def _optimizer_tensor(self, fragment: Fragment) -> tuple[Tensor, int]:
        """The optimizer's tensor that holds a fragment, and the fragment's first element in it."""
        if self._stage == 0:
            return self._tensors[fragment.name], fragment.start
        return self.flats[fragment.group], fragment.offset

    def _refresh_forward_weights(self) -> None:
        """Copy the master weights to the weights of the forward, as the end of a step does."""
        if self._stage == 3:
            for index in range(len(self.flats)):
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
            self._zero.invalidate_secondary_tensor()  # hpZ's copy of the old weights
        elif self._stage > 0:
            self._zero.update_lp_params()
        elif self.compute_dtype is not torch.float32:
            for high, low in zip(self._zero.fp32_groups, self._zero.fp16_groups, strict=True):
                torch._foreach_copy_(low, high)
