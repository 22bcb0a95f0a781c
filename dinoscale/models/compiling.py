"""A function that is compiled where that works."""

import functools
import logging
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import fx

from dinoscale.runtime.logs import not_compiled

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_BACKWARD_AT_ONCE = "force_non_lazy_backward_lowering"  # of newer versions of torch


class Compiled(Generic[P, R]):
    """A function, compiled for each new set of shapes on its first call with them.

    Where the compiler fails, a warning says so once and the function runs as it is from then on.
    """

    def __init__(self, function: Callable[P, R], *, name: str, dynamic: bool | None) -> None:
        """Compile nothing yet.

        Args:
            function: what to compile; it must not communicate, for a rank may fail alone.
            name: of what it does, in the plural, for the warning.
            dynamic: see torch.compile; False for a graph for each set of sizes.
        """
        self._function, self._name, self._dynamic = function, name, dynamic
        self._fails = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function."""
        if not self._fails:
            try:
                return self._compiled(*args, **kwargs)
            # Before anything has run. Named here, as importing torch._dynamo takes a second.
            except torch._dynamo.exc.TorchDynamoException as error:
                self._fails = True
                log.warning("%s", not_compiled(self._name, error))
        return self._function(*args, **kwargs)

    @functools.cached_property
    def _compiled(self) -> Callable[P, R]:
        return torch.compile(self._function, dynamic=self._dynamic, backend=_compile)


def _compile(graph: fx.GraphModule, inputs: list[Any]) -> Any:
    """Compile by Inductor, the backward pass too: it must fail while another way is open."""
    from torch._inductor.compile_fx import compile_fx

    config = torch._functorch.config
    if not hasattr(config, _BACKWARD_AT_ONCE):
        return compile_fx(graph, inputs)
    with config.patch(_BACKWARD_AT_ONCE, True):
        return compile_fx(graph, inputs)
