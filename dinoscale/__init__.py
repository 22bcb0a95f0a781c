"""dinoscale: DINO self-distillation on DeepSpeed with a sharded EMA teacher."""

__version__ = "0.1.0"
