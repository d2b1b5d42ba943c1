"""What a side was given: its parameters, and the floating-point operations of a step by torch's own formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class _Counter(TorchDispatchMode):
    """Unlike ``FlopCounterMode`` this hooks no modules: its hooks refuse the gradients that a relaxation takes inside
    a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def parameters(module: nn.Module) -> int:
    """Trainable numbers of a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def flops(function: Callable[[], object]) -> float:
    """Floating-point operations of ``function()``: matrix products, convolutions and attention; a multiplication and
    an addition are two."""
    with _Counter() as counter:
        function()
    return float(counter.total)
