"""toreq: PyTorch networks that settle to the equilibrium of an energy and learn from the contrast of two equilibria."""

from toreq import core, errors, estimators, memory, solvers, systems
from toreq.layer import Equilibrium, equilibria, wrap
from toreq.starts import WarmStarts

__version__ = "0.1.0"

__all__ = [
    "Equilibrium",
    "WarmStarts",
    "__version__",
    "core",
    "equilibria",
    "errors",
    "estimators",
    "memory",
    "solvers",
    "systems",
    "wrap",
]
