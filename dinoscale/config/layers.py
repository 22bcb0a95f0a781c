"""Merges layers of settings, files and command line: the later wins, and origins are kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dinoscale.config.sections.backbones import ModelConfig
from dinoscale.config.sections.convnets import named_convnet
from dinoscale.errors import ConfigError

_SIZES_OF_NAME = ("embed_dim", "depth", "num_heads")  # sizes that the name of a backbone stands for
# What a mixture of sizes replaces.
_ONE_SIZE = {"crops": ("global_size", "local_size"), "gram": ("crop_size",)}


@dataclass
class Layers:
    """The layers merged so far.

    Attributes:
        values: sections by key.
        origins: which layer each dotted key came from.
        files: that were merged, with their place in the order.
        unsized: whether a mixture of sizes was taken back, which has replaced the sizes before it.
    """

    values: dict[str, object] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    files: dict[Path, int] = field(default_factory=dict)
    unsized: bool = False

    def put(self, *parts: Mapping[str, object], origin: str) -> None:
        """Merge a layer over those before; of its parts, the later win."""
        layer: dict[str, object] = {}
        for part in parts:
            self._merge(layer, part, origin=origin, prefix="")
        model, given = self.values.get("model"), layer.get("model")
        if isinstance(model, dict) and isinstance(given, Mapping):
            for key in sizes_of_another(model, given):
                model.pop(key, None)
        mixture = _mixture_of(layer)
        if mixture:
            drop_one_size(self.values)
            self.unsized = False
        elif mixture is not None and _mixture_of(self.values):
            drop_one_size(self.values)  # the mixture's largest
            self.unsized = True
        self._merge(self.values, layer, origin=origin, prefix="")

    def require_sizes(self) -> None:
        """Refuse a mixture that was taken back without sizes of crops in its place.

        Raises:
            ConfigError: some are missing.
        """
        crops, gram = (self.values.get(section) for section in _ONE_SIZE)
        given = {f"crops.{key}" for key in crops} if isinstance(crops, Mapping) else set()
        needed = ["crops.global_size"]
        if not isinstance(crops, Mapping) or crops.get("num_local") != 0:
            needed.append("crops.local_size")
        if isinstance(gram, Mapping):
            given |= {f"gram.{key}" for key in gram}
            needed += ["gram.crop_size"] if gram.get("loss_weight") else []
        missing = [key for key in needed if key not in given]
        if self.unsized and missing:
            raise ConfigError(
                "crops.mixture: the empty list takes back a mixture, which has replaced the sizes "
                f"of crops before it; give {' and '.join(missing)} too"
            )

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


def _mixture_of(values: Mapping[str, object]) -> object:
    """The mixture of sizes that settings give; None if they give none, not even an empty one."""
    crops = values.get("crops")
    return crops.get("mixture") if isinstance(crops, Mapping) else None


def drop_one_size(values: Mapping[str, object]) -> None:
    """Drop the sizes of crops, from sections by key, in whose place a mixture is given."""
    for section, keys in _ONE_SIZE.items():
        before = values.get(section)
        if isinstance(before, dict):
            for key in keys:
                before.pop(key, None)


def sizes_of_another(before: Mapping[str, object], given: Mapping[str, object]) -> set[str]:
    """Sizes of a backbone to drop when another is named, which would else keep the old sizes.

    The patch size stays, since the crop sizes are multiples of it; a ResNet has none.

    Args:
        before: settings of the model by key.
        given: settings that win over them.

    Returns:
        Keys of `before` to drop; none if `given` names no other backbone.
    """
    old = before.get("backbone", ModelConfig.model_fields["backbone"].default)
    new = given.get("backbone", old)
    if new == old:
        return set()
    return {*_SIZES_OF_NAME, *(["patch_size"] if named_convnet(str(new)) else [])} - given.keys()
