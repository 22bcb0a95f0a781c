"""Who makes the host wait for a device, seen on a CPU too."""

import sys
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# What needs a value, or a shape that depends on one, on the host.
READS = (
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::repeat_interleave",
)


class DeviceReads(TorchDispatchMode):
    """Lists callers that read a tensor's value, or in dinoscale make a tensor of Python numbers.

    Attributes:
        callers: names of these functions, in the order of their calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        frame = sys._getframe(1)
        while "/torch/" in frame.f_code.co_filename:
            assert frame.f_back is not None
            frame = frame.f_back
        # torch.tensor and indices in a list: on a GPU a copy that waits.
        copies = name == "aten::lift_fresh" and "/dinoscale/" in frame.f_code.co_filename
        if name in READS or copies:
            self.callers.append(frame.f_code.co_name)
        return func(*args, **(kwargs or {}))
