"""dinoscale: DINO self-distillation on DeepSpeed with a sharded EMA teacher.

`model, transform = dinoscale.load_backbone(FILE)` loads a trained backbone, without DeepSpeed.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinoscale.convert.load_backbone import load_backbone

__all__ = ["load_backbone"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import `load_backbone`, which needs torch, on first use: `import dinoscale` stays light."""
    if name == "load_backbone":
        from dinoscale.convert.load_backbone import load_backbone

        return load_backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
