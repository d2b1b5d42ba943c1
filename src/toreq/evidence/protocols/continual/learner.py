"""What learns from a stream: the protocol, and the learner around any module and optimizer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from toreq.diagnostics.gradients import criterion
from toreq.errors import DivergenceError
from toreq.evidence import counting
from toreq.layer import equilibria
from toreq.training import checkpoint, rng

COUNT_EVERY = 50
"""Batches after which a step's operations are counted again: a relaxation's steps change as it learns."""
PREDICT_AT_ONCE = 500

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name and JSON-able values: all that a learner needs to go on."""


class Learner(Protocol):
    """Something that learns from one batch at a time and keeps nothing of a batch unless it says so.

    Attributes:
        boundaries: whether it has to be told that a task ends; a stream without tasks refuses it.
        flops: operations of all `observe` and `boundary` so far, a multiplication and an addition being two.
    """

    boundaries: bool
    flops: float

    def observe(self, x: Tensor, y: Tensor) -> None:
        """Learn from a batch, ``x`` float ``(B, C, H, W)`` in [0, 1] and ``y`` int64 ``(B,)``."""
        ...

    def predict(self, x: Tensor) -> Tensor:
        """Labels int64 ``(B,)``, on the CPU; learns nothing."""
        ...

    def boundary(self) -> None:
        """A task has ended; called only where `boundaries` is true."""
        ...

    def parameters(self) -> int:
        """Learned numbers that `predict` uses."""
        ...

    def memory(self) -> int:
        """All further numbers kept from one batch to the next."""
        ...

    def state(self) -> State:
        """All that changes by learning."""
        ...

    def restore(self, state: State) -> None:
        """Put back what `state` returned; raises `CheckpointError` for that of another learner."""
        ...


Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
ADAM: Optimizer = functools.partial(torch.optim.Adam, lr=1e-3)


class ModuleLearner:
    """A learner from any module that maps ``(B, C, H, W)`` to logits: one step of the optimizer for each batch.

    The loss is the module's own ``criterion`` or cross entropy. A toreq system is a learner in one line,
    ``ModuleLearner(systems.create("toreqprop", (1, 28, 28), 10))``.

    Args:
        module: on the device where it is to compute; batches are moved there.
        optimizer: makes the optimizer from the parameters.
    """

    boundaries: bool = False

    def __init__(self, module: nn.Module, optimizer: Optimizer = ADAM) -> None:
        self.module, self.flops = module, 0.0
        self.optimizer = optimizer([p for p in module.parameters() if p.requires_grad])
        self.device = next(module.parameters()).device
        self._loss = criterion(module)
        self._seen = 0
        self._cost: dict[int, float] = {}  # operations of a step by size of the batch
        for layer in equilibria(module):
            layer.warn = False  # unsettled relaxations are no news in the middle of a stream

    def observe(self, x: Tensor, y: Tensor) -> None:
        """One step of the optimizer.

        Raises:
            DivergenceError: when the loss is no longer finite.
        """
        x, y = x.to(self.device), y.to(self.device)
        self._count(x, y)
        self.module.train()
        self.optimizer.zero_grad()
        loss = self._loss(self.module(x), y)
        if not bool(torch.isfinite(loss)):
            raise DivergenceError(
                f"ModuleLearner: expected a finite loss, got {loss.item()} after {self._seen} batches; "
                "lower the learning rate"
            )
        loss.backward()
        self.regularise()
        self.optimizer.step()
        self._seen += 1

    def regularise(self) -> None:
        """Add to the gradients what a method asks for; nothing here."""

    def boundary(self) -> None:
        """Nothing: it learns on."""

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The largest logit."""
        self.module.eval()
        found = [self.module(part.to(self.device)).argmax(1) for part in x.split(PREDICT_AT_ONCE)]
        self.module.train()
        return torch.cat(found).cpu()

    def parameters(self) -> int:
        """Trainable numbers of the module."""
        return counting.parameters(self.module)

    def memory(self) -> int:
        """Numbers of the optimizer and of the module's buffers."""
        kept = [t for entries in self.optimizer.state.values() for t in entries.values() if isinstance(t, Tensor)]
        return sum(t.numel() for t in (*kept, *self.module.buffers()))

    def state(self) -> State:
        """Weights, optimizer, random generators and counters."""
        moments, record = checkpoint.optimizer_tensors(self.optimizer)
        tensors = {
            **checkpoint.prefixed("module", self.module.state_dict()),
            **checkpoint.prefixed("optimizer", moments),
            **checkpoint.prefixed("rng", rng.capture(self.module)),
        }
        cost = {str(size): flops for size, flops in self._cost.items()}
        return tensors, {"optimizer": record, "flops": self.flops, "seen": self._seen, "cost": cost}

    def restore(self, state: State) -> None:
        """Put back what `state` returned."""
        tensors, values = state
        where = type(self).__name__
        checkpoint.expect(values, ("optimizer", "flops", "seen", "cost"), where)
        checkpoint.restore_module(self.module, checkpoint.within("module", tensors), where)
        moments = checkpoint.within("optimizer", tensors)
        checkpoint.restore_optimizer(self.optimizer, moments, values["optimizer"], where)
        rng.restore(self.module, checkpoint.within("rng", tensors))
        self.flops, self._seen = float(values["flops"]), int(values["seen"])
        self._cost = {int(size): float(flops) for size, flops in values["cost"].items()}

    def _count(self, x: Tensor, y: Tensor) -> None:
        if len(x) not in self._cost or self._seen % COUNT_EVERY == 0:
            self._cost[len(x)] = operations(self.module, x, y)
        self.flops += self._cost[len(x)]


def operations(module: nn.Module, x: Tensor, y: Tensor) -> float:
    """Operations of a gradient on a batch, counted on a copy; random generators stay where they were."""
    with rng.preserved(module):
        copied = copy.deepcopy(module).train()
        fused = torch.backends.mkldnn.enabled
        # oneDNN's recurrent kernel hides its matrix products from the counter; without it they are seen one by one
        torch.backends.mkldnn.enabled = False
        try:
            with torch.enable_grad():
                return counting.flops(lambda: criterion(copied)(copied(x), y).backward())
        finally:
            torch.backends.mkldnn.enabled = fused
