"""Any ordinary block as an equilibrium layer, in both forms, against Implicit."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import toreq
from oracles import EXACT, assert_aligned, assert_close, assert_finite_differences, gradients, precise, quadratic
from toreq.errors import ConfigError
from toreq.estimators import Centered, NonConservative, Predictive
from toreq.solvers import Anderson, FixedPoint
from zoo import AttentionBlock, Block, linear

Form = Literal["vector_field", "residual"]
TIGHT = FixedPoint(damping=0.7, max_steps=2000, tolerance=1e-13, check_every=4)


def _block(name: str) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...]]:
    """An ordinary block, the shape of its state and of its input."""
    g = torch.Generator().manual_seed(0)
    if name == "mlp":
        return Block(5, g, inputs=4), (5,), (4,)
    if name == "attention":
        return AttentionBlock(6, g), (4, 6), (4, 6)

    class Convolutional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
            self.norm = nn.GroupNorm(1, 2, dtype=torch.float64)
            with torch.no_grad():
                self.conv.weight.copy_(torch.randn(2, 2, 3, 3, generator=g) * 0.1)
                self.conv.bias.copy_(torch.randn(2, generator=g) * 0.1)  # type: ignore[union-attr]

        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return 0.5 * self.norm(self.conv(h) + x).tanh()

    return Convolutional(), (2, 4, 4), (2, 4, 4)


BLOCKS = ["mlp", "attention", "conv"]


def _wrapped(name: str, form: Form, estimator: Any = None, solver: Any = TIGHT) -> tuple[toreq.Equilibrium, Tensor]:
    block, shape, inputs = _block(name)
    x = torch.randn(3, *inputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return toreq.wrap(block, shape, form, solver=solver, estimator=estimator), x


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("form", ["vector_field", "residual"])
def test_output_is_the_blocks_fixed_point(name: str, form: Form) -> None:
    layer, x = _wrapped(name, form)
    with torch.no_grad():
        h = layer(x)
        block, _, _ = _block(name)
        torch.testing.assert_close(h, block(h, x), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    ("form", "estimator"),
    [("vector_field", NonConservative()), ("residual", Predictive()), ("residual", NonConservative())],
)
def test_gradient_against_implicit(name: str, form: Form, estimator: Any) -> None:
    loss = quadratic()
    reference, x = _wrapped(name, "vector_field", EXACT)
    wanted = gradients(reference, x, loss)
    if name == "mlp":
        assert_finite_differences(reference, x, loss, wanted)
    layer, _ = _wrapped(name, form, precise(estimator))
    found = {n.replace("couplings.0.", ""): g for n, g in gradients(layer, x, loss).items()}
    assert_close(found, wanted, rtol=1e-4, small=1e-3)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("form", ["vector_field", "residual"])
@pytest.mark.parametrize("solver", [FixedPoint(max_steps=200), Anderson()], ids=["fixed_point", "anderson"])
def test_shipped_settings_in_float32(name: str, form: Form, solver: Any) -> None:
    loss = quadratic()
    reference, x = _wrapped(name, form, EXACT)
    wanted = gradients(reference, x, loss)
    block, shape, _ = _block(name)
    layer = toreq.wrap(block.float(), shape, form, solver=solver)
    assert type(layer.estimator) is (NonConservative if form == "vector_field" else Predictive)
    assert_aligned(gradients(layer, x.float(), loss), wanted, least=0.999, ratio=0.03)


def test_residual_energy_learns_by_centered_too() -> None:
    layer, x = _wrapped("mlp", "residual", precise(Centered()))
    reference, _ = _wrapped("mlp", "residual", EXACT)
    assert_close(gradients(layer, x, quadratic()), gradients(reference, x, quadratic()), rtol=1e-4)


def test_input_added_instead_of_passed() -> None:
    g = torch.Generator().manual_seed(0)
    block = nn.Sequential(linear(5, 7, g, 0.5), nn.Tanh(), linear(7, 5, g, 0.5))
    x = torch.randn(3, 5, generator=g, dtype=torch.float64)
    layer = toreq.wrap(block, 5, inject="add", solver=TIGHT)
    with torch.no_grad():
        h = layer(x)
        torch.testing.assert_close(h, block(h + x), rtol=1e-10, atol=1e-11)
    reference = toreq.wrap(block, 5, inject="add", solver=TIGHT, estimator=EXACT)
    layer.estimator = precise(Predictive())
    assert_close(gradients(layer, x, quadratic()), gradients(reference, x, quadratic()), rtol=1e-4)


def test_a_block_with_buffers_and_tied_weights() -> None:
    class Tied(nn.Module):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.up = linear(5, 5, torch.Generator().manual_seed(0), 0.4)
            self.down = nn.Linear(5, 5, bias=False, dtype=torch.float64)
            self.down.weight = self.up.weight
            self.register_buffer("scale", torch.tensor(0.8, dtype=torch.float64))
            self.register_buffer("count", torch.tensor(3))

        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return x + self.scale * self.down(self.up(h).tanh())

    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for form, estimator in (("vector_field", NonConservative()), ("residual", Predictive())):
        layer = toreq.wrap(Tied(), 5, form, solver=TIGHT, estimator=precise(estimator))  # type: ignore[arg-type]
        reference = toreq.wrap(Tied(), 5, form, solver=TIGHT, estimator=EXACT)  # type: ignore[arg-type]
        found = gradients(layer, x, quadratic())
        assert_close(found, gradients(reference, x, quadratic()), rtol=1e-4)
        assert_finite_differences(reference, x, quadratic(), gradients(reference, x, quadratic()))


def test_a_wrapped_block_trains() -> None:
    block, shape, _ = _block("mlp")
    layer = toreq.wrap(block.float(), shape, "residual", solver=FixedPoint(damping=0.7))
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(32, 4, generator=g), torch.randn(32, 5, generator=g) * 0.3
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_bad_blocks_are_refused() -> None:
    # a TypeError where annotations are checked at run time
    with pytest.raises((ConfigError, TypeError), match="form"):
        toreq.wrap(nn.Linear(3, 3), 3, form="energy")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"BatchNorm1d at '1'; use LayerNorm or GroupNorm"):
        toreq.wrap(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), 3)
    for form in ("residual", "vector_field"):
        with pytest.raises(ConfigError, match=r"Dropout\(p=0.1\) at '.*0'"):
            toreq.wrap(nn.Sequential(nn.Dropout(0.1)), 3, form, inject="add")  # type: ignore[arg-type]
    layer = toreq.wrap(nn.Linear(3, 4), 3, "vector_field", inject="add")
    with pytest.raises(ConfigError, match="output of its input's shape"):
        layer(torch.zeros(2, 3))
    misfit = toreq.wrap(nn.Linear(3, 4), 3, "residual", inject="add")
    with pytest.raises((ConfigError, RuntimeError)):
        misfit(torch.zeros(2, 3))


def test_recurrent_dropout_and_lazy_statistics_are_refused() -> None:
    """Not only ``nn.Dropout``: attention and recurrent modules have a dropout of their own."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return self.attention(h + x, h + x, h + x)[0]

    with pytest.raises(ConfigError, match=r"dropout|deterministic"):
        toreq.wrap(Attention(), (3, 4))
