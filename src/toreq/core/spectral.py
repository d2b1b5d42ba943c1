"""How strongly a relaxation contracts: the spectral radius of its Jacobian, and the products it is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from toreq.core.energy import Dynamics
from toreq.core.state import Bindings, State, norm, scaled

LinearMap = Callable[[State], State]


def field_products(dynamics: Dynamics, h: State, bindings: Bindings, both: bool = False) -> tuple[LinearMap, LinearMap]:
    r"""The maps :math:`w \mapsto J^\top w` and :math:`w \mapsto J w` with :math:`J = \partial f/\partial h` at ``h``.

    One graph is built and kept, whatever the number of products. The second map needs double backward through the field
    (it differentiates the first) and is only built when ``both``; otherwise it is the first map.
    """
    names = dynamics.names
    # fused attention kernels have no second derivative
    kernels = sdpa_kernel(SDPBackend.MATH) if both else contextlib.nullcontext()
    with torch.enable_grad(), kernels:
        point = {n: t.detach().requires_grad_() for n, t in h.items()}
        field = dynamics.map(point, bindings)
        dummies = {n: torch.zeros_like(t).requires_grad_() for n, t in field.items()}
        # zero-weighted sum keeps grad() defined when some node's field does not depend on the state
        outputs = [field[n] + 0 * point[n] for n in names]
        pulled = torch.autograd.grad(
            outputs, [point[n] for n in names], [dummies[n] for n in names], create_graph=both, retain_graph=True,
            materialize_grads=True,
        ) if both else ()  # fmt: skip

    def transpose(w: State) -> State:
        grads = torch.autograd.grad(
            outputs,
            [point[n] for n in names],
            [w[n] for n in names],
            retain_graph=True,
            materialize_grads=True,
        )
        return dict(zip(names, grads, strict=True))

    def forward(w: State) -> State:
        keep = [i for i, p in enumerate(pulled) if p.requires_grad]
        grads = torch.autograd.grad(
            [pulled[i] for i in keep], [dummies[n] for n in names], [w[names[i]] for i in keep],
            retain_graph=True, materialize_grads=True,
        )  # fmt: skip
        return dict(zip(names, grads, strict=True))

    return transpose, forward if both else transpose


def relaxation_radius(
    dynamics: Dynamics,
    bindings: Bindings,
    a: State,
    iterations: int = 60,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Spectral radius, per example, of :math:`\partial f(\sigma(a))/\partial a` by power iteration.

    Below 1 the undamped relaxation contracts near this state. Computed on the transpose :math:`\sigma' J^\top`, whose
    spectrum is the same; the rate is the geometric mean over the second half of the iterations, which is right for
    complex pairs of eigenvalues too.

    Args:
        dynamics: the network.
        bindings: of B examples.
        a: an equilibrium, each node ``(B, ...)``.
        iterations: products to take, at least 4.
        generator: source of the start vector; seed 0 when None.

    Returns:
        ``(B,)``.
    """
    h = {n: t.detach() for n, t in dynamics.activate(a, bindings).items()}
    transpose, _ = field_products(dynamics, h, bindings)
    first = next(iter(a.values()))
    generator = generator or torch.Generator(device=first.device).manual_seed(0)
    v = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device) for n, t in a.items()}
    tiny = torch.finfo(first.dtype).tiny
    v = scaled(v, 1 / norm(v).clamp_min(tiny))
    logs = []
    with torch.no_grad():
        for _ in range(max(iterations, 4)):
            v = dynamics.derivative(a, h, transpose(v), bindings)
            size = norm(v)
            logs.append(size.clamp_min(tiny).log())
            v = scaled(v, 1 / size.clamp_min(tiny))
    tail = logs[len(logs) // 2 :]
    return torch.stack(tail).mean(0).exp()
