"""Elastic weight consolidation: weights are held where the Fisher information says that they matter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from toreq.errors import ConfigError
from toreq.evidence import counting
from toreq.evidence.protocols.continual.learner import ADAM, ModuleLearner, Optimizer, State
from toreq.layer import equilibria
from toreq.training import checkpoint

CHUNK = 32
"""Examples whose gradients are held at once."""


def fisher(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    r"""Diagonal of the Fisher information of a classifier, exact over the labels.

    .. math:: F_i = \frac1B\sum_b\sum_c p_c(x_b)\left(\frac{\partial\log p_c(x_b)}{\partial\theta_i}\right)^2

    Args:
        module: maps ``(B, ...)`` to logits ``(B, classes)``, each example for itself.
        x: ``(B, ...)``.
    """
    weights = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}

    def log_probability(current: Mapping[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(module, dict(current), (one[None],))[0]
        return logits.log_softmax(0).gather(0, label[None])[0]

    slope = vmap(grad(log_probability), in_dims=(None, 0, 0))
    total = {n: torch.zeros_like(w) for n, w in weights.items()}
    with torch.no_grad():
        for part in x.split(CHUNK):
            shares = functional_call(module, weights, (part,)).softmax(1)
            for label in range(shares.shape[1]):
                gradients = slope(weights, part, torch.full((len(part),), label, device=x.device))
                for n, g in gradients.items():
                    total[n] += torch.einsum("b,b...->...", shares[:, label], g.square())
    return {n: t / len(x) for n, t in total.items()}


class EWC(ModuleLearner):
    r"""Elastic weight consolidation (Kirkpatrick et al. 2017), told where tasks end.

    .. math:: L(\theta) + \frac\lambda2\sum_k\sum_i F_{k,i}\,(\theta_i - \theta^*_{k,i})^2

    over the tasks k that have ended, with the weights :math:`\theta^*_k` and the Fisher information :math:`F_k` at
    their ends. The sum of quadratics is one quadratic, so :math:`\sum_k F_k` and :math:`\sum_k F_k\theta^*_k` are all
    that is kept. The Fisher information is that of the task's latest ``examples`` images, which are kept until the task
    ends and then forgotten.

    Args:
        module: without an equilibrium layer, and without anything that joins the examples of a batch.
        optimizer: makes the optimizer.
        strength: :math:`\lambda` >= 0.
        examples: at least 1.
    """

    boundaries = True

    def __init__(
        self, module: nn.Module, optimizer: Optimizer = ADAM, *, strength: float = 100.0, examples: int = 200
    ) -> None:
        super().__init__(module, optimizer)
        where = type(self).__name__
        if equilibria(module):
            raise ConfigError(
                f"{where}: expected a module whose examples can be differentiated one by one, got an equilibrium "
                "layer; use its feedforward() twin"
            )
        if strength < 0 or examples < 1:
            raise ConfigError(f"{where}: expected strength >= 0 and examples >= 1, got {strength} and {examples}")
        self.strength, self.examples = strength, examples
        self._weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
        # the penalty's gradient is strength * (stiffness * weight - pull)
        self._stiffness = {n: torch.zeros_like(p) for n, p in self._weights.items()}
        self._pull = {n: torch.zeros_like(p) for n, p in self._weights.items()}
        self._recent: Tensor | None = None
        self.consolidated = 0

    def observe(self, x: Tensor, y: Tensor) -> None:
        """One step on the loss with its penalty."""
        super().observe(x, y)
        recent = x.to(self.device)
        self._recent = (recent if self._recent is None else torch.cat([self._recent, recent]))[-self.examples :]

    def regularise(self) -> None:
        """The gradient of the penalty."""
        if self.consolidated == 0:
            return
        for n, p in self._weights.items():
            assert p.grad is not None
            p.grad += self.strength * (self._stiffness[n] * p.detach() - self._pull[n])

    def boundary(self) -> None:
        """Hold the weights of the task that has ended."""
        self._consolidate(decay=1.0, anchored=False)

    def _consolidate(self, decay: float, anchored: bool) -> None:
        """F <- decay F + F_new; with ``anchored`` all of it pulls to the present weights, else each to its own."""
        if self._recent is None:
            return
        recent = self._recent
        self.flops += counting.flops(lambda: self._add(recent, decay, anchored))
        self._recent = None
        self.consolidated += 1

    def _add(self, recent: Tensor, decay: float, anchored: bool) -> None:
        for n, information in fisher(self.module, recent).items():
            weight = self._weights[n].detach()
            self._stiffness[n] = decay * self._stiffness[n] + information
            self._pull[n] = self._stiffness[n] * weight if anchored else self._pull[n] + information * weight

    def memory(self) -> int:
        """The optimizer's numbers, two for each weight, and the latest images at their most."""
        kept = sum(t.numel() for held in (self._stiffness, self._pull) for t in held.values())
        images = 0 if self._recent is None else self.examples * self._recent[0].numel()
        return super().memory() + kept + images

    def state(self) -> State:
        """What the module's learner has, and what the weights are held by."""
        tensors, values = super().state()
        tensors |= checkpoint.prefixed("stiffness", self._stiffness) | checkpoint.prefixed("pull", self._pull)
        if self._recent is not None:
            tensors["recent"] = self._recent
        return tensors, {**values, "consolidated": self.consolidated}

    def restore(self, state: State) -> None:
        """Put back what `state` returned."""
        super().restore(state)
        tensors, values = state
        checkpoint.expect(values, ("consolidated",), type(self).__name__)
        self._stiffness = {n: t.to(self.device) for n, t in checkpoint.within("stiffness", tensors).items()}
        self._pull = {n: t.to(self.device) for n, t in checkpoint.within("pull", tensors).items()}
        self._recent = tensors["recent"].to(self.device) if "recent" in tensors else None
        self.consolidated = int(values["consolidated"])


class OnlineEWC(EWC):
    r"""Online elastic weight consolidation (Schwarz et al. 2018), told nothing: it consolidates every so many batches.

    .. math:: L(\theta) + \frac\lambda2\sum_i \tilde F_i\,(\theta_i - \theta^*_i)^2, \qquad
              \tilde F \leftarrow \gamma\tilde F + F,\quad \theta^* \leftarrow \theta

    at every ``every``-th batch, with F the Fisher information of the latest ``examples`` images.

    Args:
        module, optimizer, strength, examples: as for `EWC`.
        every: batches from one consolidation to the next, at least 1.
        decay: :math:`\gamma` in [0, 1].
    """

    boundaries = False

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer = ADAM,
        *,
        strength: float = 100.0,
        examples: int = 200,
        every: int = 50,
        decay: float = 0.95,
    ) -> None:
        super().__init__(module, optimizer, strength=strength, examples=examples)
        if every < 1 or not 0 <= decay <= 1:
            raise ConfigError(f"OnlineEWC: expected every >= 1 and decay in [0, 1], got {every} and {decay}")
        self.every, self.decay = every, decay

    def observe(self, x: Tensor, y: Tensor) -> None:
        """One step on the loss with its penalty; consolidates when it is time."""
        super().observe(x, y)
        if self._seen % self.every == 0:
            self._consolidate(self.decay, anchored=True)

    def boundary(self) -> None:
        """Nothing: it knows of no tasks."""
