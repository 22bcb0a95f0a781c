"""Settings in layers, files and command line: the later wins, and who said what is known."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

from dinoscale.config.report import show
from dinoscale.config.schema import ModelConfig
from dinoscale.errors import ConfigError

_OF_BACKBONE = ("patch_size", "embed_dim", "depth", "num_heads")  # sizes that its name stands for


@dataclass
class Layers:
    """What is merged so far.

    Attributes:
        values: sections by key.
        origins: which layer each dotted key came from.
        files: that were merged, in their order.
        inherited: sizes that a layer before gave to a backbone of another name.
    """

    values: dict[str, object] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    files: dict[Path, int] = field(default_factory=dict)
    inherited: set[str] = field(default_factory=set)

    def put(self, values: Mapping[str, object], *, origin: str) -> None:
        """Merge a layer that wins over those before."""
        model, given = self._model(), values.get("model")
        if isinstance(given, Mapping):
            self.inherited = (self.inherited | _sizes_of_another(model, given)) - given.keys()
        self._merge(self.values, values, origin=origin, prefix="")

    def _model(self) -> Mapping[str, object]:
        model = self.values.get("model")
        return model if isinstance(model, Mapping) else {}

    def _merge(
        self, into: dict[str, object], new: Mapping[str, object], *, origin: str, prefix: str
    ) -> None:
        for key, value in new.items():
            path = f"{prefix}{key}"
            old = into.get(key)
            if isinstance(value, Mapping):
                branch = dict(old) if isinstance(old, Mapping) else {}
                self._merge(branch, value, origin=origin, prefix=f"{path}.")
                into[key] = branch
            else:
                into[key] = value
            self.origins[path] = origin

    def require_own_sizes(self) -> None:
        """Refuse a backbone that keeps sizes which a layer before gave to another.

        Raises:
            ConfigError: it does; the message names them.
        """
        _refuse_sizes(self.inherited, self._model())


def require_own_sizes(before: Mapping[str, object], given: Mapping[str, object]) -> None:
    """Refuse a backbone that keeps the sizes of another one: it would be that in name only.

    Args:
        before: settings of the model by key, as a file says.
        given: those that win over it.

    Raises:
        ConfigError: `given` names another backbone, and not the sizes that `before` has.
    """
    _refuse_sizes(_sizes_of_another(before, given), {**before, **given})


def _sizes_of_another(before: Mapping[str, object], given: Mapping[str, object]) -> set[str]:
    old = before.get("backbone", ModelConfig.model_fields["backbone"].default)
    if given.get("backbone", old) == old:
        return set()
    return {key for key in _OF_BACKBONE if before.get(key) is not None} - given.keys()


def _refuse_sizes(keys: Set[str], model: Mapping[str, object]) -> None:
    if keys:
        sizes = [f"model.{key}={show(model[key])}" for key in _OF_BACKBONE if key in keys]
        raise ConfigError(
            f"model.backbone: {show(model['backbone'])} would have sizes that are set for another"
            f" backbone: {', '.join(sizes)}; give those that it shall have, or null for its own:"
            f" {' '.join(f'model.{key}=null' for key in _OF_BACKBONE if key in keys)}"
        )
