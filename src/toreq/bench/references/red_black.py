"""Equilibrium propagation as in the framework of Scellier et al. (2023): closed-form fields, block by block."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import grad as conv_grad

from toreq.bench.references.base import Trainer
from toreq.bench.references.layered import LayeredNet


class RedBlackEP(Trainer):
    r"""Centered equilibrium propagation by sweeps over the even layers, then the odd ones.

    .. math:: \frac{\partial C}{\partial W_l} \approx -\frac1{2\beta}
              \left[s_l^{+} (s_{l-1}^{+})^T - s_l^{-} (s_{l-1}^{-})^T\right]

    Fields are in closed form, the number of sweeps is fixed, the input's product is recomputed in every sweep, and the
    phases of +beta and -beta run one after the other from the free equilibrium, as published. The gradient is by hand
    too. Difference to the published framework: Adam replaces SGD.

    Args:
        net: the network.
        free_sweeps, nudged_sweeps: of the free phase, and of each nudged one.
        beta: the nudge, > 0.
        lr: learning rate of Adam.
    """

    model: LayeredNet

    def __init__(self, net: LayeredNet, free_sweeps: int, nudged_sweeps: int, beta: float, lr: float) -> None:
        super().__init__(net, lr)
        self.net = net
        self.free_sweeps, self.nudged_sweeps, self.beta = free_sweeps, nudged_sweeps, beta

    @torch.no_grad()
    def step(self, images: Tensor, labels: Tensor) -> None:
        self.gradient(images, labels)
        self.optimizer.step()

    @torch.no_grad()
    def gradient(self, images: Tensor, labels: Tensor) -> None:
        """Put the estimate of the mean cost's gradient into ``.grad`` of the parameters."""
        target = self.net.targets(labels, images)
        free = self._relax(images, self.net.start(images), self.free_sweeps)
        plus = self._relax(images, list(free), self.nudged_sweeps, self.beta, target)
        minus = self._relax(images, list(free), self.nudged_sweeps, -self.beta, target)
        scale = -1 / (2 * self.beta * images.shape[0])
        for index, module in enumerate(self.net.layers):
            layer = cast("nn.Linear | nn.Conv2d", module)
            (weight, bias), (weight_minus, bias_minus) = (self._products(index, images, s) for s in (plus, minus))
            layer.weight.grad = scale * (weight - weight_minus)
            layer.bias.grad = scale * (bias - bias_minus)  # type: ignore[union-attr]

    def _relax(
        self, images: Tensor, states: list[Tensor], sweeps: int, beta: float = 0.0, target: Tensor | None = None
    ) -> list[Tensor]:
        blocks = (range(0, len(states), 2), range(1, len(states), 2))
        for _ in range(sweeps):
            for block in blocks:
                for i in block:
                    pull = None if target is None else beta * (target - states[-1])
                    states[i] = self.net.activate(i, self.net.field(i, images, states, pull))
        return states

    def _products(self, index: int, images: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor]:
        layer = self.net.layers[index]
        below, above = states[index - 1] if index > 0 else images, states[index]
        if isinstance(layer, nn.Linear):
            return above.T @ below.flatten(1), above.sum(0)
        assert isinstance(layer, nn.Conv2d)
        shape = list(layer.weight.shape)
        weight = conv_grad.conv2d_weight(below, shape, above, layer.stride, layer.padding)  # type: ignore[arg-type]
        return weight, above.sum((0, 2, 3))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        return self._relax(images, self.net.start(images), self.free_sweeps)[-1]
