"""Compile a function; where the compiler fails, warn once and run it eagerly."""

import functools
import inspect
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
# For the networks of a run, in all sizes of its crops. Torch's own limit is 8, and what is beyond
# it runs eagerly.
_MOST_GRAPHS = 64


class Compiled(Generic[P, R]):
    """A function, compiled on its first call with each new set of shapes.

    If the compiler fails, one warning says so, and the function runs eagerly from then on.
    """

    def __init__(self, function: Callable[P, R], *, name: str, dynamic: bool | None) -> None:
        """Compile nothing yet.

        Args:
            function: what to compile; it must not communicate, as a single rank may fail.
            name: what the function computes, in the plural, for the warning.
            dynamic: as in torch.compile; False for one graph per set of sizes.
        """
        self._function, self._name, self._dynamic = function, name, dynamic
        self._fails = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function."""
        if not self._fails:
            try:
                return self._compiled(*args, **kwargs)
            # Raised before anything has run. Not imported on top: torch._dynamo takes a second.
            except torch._dynamo.exc.TorchDynamoException as error:
                self._fails = True
                log.warning("%s", not_compiled(self._name, error))
        return self._function(*args, **kwargs)

    @functools.cached_property
    def _compiled(self) -> Callable[P, R]:
        options: dict[str, Any] = {}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:  # of newer versions
            options["recompile_limit"] = _MOST_GRAPHS
        else:
            _allow_graphs()
        return torch.compile(self._function, dynamic=self._dynamic, backend=_compile, **options)


def _allow_graphs() -> None:
    """Raise torch's limit for all functions of this process, as older versions have no other."""
    config: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(getattr(config, name), _MOST_GRAPHS))


def _compile(graph: fx.GraphModule, inputs: list[Any]) -> Any:
    """Compile with Inductor, the backward too, so that it fails while eager mode is possible."""
    from torch._inductor.compile_fx import compile_fx

    config = torch._functorch.config
    if not hasattr(config, _BACKWARD_AT_ONCE):
        return compile_fx(graph, inputs)
    with config.patch(_BACKWARD_AT_ONCE, True):
        return compile_fx(graph, inputs)
