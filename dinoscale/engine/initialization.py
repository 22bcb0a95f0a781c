"""Initialize a network one tensor at a time, bit for bit as if it were built on the CPU.

A network on the meta device has shapes and no memory. While it is built there, the operations that
write its tensors are recorded. Replayed on the CPU, in the same order and from the same generator,
they give the values of a network built on the CPU. Values that are drawn and then overwritten
advance the generator, so they are drawn again, too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dinoscale.errors import ConfigError

Network = TypeVar("Network", bound=nn.Module)

_IN_PLACE = ("uniform_", "normal_", "fill_", "zero_")
_NEW = ("zeros", "ones", "full")


@dataclass(frozen=True, eq=False)
class Write:
    """One operation that writes a whole tensor.

    Attributes:
        name: of the tensor in the network's state if this is its last write; None if it is drawn
            only to advance the generator.
        target: the tensor, on the meta device.
        operation: of torch, with its arguments and options.
    """

    name: str | None
    target: Tensor
    operation: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def value(self) -> Tensor:
        """The written value, on the CPU; random values come from torch's default generator."""
        if _name(self.operation) in _NEW:
            new: Tensor = self.operation(*self.arguments, **{**self.options, "device": "cpu"})
            return new
        value = torch.empty_like(self.target, device="cpu")
        self.operation(value, *self.arguments[1:], **self.options)
        return value


def build_on_meta(build: Callable[[], Network]) -> tuple[Network, list[Write]]:
    """Build a network on the meta device, and record the writes that initialize it.

    Args:
        build: makes the network, with its initial values.

    Returns:
        The network, and its writes in the order in which they are drawn.

    Raises:
        ConfigError: a tensor is computed from others instead of drawn or filled.
    """
    with _RecordWrites() as recorded, torch.device("meta"):
        network = build()
    names = {_storage(tensor): name for name, tensor in network.state_dict().items()}
    last = {_storage(write.target): write for write in recorded.writes}
    writes = []
    for write in recorded.writes:
        name = names.get(_storage(write.target)) if last[_storage(write.target)] is write else None
        if name is not None:
            _require_simple(write, name)
        if name is not None or torch.Tag.nondeterministic_seeded in write.operation.tags:
            writes.append(replace(write, name=name))
    return network, writes


def _require_simple(write: Write, name: str) -> None:
    target = write.target
    whole = target.is_contiguous() and target.nbytes == target.untyped_storage().nbytes()
    if not whole or _name(write.operation) not in (*_IN_PLACE, *_NEW):
        raise ConfigError(
            f"model.backbone: cannot train it: {name} is initialized by {write.operation};"
            " supported are tensors that are drawn or filled as a whole"
        )


class _RecordWrites(TorchDispatchMode):
    """Records every operation that makes or changes a tensor; views do neither."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.writes: list[Write] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.writes.append(Write(None, result, func, args, kwargs or {}))
        return result


def _name(operation: Any) -> str:
    return str(operation.overloadpacket.__name__)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
