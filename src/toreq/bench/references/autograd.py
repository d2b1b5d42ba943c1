"""Equilibrium propagation as in the scripts of Laborieux et al. (2021): autograd of the energy in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from toreq.bench.references.base import Trainer
from toreq.bench.references.layered import LayeredNet


class AutogradEP(Trainer):
    r"""One-sided equilibrium propagation, each step an autograd of the primitive function.

    .. math:: \Phi_\beta = \sum_l \langle s_l, W_l s_{l-1} + b_l\rangle - \beta C, \qquad
              s \leftarrow \mathrm{clip}(\partial\Phi_\beta/\partial s, 0, 1), \qquad
              \frac{\partial C}{\partial\theta} \approx -\frac1\beta
              \left[\partial_\theta\Phi(s^\beta) - \partial_\theta\Phi(s^0)\right]

    All layers move at once, a fixed number of steps; the input's product is part of :math:`\Phi` and so is computed in
    every step, as published. Differences to the published scripts: the hard sigmoid has slope 1 and the output layer is
    linear, as in all other sides here, and Adam replaces SGD.

    Args:
        net: the network.
        free_steps, nudged_steps: T1 and T2.
        beta: the nudge, > 0.
        lr: learning rate of Adam.
    """

    model: LayeredNet

    def __init__(self, net: LayeredNet, free_steps: int, nudged_steps: int, beta: float, lr: float) -> None:
        super().__init__(net, lr)
        self.net = net
        self.free_steps, self.nudged_steps, self.beta = free_steps, nudged_steps, beta

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.gradient(images, labels)
        self.optimizer.step()

    def gradient(self, images: Tensor, labels: Tensor) -> None:
        """Put the estimate of the mean cost's gradient into ``.grad`` of the parameters."""
        target = self.net.targets(labels, images)
        start = [s.requires_grad_() for s in self.net.start(images)]
        free = self._relax(images, start, self.free_steps, None)
        nudged = self._relax(images, [s.detach().clone().requires_grad_() for s in free], self.nudged_steps, target)
        self.net.zero_grad()
        # with the states as constants, only the parameters in Phi are differentiated
        first = self.primitive(images, [s.detach() for s in free], None).mean()
        second = self.primitive(images, [s.detach() for s in nudged], target).mean()
        ((first - second) / self.beta).backward()

    def primitive(self, images: Tensor, states: list[Tensor], target: Tensor | None) -> Tensor:
        """:math:`\\Phi` of each example ``(B,)``, nudged towards one-hot ``target`` unless it is None."""
        phi = images.new_zeros(images.shape[0])
        for index, (below, state) in enumerate(zip([images, *states[:-1]], states, strict=True)):
            phi = phi + (self.net.up(index, below) * state).flatten(1).sum(1)
        if target is not None:
            phi = phi - self.beta * 0.5 * (states[-1] - target).square().sum(1)
        return phi

    def _relax(self, images: Tensor, states: list[Tensor], steps: int, target: Tensor | None) -> list[Tensor]:
        for _ in range(steps):
            fields = torch.autograd.grad(self.primitive(images, states, target).sum(), states)
            states = [self.net.activate(i, f).requires_grad_() for i, f in enumerate(fields)]
        return states

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        # the same steps with fields by hand: the same states in a third of the time, where nothing is timed
        states = self.net.start(images)
        layers = range(len(states))
        for _ in range(self.free_steps):
            states = [self.net.activate(i, self.net.field(i, images, states)) for i in layers]
        return states[-1]
