"""Chains of some nodes over the energy that the others leave: the law and its contrasts against quadrature."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laws import driven, weighted
from toreq import Equilibrium
from toreq.core import Bilinear, Dense, Drive, Energy, HardSigmoid, Identity, Node, Tanh
from toreq.errors import ConfigError
from toreq.estimators import Thermal
from toreq.solvers import Langevin, Relaxation

X = torch.tensor([[0.7]], dtype=torch.float64)
FLAT, STEEP, TAU = 0.5, 3.0, 0.2


def pair() -> Energy:
    """A visible unit pulled by the input and a steep hidden one that settles."""
    nodes = [Node("v", 1, Identity(FLAT)), Node("h", 1, Tanh(STEEP))]
    couplings = [driven("v", 1.1, 0.2), driven("h", 0.0, -0.3), Bilinear(weighted(Dense(1, 1), 0.5), "v", "h")]
    return Energy(nodes, couplings).double()


def exact(energy: Energy) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Mean and covariance of (v, h) under ``exp(-min_h E / tau)`` by quadrature over v, and the derivatives of the
    mean of v - 2h by all parameters."""
    drive_v, drive_h, coupling = energy.couplings
    assert isinstance(drive_v, Drive)
    assert isinstance(drive_h, Drive)
    assert isinstance(coupling, Bilinear)
    v = torch.linspace(-6, 8, 4001, dtype=torch.float64)
    assert isinstance(coupling.op, Dense)
    f = drive_h.module(X)[0, 0] + coupling.op.weight[0, 0] * v
    # Phi*(h) - h f is least, -Phi(f), at h = tanh(g f)
    left = v.square() / (2 * FLAT) - v * drive_v.module(X)[0, 0] - (STEEP * f).cosh().log() / STEEP
    p, h = torch.softmax(-left / TAU, 0), (STEEP * f).tanh()
    both = torch.stack([v, h], 1)
    mean = p @ both
    named = [w for _, w in sorted(energy.named_parameters())]
    grads = torch.autograd.grad(mean[0] - 2 * mean[1], named)
    off = (both - mean).detach()
    return mean.detach(), (p.detach()[:, None] * off).T @ off, list(grads)


def chain(eta: float, **more: object) -> Langevin:
    options = {"temperature": TAU, "step_size": eta, "preconditioned": True, "noisy": ("v",)}
    return Langevin(**{**options, "burn_in": round(8 / eta), "samples": 8, "thin": round(1 / eta), **more})  # type: ignore[arg-type]


def drawn(energy: Energy, eta: float) -> Tensor:
    problem = Relaxation(energy, energy.bind(X.expand(4000, 1)))
    start = {n: torch.zeros(4000, 1, dtype=torch.float64) for n in "vh"}
    return torch.cat([torch.cat([h["v"], h["h"]], 1) for _, h in chain(eta).sample(problem, start)])


def test_law_of_the_energy_that_settled_nodes_leave() -> None:
    """Mean and covariance, with an error that falls with the step."""
    energy = pair()
    mean, covariance, _ = exact(energy)
    scale, off = covariance.diagonal().sqrt(), []
    for eta in (0.4, 0.05):
        samples = drawn(energy, eta)
        found = samples.T.cov()
        off.append(float(((found - covariance) / scale[:, None] / scale[None, :]).abs().max()))
        if eta < 0.1:
            assert float(((samples.mean(0) - mean) / scale).abs().max()) < 0.03
    assert off[1] < 0.06 < 0.12 < off[0]
    # what noise in both units would give is another law
    assert float(covariance[1, 1]) < 0.5 * TAU * STEEP


def test_contrast_of_the_laws_is_the_derivative() -> None:
    energy = pair()
    _, _, wanted = exact(energy)
    layer = Equilibrium(energy, chain(0.05), Thermal(beta=0.02), readout=("v", "h"))
    out = layer(X.expand(4000, 1))
    (out["v"] - 2 * out["h"]).mean().backward()
    found = [w.grad for _, w in sorted(energy.named_parameters())]
    size = max(float(w.abs().max()) for w in wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one is not None
        assert float((one - other).abs().max()) < 0.05 * size


def test_settled_nodes_need_no_law() -> None:
    nodes = [Node("v", 1, Identity(0.5)), Node("h", 1, HardSigmoid(1.0))]
    energy = Energy(nodes, [Bilinear(weighted(Dense(1, 1), 0.5), "v", "h")]).double()
    assert not chain(0.1).refusal(energy)
    problem = Relaxation(energy, energy.bind(X.expand(5, 1)))
    solution = chain(0.1).solve(problem, {n: torch.ones(5, 1, dtype=torch.float64) for n in "vh"})
    assert all(bool(t.isfinite().all()) for t in solution.h.values())
    assert bool((solution.h["h"] >= 0).all())
    assert "HardSigmoid" in chain(0.1, noisy=("h",)).refusal(energy)
    assert "no nodes ['z']" in chain(0.1, noisy=("z",)).refusal(energy)


@pytest.mark.parametrize("wrong", [{"noisy": ()}, {"adjusted": True}])
def test_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="noisy"):
        chain(0.1, **wrong)


def test_nudges_are_in_units_of_the_slope() -> None:
    """Of nodes of any slope the relative nudge alone moves the same share."""
    torch.manual_seed(3)
    for gain in (1.0, 500.0):
        energy = Energy([Node("v", 3, Identity(gain))], [Drive("v", torch.nn.Linear(2, 3))]).double()
        # so cold that a sample is hardly larger than the mean
        layer = Equilibrium(energy, Langevin(temperature=1e-4 * gain, step_size=0.5, preconditioned=True), Thermal())
        out = layer(torch.ones(5, 2, dtype=torch.float64))
        out.square().sum().backward()
        response = layer.last.nudged.response  # type: ignore[union-attr]
        assert response is not None
        assert float((response - 0.05).abs().max()) < 0.005
