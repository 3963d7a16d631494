"""Train one trial, epoch by epoch: networks, methods, teachers and their cached logits, checkpoints, devices.

from tune_kd.training import Batch, Context     the arguments of a loss at each step, and at its construction
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_kd.training.loss import Batch as Batch, Context as Context, Shapes as Shapes

__all__ = ["Batch", "Context", "Shapes"]


if not TYPE_CHECKING:  # a type checker would accept misspelt names

    def __getattr__(name: str) -> Any:
        """Import late: the folder has modules that need no torch."""
        if name not in __all__:
            raise AttributeError(f"module 'tune_kd.training' has no attribute {name!r}")
        from tune_kd.training import loss

        return getattr(loss, name)
