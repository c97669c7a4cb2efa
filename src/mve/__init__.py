"""Sample-efficient reinforcement learning by model-based value expansion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mve.learner import Learner
    from mve.seeds import resume_seeds, train_seeds
    from mve.types import UserError

__version__ = "0.1.0"
__all__ = ["Learner", "UserError", "__version__", "resume_seeds", "train_seeds"]


def __getattr__(name: str) -> Any:
    """`mve.Learner` and the rest, imported when first asked for: the command line starts without JAX."""
    if name == "Learner":
        from mve.learner import Learner

        return Learner
    if name == "UserError":
        from mve.types import UserError

        return UserError
    if name in ("train_seeds", "resume_seeds"):
        from mve import seeds

        return getattr(seeds, name)
    raise AttributeError(f"module 'mve' has no attribute {name!r}")
