"""Weights of the student that do not train, at ZeRO stages 0 to 2.

They are whole on every rank in the compute dtype, and the teacher's forward uses the same memory.
Each rank also keeps an equal slice of each in float32 in host memory, for checkpoints: rounded to
the compute dtype they would not be the source's any more. P weights of s bytes on W ranks take
s P bytes of the device and 4 P / W of the host, without gradient, moments and average.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from dinoscale.engine.shards import Fragment
from dinoscale.runtime import distributed

_NO_GROUP = -1  # of the optimizer


class FrozenParameters:
    """The parameters of a network that have no gradient, by name.

    Attributes:
        parameters: as the forward uses them.
    """

    def __init__(self, network: nn.Module) -> None:
        """Find them in `network`, which is on its device; their values come later."""
        self.parameters: Mapping[str, nn.Parameter] = {
            name: parameter
            for name, parameter in network.named_parameters()
            if not parameter.requires_grad
        }
        self._fragments = {name: _own(name, p) for name, p in self.parameters.items()}
        self._slices = {name: torch.zeros(own.numel) for name, own in self._fragments.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.parameters

    def held(self) -> Iterator[tuple[Fragment, Tensor]]:
        """This rank's slice of each, with its float32 values on the CPU, which nobody changes."""
        for name, fragment in self._fragments.items():
            if fragment.numel:
                yield fragment, self._slices[name]

    @torch.no_grad()
    def set(self, name: str, value: Tensor) -> None:
        """Set one of them from its full value, float32, on the CPU."""
        own = self._fragments[name]
        self._slices[name] = value.flatten().narrow(0, own.start, own.numel).clone()
        self.parameters[name].copy_(value)

    @torch.no_grad()
    def restore(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Set all of them, each rank reading its slices; collective.

        Args:
            read: (parameter name, first element, count) -> (count,) float32.

        Raises:
            DinoscaleError: on every rank, if `read` raises it on one.
        """

        def read_all() -> dict[str, Tensor]:
            return {name: read(name, own.start, own.numel) for name, own in self._fragments.items()}

        self._slices = distributed.together(read_all)
        for name, parameter in self.parameters.items():
            own = self._fragments[name]
            whole = torch.zeros(parameter.numel(), device=parameter.device)
            whole.narrow(0, own.start, own.numel).copy_(self._slices[name])
            # of zeros but for one rank
            parameter.copy_(distributed.all_reduce_sum(whole).view(parameter.shape))


def _own(name: str, parameter: nn.Parameter) -> Fragment:
    numel, ranks = parameter.numel(), distributed.world_size()
    size = -(-numel // ranks)
    start = min(distributed.rank() * size, numel)
    count = min(size, numel - start)
    return Fragment(name, tuple(parameter.shape), _NO_GROUP, start, count, offset=0)
