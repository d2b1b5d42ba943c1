"""Operators against explicit matrices: adjoint identity, weight gradient, norm, shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from toreq.core import Circulant, Conv, Dense, IdentityOperator, Operator, Resample
from toreq.errors import ConfigError


def _operators(seed: int = 0) -> dict[str, Operator]:
    g = torch.Generator().manual_seed(seed)
    made: dict[str, Operator] = {
        "identity": IdentityOperator((2, 3)),
        "dense": Dense(5, 3, generator=g),
        "dense_symmetric": Dense(4, 4, symmetric=True, generator=g),
        "dense_shapes": Dense((2, 3, 2), (3, 2), generator=g),
        "dense_symmetric_shape": Dense((2, 3), (2, 3), symmetric=True, generator=g),
        "conv": Conv((2, 6, 5), 3, kernel=3, generator=g),
        "conv_padded": Conv((2, 5, 5), 3, kernel=3, padding=1, generator=g),
        "conv_stride": Conv((1, 8, 7), 2, kernel=3, stride=2, padding=1, generator=g),
        "conv_stride_3": Conv((2, 9, 8), 2, kernel=2, stride=3, generator=g),
        "conv_pool": Conv((2, 8, 8), 3, kernel=3, padding=1, pool=2, generator=g),
        "conv_pool_odd": Conv((1, 9, 8), 2, kernel=3, padding=1, pool=2, generator=g),
        "conv_all": Conv((2, 11, 10), 3, kernel=3, stride=2, padding=1, pool=2, generator=g),
        "conv_symmetric": Conv((3, 5, 4), 3, kernel=3, padding=1, symmetric=True, generator=g),
        "resample_1d": Resample((3, 8), 2, dims=1),
        "resample_2d": Resample((2, 6, 9), 3, dims=2),
        "circulant": Circulant(7, generator=g),
        "circulant_even": Circulant(6, symmetric=True, generator=g),
        "circulant_odd": Circulant(7, symmetric=True, generator=g),
    }
    return {name: op.double() for name, op in made.items()}


EACH = pytest.mark.parametrize("name", list(_operators()))


def _draw(shape: tuple[int, ...], seed: int, batch: int = 4) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _matrix(op: Operator) -> Tensor:
    """The operator as an explicit matrix, one basis vector at a time."""
    n = int(torch.tensor(op.in_shape).prod())
    columns = op(torch.eye(n, dtype=torch.float64).view(n, *op.in_shape))
    return columns.flatten(1).T.detach()


@EACH
def test_adjoint_identity(name: str) -> None:
    op = _operators()[name]
    u, w = _draw(op.in_shape, 1), _draw(op.out_shape, 2)
    assert op(u).shape == w.shape
    assert op.adjoint(w).shape == u.shape
    left, right = (op(u) * w).flatten(1).sum(1), (u * op.adjoint(w)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    matrix = _matrix(op)
    torch.testing.assert_close(op.adjoint(w).flatten(1), w.flatten(1) @ matrix, rtol=1e-12, atol=1e-12)
    if op.symmetric:
        torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    pool=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_adjoint_identity_of_any_convolution(
    size: tuple[int, int], kernel: int, stride: int, padding: int, pool: int, seed: int
) -> None:
    out = [(s + 2 * padding - kernel) // stride + 1 for s in size]
    assume(padding < kernel and min(s // pool for s in out) >= 1 and all(s + 2 * padding >= kernel for s in size))
    g = torch.Generator().manual_seed(seed)
    op = Conv((2, *size), 3, kernel, stride, padding, pool, generator=g).double()
    u, w = _draw(op.in_shape, seed), _draw(op.out_shape, seed + 1)
    reference = torch.nn.functional.conv2d(u, op.weight, stride=stride, padding=padding)
    reference = torch.nn.functional.avg_pool2d(reference, pool)
    torch.testing.assert_close(op(u), reference)
    torch.testing.assert_close((op(u) * w).sum(), (u * op.adjoint(w)).sum(), rtol=1e-10, atol=1e-10)
    _check_gradient(op, u, w)


def _check_gradient(op: Operator, u: Tensor, w: Tensor) -> None:
    t = {k: v.detach().requires_grad_() for k, v in op.tensors().items()}
    if not t:
        return
    wanted = torch.autograd.grad((w * op(u, t)).sum(), list(t.values()))
    found = op.gradient(w, u, {k: v.detach() for k, v in t.items()})
    assert set(found) == set(t)
    for g, key in zip(wanted, t, strict=True):
        torch.testing.assert_close(found[key], g, rtol=1e-11, atol=1e-12)


@EACH
def test_weight_gradient_against_autograd(name: str) -> None:
    op = _operators()[name]
    _check_gradient(op, _draw(op.in_shape, 3), _draw(op.out_shape, 4))


@EACH
def test_fused_additions(name: str) -> None:
    op = _operators()[name]
    t = op.tensors()
    u, w = _draw(op.in_shape, 5), _draw(op.out_shape, 6)
    kept = w.clone(), u.clone()
    torch.testing.assert_close(op.add(w, u, t), w + op(u))
    torch.testing.assert_close(op.add(None, u, t), op(u))
    torch.testing.assert_close(op.add_adjoint(u, w, t), u + op.adjoint(w))
    torch.testing.assert_close(op.add_adjoint(None, w, t), op.adjoint(w))
    assert torch.equal(w, kept[0])
    assert torch.equal(u, kept[1])


@EACH
def test_norm_is_the_largest_singular_value(name: str) -> None:
    op = _operators()[name]
    wanted = float(torch.linalg.matrix_norm(_matrix(op), 2))
    assert op.norm(iterations=2000) == pytest.approx(wanted, rel=1e-4)


def test_dense_acts_on_the_last_axis_of_tokens() -> None:
    op = Dense(5, 3, generator=torch.Generator().manual_seed(0)).double()
    u = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(op(u), u @ op.weight.T)
    torch.testing.assert_close(op.adjoint(op(u)), u @ op.weight.T @ op.weight)
    w = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(op.add(w, u, op.tensors()), w + u @ op.weight.T)
    torch.testing.assert_close(op.gradient(w, u, op.tensors())["weight"], torch.einsum("bno,bni->oi", w, u))


def test_symmetric_scale_is_that_of_the_effective_weight() -> None:
    op = Dense(400, 400, symmetric=True, scale=0.1, generator=torch.Generator().manual_seed(0))
    effective = op.tensors()["weight"].detach()
    off = effective[~torch.eye(400, dtype=torch.bool)]
    assert float(off.std()) == pytest.approx(0.1, rel=0.02)


def test_circulant_is_a_circular_convolution() -> None:
    op = Circulant(5, generator=torch.Generator().manual_seed(0)).double()
    k = op.kernel.detach()
    rows = torch.stack([torch.stack([k[(i - j) % 5] for j in range(5)]) for i in range(5)])
    torch.testing.assert_close(_matrix(op), rows, rtol=1e-12, atol=1e-12)


def test_resample_averages() -> None:
    op = Resample((1, 2, 4), 2, dims=2)
    u = torch.arange(8.0).view(1, 1, 2, 4)
    torch.testing.assert_close(op(u), torch.tensor([[[[2.5, 4.5]]]]))


@pytest.mark.parametrize("name", ["dense", "conv_all", "circulant", "circulant_even", "resample_2d"])
def test_operators_accept_complex_states(name: str) -> None:
    """The adjoint is the transpose, not the conjugate transpose: the holomorphic estimator needs it analytic."""
    op = _operators()[name]
    t = {k: v.detach().to(torch.complex128) for k, v in op.tensors().items()}
    u = torch.complex(_draw(op.in_shape, 1), _draw(op.in_shape, 2))
    w = torch.complex(_draw(op.out_shape, 3), _draw(op.out_shape, 4))
    torch.testing.assert_close(op(u, t), torch.complex(op(u.real), op(u.imag)), rtol=1e-10, atol=1e-12)
    left, right = (op(u, t) * w).sum(), (u * op.adjoint(w, t)).sum()
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="equal sizes when symmetric"):
        Dense(3, 4, symmetric=True)
    with pytest.raises(ConfigError, match=r"in_shape \(C, H, W\)"):
        Conv((8, 8), 2)
    with pytest.raises(ConfigError, match="pixels a side"):
        Conv((1, 3, 3), 2, kernel=5)
    with pytest.raises(ConfigError, match="pixels a side"):
        Conv((1, 4, 4), 2, kernel=3, pool=3)
    with pytest.raises(ConfigError, match="when symmetric"):
        Conv((2, 5, 5), 3, kernel=3, padding=1, symmetric=True)
    with pytest.raises(ConfigError, match="when symmetric"):
        Conv((2, 5, 5), 2, kernel=3, stride=2, padding=1, symmetric=True)
    with pytest.raises(ConfigError, match="divisible by 2"):
        Resample((1, 5, 4), 2, dims=2)
    with pytest.raises(ConfigError, match="factor >= 1"):
        Resample((4,), 2, dims=2)
