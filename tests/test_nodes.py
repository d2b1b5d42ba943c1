"""Activations against their potentials: gradient, convexity, Fenchel-Young, derivative."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from toreq.core import Activation, HardSigmoid, Identity, LayerNorm, Node, ReLU, Softmax, Tanh, activation
from toreq.core.functions import log_cosh, log_sum_exp, softmax
from toreq.core.nodes import ACTIVATIONS
from toreq.errors import ConfigError


def _layer_norm(features: int = 5) -> LayerNorm:
    norm = LayerNorm(features).double()
    with torch.no_grad():
        norm.log_gain.fill_(0.4)
        norm.bias.copy_(torch.linspace(-1, 1, features))
    return norm


CASES = {
    "identity": Identity(),
    "clamped identity": Identity(0.2),
    "tanh": Tanh(),
    "steep tanh": Tanh(3.0),
    "hard_sigmoid": HardSigmoid(),
    "clamped hard_sigmoid": HardSigmoid(0.2),
    "relu": ReLU(),
    "steep relu": ReLU(16.0),
    "softmax": Softmax(),
    "steep softmax": Softmax(3.0),
    "layer_norm": _layer_norm(),
}
EACH = pytest.mark.parametrize("sigma", CASES.values(), ids=CASES.keys())


def _points(shape: tuple[int, ...] = (6, 3, 5), scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@EACH
def test_activation_is_the_gradient_of_its_potential(sigma: Activation) -> None:
    a = _points().requires_grad_()
    assert sigma.potential(a).shape == (6,)
    (grad,) = torch.autograd.grad(sigma.potential(a).sum(), a)
    torch.testing.assert_close(sigma(a), grad, rtol=1e-12, atol=1e-12)


@EACH
def test_activation_by_finite_differences(sigma: Activation) -> None:
    a, eps = _points(), 1e-6
    for seed in range(3):
        d = _points(seed=seed + 1)
        slope = (sigma.potential(a + eps * d) - sigma.potential(a - eps * d)) / (2 * eps)
        torch.testing.assert_close((sigma(a) * d).flatten(1).sum(1), slope, rtol=1e-7, atol=1e-7)


@EACH
@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (4, 2, 3, 5)])
def test_potential_is_one_number_per_example(sigma: Activation, shape: tuple[int, ...]) -> None:
    a = _points(shape)
    together = sigma.potential(a)
    assert together.shape == (4,)
    alone = torch.cat([sigma.potential(a[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@EACH
def test_fenchel_young(sigma: Activation) -> None:
    """Equality at a pair ``h = sigma(a)``, inequality for every other a (which is convexity of the potential)."""
    a, other = _points(), _points(seed=3, scale=2.0)
    h = sigma(a)
    conjugate = sigma.conjugate(a, h)
    torch.testing.assert_close(sigma.potential(a) + conjugate, (a * h).flatten(1).sum(1), rtol=1e-12, atol=1e-12)
    slack = sigma.potential(other) + conjugate - (other * h).flatten(1).sum(1)
    assert bool((slack >= -1e-10).all())
    assert bool((slack > 1e-4).any()), "a linear potential would satisfy the inequality trivially"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), t=st.floats(0, 1))
def test_potentials_are_convex(seed: int, t: float) -> None:
    for sigma in CASES.values():
        a, b = _points((2, 5), 3.0, seed), _points((2, 5), 3.0, seed + 1)
        chord = t * sigma.potential(a) + (1 - t) * sigma.potential(b)
        assert bool((sigma.potential(t * a + (1 - t) * b) <= chord + 1e-9).all())
        # gradients of convex functions are monotone
        assert bool((((sigma(a) - sigma(b)) * (a - b)).sum(1) >= -1e-10).all())


@EACH
def test_derivative_is_the_jacobian(sigma: Activation) -> None:
    a, w = _points(), _points(seed=4)
    leaf = a.clone().requires_grad_()
    h = sigma(leaf)
    (wanted,) = torch.autograd.grad(h, leaf, w)
    found = sigma.derivative(a, h.detach(), w)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-10, atol=1e-12)
    other = _points(seed=5)
    left = (sigma.derivative(a, h.detach(), w) * other).sum()
    right = (sigma.derivative(a, h.detach(), other) * w).sum()
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)  # a Hessian is symmetric


@EACH
def test_increment_is_the_difference_of_two_activations(sigma: Activation) -> None:
    origin, step = _points(), _points(seed=6, scale=1e-3)
    h = sigma(origin)
    found = sigma.increment(origin + step, origin, h)
    torch.testing.assert_close(found, sigma(origin + step) - h, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("gain", [1.0, 4.0])
def test_a_small_increment_of_tanh_keeps_its_digits_in_float32(gain: float) -> None:
    """A coarse level responds with 1e-7 around small activations; the fast tanh is exact to 1e-7 of 1 only."""
    sigma = Tanh(gain)
    origin = _points((4, 50), 0.01).float()
    a = origin + 1e-3 * _points((4, 50), 0.01, seed=7).float()
    wanted = sigma(a.double()) - sigma(origin.double())
    found = sigma.increment(a, origin, sigma(origin)).double()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert float(((sigma(a) - sigma(origin)).double() - wanted).norm() / wanted.norm()) > 1e-4


SAMPLED = [name for name, sigma in CASES.items() if sigma.samples]


@pytest.mark.parametrize("name", SAMPLED)
def test_log_slope_is_the_log_determinant_of_the_jacobian(name: str) -> None:
    sigma, a = CASES[name], _points((4, 2, 3), 0.3).requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda one: sigma(one[None])[0], a[0].detach())
    found = sigma.log_slope(a, sigma(a))
    assert found.shape == (4,)
    torch.testing.assert_close(found[0], torch.linalg.slogdet(jacobian.view(6, 6)).logabsdet, rtol=1e-12, atol=1e-12)
    (wanted,) = torch.autograd.grad(found.sum() + 0 * a.sum(), a)
    torch.testing.assert_close(sigma.log_slope_gradient(a, sigma(a)), wanted, rtol=1e-11, atol=1e-12)


def test_log_slope_of_a_saturated_unit_is_finite() -> None:
    a = torch.tensor([[60.0]])
    torch.testing.assert_close(Tanh().log_slope(a, Tanh()(a)), torch.tensor([-120.0 + 2 * math.log(2)]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hard_sigmoid", "flat outside"),
        ("relu", "flat below 0"),
        ("softmax", "adding a constant"),
        ("layer_norm", "adding a constant"),
    ],
)
def test_activations_that_cannot_be_sampled_say_why(name: str, reason: str) -> None:
    sigma, a = CASES[name], _points((2, 5))
    assert set(SAMPLED) == {"identity", "clamped identity", "tanh", "steep tanh"}
    assert reason in sigma.unsampled
    with pytest.raises(ConfigError, match=reason):
        sigma.log_slope(a, sigma(a))
    with pytest.raises(ConfigError, match=reason):
        sigma.log_slope_gradient(a, sigma(a))


@pytest.mark.parametrize("kappa", [0.5, 4.0])
def test_a_gain_below_one_and_a_drive_are_a_soft_clamp(kappa: float) -> None:
    """The node's energy is that of the ordinary identity beside a spring to the input, up to a constant."""
    x, field = _points((3, 4)), 0.3 * _points((3, 4), seed=8)
    for kind, low, high in ((Identity, -math.inf, math.inf), (HardSigmoid, 0.0, 1.0)):
        sigma = kind(1 / (1 + kappa))
        a = field + kappa * x
        h = sigma(a)
        torch.testing.assert_close(h, ((field + kappa * x) / (1 + kappa)).clamp(low, high), rtol=1e-12, atol=1e-12)
        own = sigma.conjugate(a, h) - kappa * (h * x).sum(1)
        clamp = 0.5 * (h * h).sum(1) + 0.5 * kappa * (h - x).square().sum(1)
        if kind is Identity:
            torch.testing.assert_close(own, clamp - 0.5 * kappa * (x * x).sum(1), rtol=1e-12, atol=1e-12)
        # on [0, 1] the relaxed state is the minimum of the clamped energy under this field
        for other in (h + 0.01, h - 0.01):
            near = other.clamp(low, high)
            value = 0.5 * (near * near).sum(1) + 0.5 * kappa * (near - x).square().sum(1) - (field * near).sum(1)
            assert bool((value >= clamp - (field * h).sum(1) - 1e-12).all())


@pytest.mark.parametrize("kind", [Identity, Tanh, HardSigmoid, ReLU, Softmax])
@pytest.mark.parametrize("gain", [0.0, -1.0, math.nan, math.inf])
def test_a_gain_must_be_positive(kind: type, gain: float) -> None:
    with pytest.raises(ConfigError, match="gain > 0"):
        kind(gain)


@pytest.mark.parametrize("name", ["identity", "clamped identity", "tanh", "softmax", "layer_norm"])
def test_analytic_activations_continue_the_real_ones(name: str) -> None:
    """On the real axis they agree, and the directional derivative into the imaginary axis is i times the real one."""
    sigma = CASES[name]
    assert sigma.analytic
    a, d, eps = _points(), _points(seed=6), 1e-6
    complex_a = a.to(torch.complex128)
    bound = sigma.bind().map(lambda t: t.to(torch.complex128), lambda t: t)
    torch.testing.assert_close(sigma(complex_a, bound).real, sigma(a), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sigma.potential(complex_a, bound).real, sigma.potential(a), rtol=1e-12, atol=1e-12)
    real = (sigma(a + eps * d) - sigma(a - eps * d)) / (2 * eps)
    imaginary = (sigma(complex_a + 1j * eps * d, bound) - sigma(complex_a - 1j * eps * d, bound)) / (2j * eps)
    torch.testing.assert_close(imaginary.real, real, rtol=1e-6, atol=1e-7)
    slope = (sigma.potential(complex_a + 1j * eps * d, bound) - sigma.potential(complex_a - 1j * eps * d, bound)) / (
        2j * eps
    )
    torch.testing.assert_close(slope.real, (sigma(a) * d).flatten(1).sum(1), rtol=1e-6, atol=1e-6)


def test_kinked_activations_say_so() -> None:
    assert not HardSigmoid.analytic
    assert not HardSigmoid.smooth
    assert not ReLU.analytic
    assert Tanh.smooth
    assert Softmax.analytic


def test_closed_forms() -> None:
    a = torch.tensor([[-2.0, 0.25, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(HardSigmoid()(a), torch.tensor([[0.0, 0.25, 1.0]], dtype=torch.float64))
    wanted = 0.25**2 / 2 + 3.0 - 0.5
    torch.testing.assert_close(HardSigmoid().potential(a), torch.tensor([wanted], dtype=torch.float64))
    torch.testing.assert_close(ReLU()(a), torch.tensor([[0.0, 0.25, 3.0]], dtype=torch.float64))
    torch.testing.assert_close(Softmax()(a).sum(-1), torch.ones(1, dtype=torch.float64))
    norm = LayerNorm(3, eps=1e-12).double()
    h = norm(a)
    torch.testing.assert_close(h.mean(-1), torch.zeros(1, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(h.var(-1, unbiased=False), torch.ones(1, dtype=torch.float64))
    reference = torch.nn.functional.layer_norm(a, (3,), eps=1e-12)
    torch.testing.assert_close(h, reference)


def test_stable_functions_neither_overflow_nor_lose_digits() -> None:
    big = torch.tensor([[-1e4, 0.0, 1e4]], dtype=torch.float64)
    wanted = torch.tensor([[1e4 - math.log(2), 0.0, 1e4 - math.log(2)]], dtype=torch.float64)
    torch.testing.assert_close(log_cosh(big), wanted, rtol=1e-15, atol=1e-15)
    assert bool(torch.isfinite(log_cosh(big.to(torch.complex128)).real).all())
    assert bool(torch.isfinite(log_sum_exp(big.to(torch.complex128)).real).all())
    torch.testing.assert_close(softmax(big.to(torch.complex128)).real, big.softmax(-1))
    torch.testing.assert_close(log_cosh(torch.tensor([0.3])), torch.tensor([0.3]).cosh().log())


def test_names_and_bad_input() -> None:
    assert set(ACTIVATIONS) == {"identity", "tanh", "hard_sigmoid", "relu", "softmax"}
    for name, kind in ACTIVATIONS.items():
        assert type(activation(name)) is kind
    with pytest.raises(ConfigError, match="did you mean 'tanh'"):
        activation("tahn")
    with pytest.raises(ConfigError, match="features >= 2"):
        LayerNorm(1)
    with pytest.raises(ConfigError, match="name like"):
        Node("not a name", 3, Tanh())
    with pytest.raises(ConfigError, match="positive sizes"):
        Node("h", (), Tanh())
    with pytest.raises(ConfigError, match="positive sizes"):
        Node("h", (3, 0), Tanh())
    assert Node("h", 3, Tanh()).shape == (3,)
