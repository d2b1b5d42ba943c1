"""Relaxations written out by hand: what a good PyTorch user would write for one network and nothing else.

Each loop solves the very equations of a shipped system, with the drive computed once, closed-form fields, no autograd
and the same residual per example after every step. They are what the generic engine is measured against.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from toreq import systems
from toreq.core import Conv, Energy, LayerNorm, Tanh
from toreq.core.attention import Attention
from toreq.core.couplings import Bilinear, Lateral, Potential
from toreq.core.state import Bindings, State, detached
from toreq.solvers import Relaxation, Solution, Solver

NEVER = 1e-30
"""A tolerance above 0, so that the residual is checked, that no residual reaches."""

TANH: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": lambda a: torch.sigmoid(2 * a).mul_(2).sub_(1),
}
"""Two ways to the same function; which is faster depends on the machine."""


def full(solver: Solver, precision: str = "full") -> Solver:
    """The solver in one precision; as it is where solvers have no such field."""
    known = {f.name for f in dataclasses.fields(solver)}
    return dataclasses.replace(solver, **cast(Any, {"precision": precision})) if "precision" in known else solver


def ratio(field: Tensor, a: Tensor) -> Tensor:
    """The relative residual of each example, ``(B,)``."""
    size = torch.linalg.vector_norm((field - a).flatten(1), dim=1)
    return size / (size + torch.linalg.vector_norm(a.flatten(1), dim=1))


class Case(ABC):
    """One shipped network bound to a batch: its relaxation by the engine and by hand, and the products of one sweep.

    Args:
        net: a system.
        x: the batch, on which the drive is computed once.
    """

    arch: ClassVar[str]
    input_shape = (1, 28, 28)

    def __init__(self, net: systems.System, x: Tensor) -> None:
        self.net = net
        assert isinstance(net.equilibrium.dynamics, Energy)
        self.energy = net.equilibrium.dynamics
        self.size = x.shape[0]
        with torch.no_grad():
            self.bindings: Bindings = detached(self.energy.bind(x))
            self.drive = self.energy.static(self.bindings)
        self.weights()

    @classmethod
    def of(cls, batch: int, **options: Any) -> Case:
        """The network as shipped (or with ``options``), freshly initialised from seed 0, on random images."""
        torch.manual_seed(0)
        net = systems.create("toreqprop", cls.input_shape, 10, arch=cls.arch, **options).eval()
        return cls(net, torch.rand(batch, *cls.input_shape, generator=torch.Generator().manual_seed(1)))

    @torch.no_grad()
    def engine(self, solver: Solver) -> Solution:
        """The relaxation by the library, from bindings that exist already."""
        problem = Relaxation(self.energy, self.bindings, as_map=True)
        return solver.solve(problem, self.energy.initial(self.bindings))

    def bound(self, kind: type) -> tuple[Any, Any]:
        """The first coupling of a kind, and what it is bound to."""
        return next((c, self.bindings[name]) for name, c in self.energy.terms() if isinstance(c, kind))

    @abstractmethod
    def weights(self) -> None:
        """Pick the tensors that the loop needs."""

    @abstractmethod
    def by_hand(self, steps: int, tanh: Callable[[Tensor], Tensor]) -> State:
        """The plain relaxation, at most ``steps`` steps, stopped when every example's residual is below tolerance."""

    @abstractmethod
    def products(self, dtype: torch.dtype) -> Callable[[], object]:
        """The coupling products of one sweep alone, on random numbers of the same shapes and layout."""

    @abstractmethod
    def flops(self) -> int:
        """Floating-point operations of the coupling products of one sweep on one example, from the shapes."""


class LateralCase(Case):
    """ToroidalMLP: one tanh layer with a symmetric coupling to itself."""

    arch = "mlp"

    def weights(self) -> None:
        _, bound = self.bound(Lateral)
        self.w = bound["weight"]

    @torch.no_grad()
    def by_hand(self, steps: int, tanh: Callable[[Tensor], Tensor]) -> State:
        drive, w = self.drive["h1"], self.w
        a, h = drive, tanh(drive)
        for _ in range(steps):
            f = torch.addmm(drive, h, w)
            r = ratio(f, a)
            a = f
            h = tanh(a)
            if bool((r <= NEVER).all()):
                break
        return {"h1": a}

    def products(self, dtype: torch.dtype) -> Callable[[], object]:
        h, w = torch.randn(self.size, *self.energy.shapes["h1"]).to(dtype), self.w.to(dtype)
        return lambda: torch.mm(h, w)

    def flops(self) -> int:
        return 2 * self.w.numel()


class ConvCase(Case):
    """ConvHopfield: two tanh layers joined by a strided convolution and its transpose."""

    arch = "conv"

    def weights(self) -> None:
        coupling, bound = self.bound(Bilinear)
        op = cast(Conv, coupling.op)
        self.w, self.stride, self.padding, self.output_padding = (
            bound["weight"],
            op.stride,
            op.padding,
            op.output_padding,
        )
        self.gains = [cast(Tanh, self.energy.activation(n)).gain for n in ("h1", "h2")]
        self.bias = self.drive["h2"][0, :, 0, 0].contiguous()

    def _up(self, h: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(h, w, bias, self.stride, self.padding)

    def _down(self, h: Tensor, w: Tensor) -> Tensor:
        return F.conv_transpose2d(h, w, None, self.stride, self.padding, self.output_padding)

    @torch.no_grad()
    def by_hand(self, steps: int, tanh: Callable[[Tensor], Tensor]) -> State:
        drive, w, (g1, g2) = self.drive["h1"], self.w, self.gains
        a1 = drive
        h1 = tanh(a1 if g1 == 1 else g1 * a1)
        a2 = self._up(h1, w, self.bias)
        h2 = tanh(g2 * a2)
        for _ in range(steps):
            f1 = self._down(h2, w).add_(drive)
            f2 = self._up(h1, w, self.bias)
            r = torch.stack([_size(f1 - a1), _size(f2 - a2)]).norm(dim=0)
            r = r / (r + torch.stack([_size(a1), _size(a2)]).norm(dim=0))
            a1, a2 = f1, f2
            h1, h2 = tanh(a1 if g1 == 1 else g1 * a1), tanh(g2 * a2)
            if bool((r <= NEVER).all()):
                break
        return {"h1": a1, "h2": a2}

    def products(self, dtype: torch.dtype) -> Callable[[], object]:
        last = torch.channels_last
        w = self.w.to(dtype)
        h1, h2 = (
            torch.randn(self.size, *self.energy.shapes[n]).to(dtype).contiguous(memory_format=last)
            for n in ("h1", "h2")
        )
        return lambda: (self._up(h1, w), self._down(h2, w))

    def flops(self) -> int:
        # a filter's products at every position of the upper layer, up and down
        _, height, width = self.energy.shapes["h2"]
        return 2 * (2 * self.w.numel() * height * width)


class TransformerCase(Case):
    """LoopedTransformer: one layer-norm token node under softmax attention and a tied feed-forward potential."""

    arch = "transformer"

    def weights(self) -> None:
        attention, bound = self.bound(Attention)
        potential, tied = self.bound(Potential)
        assert potential.phi == "log_cosh"
        self.heads, self.temperature = attention.heads, attention.inverse_temperature
        self.qk, self.w, self.bias = bound["qk"], tied["weight"], tied["bias"]
        norm, node = cast(LayerNorm, self.energy.activation("tokens")), self.bindings["node_tokens"]
        self.gain, self.shift, self.eps = node["gain"].expand(norm.features).contiguous(), node["bias"], norm.eps

    @torch.no_grad()
    def by_hand(self, steps: int, tanh: Callable[[Tensor], Tensor]) -> State:
        drive, heads, qk = self.drive["tokens"], self.heads, self.qk
        size, count, features = drive.shape
        flat = drive.reshape(-1, features)
        a, h = drive, F.layer_norm(drive, (features,), self.gain, self.shift, self.eps)
        for _ in range(steps):
            q, k = F.linear(h, qk).view(size, count, 2, heads, -1).permute(2, 0, 3, 1, 4)
            p = (q @ k.transpose(-1, -2)).mul_(self.temperature).softmax(-1)
            both = torch.stack([p @ k, p.transpose(-1, -2) @ q]).permute(1, 3, 0, 2, 4).reshape(size * count, -1)
            hidden = tanh(F.linear(h.view(-1, features), self.w, self.bias))
            f = torch.addmm(flat, both, qk).addmm_(hidden, self.w).view_as(a)
            r = ratio(f, a)
            a = f
            h = F.layer_norm(a, (features,), self.gain, self.shift, self.eps)
            if bool((r <= NEVER).all()):
                break
        return {"tokens": a}

    def products(self, dtype: torch.dtype) -> Callable[[], object]:
        count, features = self.energy.shapes["tokens"]
        h, qk, w = torch.randn(self.size * count, features).to(dtype), self.qk.to(dtype), self.w.to(dtype)
        both, hidden = torch.randn(len(h), len(qk)).to(dtype), torch.randn(len(h), len(w)).to(dtype)
        q, k = torch.randn(2, self.size, self.heads, count, len(qk) // (2 * self.heads)).to(dtype)
        p = torch.randn(self.size, self.heads, count, count).to(dtype)

        def sweep() -> object:
            scores = q @ k.transpose(-1, -2), p @ k, p.transpose(-1, -2) @ q
            return F.linear(h, qk), *scores, both @ qk, F.linear(h, w), hidden @ w

        return sweep

    def flops(self) -> int:
        count, _ = self.energy.shapes["tokens"]
        rows = len(self.qk) // 2
        # queries and keys there and back, the potential there and back; the scores, and two products with them
        return 2 * (2 * count * (self.qk.numel() + self.w.numel())) + 3 * (2 * count * count * rows)


def _size(t: Tensor) -> Tensor:
    # over the last axes rather than flattened, which would copy a channels-last tensor
    return torch.linalg.vector_norm(t, dim=(1, 2, 3))


CASES: dict[str, type[Case]] = {"mlp": LateralCase, "conv": ConvCase, "transformer": TransformerCase}
"""ToroidalMLP 512, ConvHopfield 32-64 and LoopedTransformer as shipped."""
