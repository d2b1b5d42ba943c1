"""One side of a comparison: a full training step, a prediction, and a state that can be saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Trainer(ABC):
    """A network with its way of training it by Adam.

    Args:
        model: holds all parameters.
        lr: learning rate of Adam.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    @abstractmethod
    def step(self, images: Tensor, labels: Tensor) -> None:
        """One training step: relaxation, gradient, update.

        Args:
            images: ``(B, C, H, W)``, floating point.
            labels: class indices ``(B,)``, int64.
        """

    @abstractmethod
    def predict(self, images: Tensor) -> Tensor:
        """Scores ``(B, classes)`` of images ``(B, C, H, W)``; the largest is the prediction."""

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return list(self.model.parameters())

    def state(self) -> dict[str, Any]:
        """What a later process needs to go on: model and optimizer."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class ModuleTrainer(Trainer):
    """An ordinary module trained through ``loss.backward()``: backprop, toreq's systems, DEQs.

    Args:
        model: maps images to scores.
        criterion: mean cost of scores ``(B, classes)`` and labels ``(B,)``.
        lr: learning rate of Adam.
    """

    def __init__(self, model: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor], lr: float) -> None:
        super().__init__(model, lr)
        self.criterion = criterion

    def step(self, images: Tensor, labels: Tensor) -> None:
        loss = self.criterion(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        self.model.eval()
        scores = self.model(images)
        self.model.train()
        return scores
