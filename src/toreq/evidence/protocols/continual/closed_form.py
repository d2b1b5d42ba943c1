"""Learners whose answer is a formula of all they have seen, whatever the order: class means, recursive ridge."""

from __future__ import annotations

import torch
from torch import Tensor

from toreq.data import seeded
from toreq.errors import ConfigError
from toreq.evidence import counting
from toreq.evidence.protocols.continual.learner import PREDICT_AT_ONCE, State
from toreq.training import checkpoint


class ClassMeans:
    r"""The class whose mean image is nearest, :math:`\arg\min_c\|x - \mu_c\|`; classes not yet seen are never answered.

    Args:
        inputs: numbers in an image.
        classes: number of classes.
        device: where it computes.
    """

    boundaries = False

    def __init__(self, inputs: int, classes: int, device: torch.device | str = "cpu") -> None:
        self.flops = 0.0
        self._sum = torch.zeros(classes, inputs, dtype=torch.float64, device=device)
        self._count = torch.zeros(classes, dtype=torch.float64, device=device)

    def observe(self, x: Tensor, y: Tensor) -> None:
        """Add the images to the sums of their classes."""
        flat, y = x.flatten(1).to(self._sum), y.to(self._sum.device)
        self._sum.index_add_(0, y, flat)
        self._count += torch.bincount(y, minlength=len(self._count))
        self.flops += flat.numel()

    def predict(self, x: Tensor) -> Tensor:
        """The class of the nearest mean."""
        means = self._sum / self._count.clamp(min=1)[:, None]
        distance = torch.cdist(x.flatten(1).to(means), means)
        return distance.masked_fill(self._count == 0, torch.inf).argmin(1).cpu()

    def boundary(self) -> None:
        """Nothing: the order does not matter."""

    def parameters(self) -> int:
        """Numbers in the means."""
        return self._sum.numel()

    def memory(self) -> int:
        """The counts."""
        return self._count.numel()

    def state(self) -> State:
        """Sums and counts."""
        return {"sum": self._sum, "count": self._count}, {"flops": self.flops}

    def restore(self, state: State) -> None:
        """Put back what `state` returned."""
        tensors, values = state
        checkpoint.expect(values, ("flops",), "ClassMeans")
        checkpoint.expect(tensors, ("sum", "count"), "ClassMeans")
        self._sum, self._count = tensors["sum"].to(self._sum), tensors["count"].to(self._count)
        self.flops = float(values["flops"])


class RecursiveRidge:
    r"""Random features with recursive least squares: after every batch exactly the ridge solution of all seen so far.

    .. math:: \phi(x) = [\cos(\omega A x + b),\ 1], \qquad
              W = \arg\min_W \sum_t\|W^\top\phi(x_t) - e_{y_t}\|^2 + \lambda\|W\|^2

    With :math:`P = (\Phi^\top\Phi + \lambda I)^{-1}`, :math:`P_0 = I/\lambda`, a batch with features :math:`\Phi_b` and
    targets :math:`Y_b` updates by Woodbury's identity

    .. math:: L L^\top = I + \Phi_b P \Phi_b^\top,\quad V = L^{-1}\Phi_b P,\quad
              W \leftarrow W + V^\top L^{-1}(Y_b - \Phi_b W),\quad P \leftarrow P - V^\top V ,

    a form that keeps P symmetric. float64, since P loses digits with every subtraction. The entries of A are normal
    with standard deviation 1 / sqrt(inputs), b is uniform on [0, 2 pi): the features stand for a Gaussian kernel of
    width :math:`\sqrt{\text{inputs}}/\omega` (Rahimi and Recht 2007).

    Args:
        inputs: numbers in an image.
        classes: number of classes.
        features: random features, at least 1.
        penalty: :math:`\lambda` > 0.
        frequency: :math:`\omega` > 0.
        seed: of the features.
        device: where it computes.
        dtype: of P and W.
    """

    boundaries = False

    def __init__(
        self,
        inputs: int,
        classes: int,
        features: int = 1000,
        *,
        penalty: float = 1.0,
        frequency: float = 4.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if features < 1 or not penalty > 0 or not frequency > 0:
            raise ConfigError(
                f"RecursiveRidge: expected features >= 1, penalty > 0 and frequency > 0, got {features}, {penalty} "
                f"and {frequency}; use positive ones"
            )
        self.flops, self.classes = 0.0, classes
        draw = seeded(seed)
        self._project = (frequency * torch.randn(inputs, features, generator=draw) / inputs**0.5).to(device, dtype)
        self._shift = (2 * torch.pi * torch.rand(features, generator=draw)).to(device, dtype)
        self._inverse = torch.eye(features + 1, device=device, dtype=dtype) / penalty
        self.weights = torch.zeros(features + 1, classes, device=device, dtype=dtype)
        """W, ``(features + 1, classes)``; the last row belongs to the constant."""

    def features(self, x: Tensor) -> Tensor:
        r""":math:`\phi(x)`, ``(B, features + 1)``."""
        found = torch.addmm(self._shift, x.flatten(1).to(self._project), self._project).cos_()
        return torch.cat([found, found.new_ones(len(found), 1)], 1)

    def observe(self, x: Tensor, y: Tensor) -> None:
        """The update by a batch."""
        self.flops += counting.flops(lambda: self._update(x, y))
        # the factorisation and the triangular solve, for which torch's counter has no formula
        batch, width = len(x), len(self._inverse) + self.classes
        self.flops += batch**3 / 3 + batch**2 * width

    def _update(self, x: Tensor, y: Tensor) -> None:
        phi = self.features(x)
        target = torch.nn.functional.one_hot(y.to(phi.device), self.classes).to(phi.dtype)
        known = phi @ self._inverse
        factor = torch.linalg.cholesky(torch.addmm(torch.eye(len(phi)).to(phi), known, phi.T))
        both = torch.cat([known, target - phi @ self.weights], 1)
        solved = torch.linalg.solve_triangular(factor, both, upper=False)
        gain, error = solved[:, : known.shape[1]], solved[:, known.shape[1] :]
        self.weights += gain.T @ error
        torch.addmm(self._inverse, gain.T, gain, alpha=-1, out=self._inverse)

    def predict(self, x: Tensor) -> Tensor:
        """The class of the largest output."""
        return torch.cat([(self.features(part) @ self.weights).argmax(1) for part in x.split(PREDICT_AT_ONCE)]).cpu()

    def boundary(self) -> None:
        """Nothing: the order does not matter."""

    def parameters(self) -> int:
        """Numbers in W."""
        return self.weights.numel()

    def memory(self) -> int:
        """Numbers in P and in the random features, which are never learned."""
        return self._inverse.numel() + self._project.numel() + self._shift.numel()

    def state(self) -> State:
        """P and W; the random features follow from the seed."""
        return {"inverse": self._inverse, "weights": self.weights}, {"flops": self.flops}

    def restore(self, state: State) -> None:
        """Put back what `state` returned."""
        tensors, values = state
        checkpoint.expect(values, ("flops",), "RecursiveRidge")
        checkpoint.expect(tensors, ("inverse", "weights"), "RecursiveRidge")
        self._inverse, self.weights = tensors["inverse"].to(self._inverse), tensors["weights"].to(self.weights)
        self.flops = float(values["flops"])
