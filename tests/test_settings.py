"""The settings fast and exact of shipped systems, and the compiled engine."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import cosine
from toreq import Equilibrium, systems
from toreq import layer as layer_module
from toreq.core import Bilinear, Dense, Drive, Energy, Node, Tanh
from toreq.errors import ConfigError
from toreq.estimators import Centered, Implicit
from toreq.hardware import multiplies_bfloat16
from toreq.solvers import Anderson, FixedPoint, Relaxation, Solver
from toreq.systems import System
from toreq.training import TrainConfig
from toreq.training import checkpoint as folder
from toreq.training.build import build
from zoo import linear

SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": (96,)},
    "hopfield": {"hidden": (96, 80)},
    "conv": {"channels": (8, 12)},
    "transformer": {"features": 64, "heads": 2, "hidden": 80, "patch": 7},
}
EACH_ARCH = pytest.mark.parametrize("arch", SMALL)


@pytest.fixture(autouse=True)
def _bfloat16_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same settings on every machine."""
    monkeypatch.setattr(layer_module, "multiplies_bfloat16", lambda device: True)


def create(arch: str, settings: str = "fast") -> System:
    torch.manual_seed(0)
    options = {k: v for k, v in SMALL[arch].items() if k in systems.options("toreqprop", arch)}
    return systems.create("toreqprop", (1, 28, 28), 10, arch=arch, settings=settings, **options)


def examples(count: int) -> tuple[Tensor, Tensor]:
    """Noisy copies of one random image for each class (not the bundled set, which a mutated copy has not)."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 10, (count,), generator=g)
    prototypes = (torch.rand(10, 1, 28, 28, generator=g) < 0.2).float()
    return (prototypes[y] + 0.3 * torch.rand(count, 1, 28, 28, generator=g)).clamp(max=1), y


def gradient(net: System, x: Tensor, y: Tensor) -> Tensor:
    net.zero_grad()
    net.criterion(net(x), y).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def exact_twin(net: System) -> System:
    """The same weights in float64, settled to the last digits and with the implicit gradient."""
    twin = copy.deepcopy(net).double()
    layer = twin.equilibrium
    layer.solver = replace(layer.solver, tolerance=1e-10, max_steps=500, precision="full")
    layer.estimator = Implicit(tolerance=1e-9, max_steps=500)
    return twin


@EACH_ARCH
@pytest.mark.parametrize(("settings", "least"), [("fast", 0.99), ("exact", 0.999)])
def test_the_gradient_keeps_its_direction(arch: str, settings: str, least: float) -> None:
    """After some steps of training, against the exact gradient of the same weights in float64."""
    net = create(arch, settings)
    x, y = examples(96)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for part in range(6):
        batch = slice(16 * part, 16 * part + 16)
        gradient(net, x[batch], y[batch])
        optimizer.step()
    net.eval()  # norm control then changes nothing any more
    found, wanted = gradient(net, x[:32], y[:32]), gradient(exact_twin(net), x[:32].double(), y[:32])
    assert cosine(found, wanted) > least, cosine(found, wanted)
    assert abs(float(found.double().norm() / wanted.norm()) - 1) < 0.1


@EACH_ARCH
def test_fast_loosens_what_is_shipped(arch: str) -> None:
    exact, fast = create(arch, "exact").equilibrium, create(arch).equilibrium
    assert isinstance(exact.dynamics, Energy)
    free, nudged = (1e-2, 5e-2) if exact.dynamics.linear else (3e-3, 2e-2)
    assert exact.dynamics.linear == (arch != "transformer")
    assert fast.solver == replace(exact.solver, tolerance=free, precision="rounded")
    assert isinstance(exact.estimator, Centered)
    assert fast.estimator == replace(exact.estimator, tolerance=nudged)
    assert exact.solver.precision == "full"


def test_fast_rounds_only_where_bfloat16_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(layer_module, "multiplies_bfloat16", lambda device: bool(asked.append(device)))
    layer = create("hopfield").equilibrium
    assert (layer.solver.tolerance, layer.solver.precision) == (1e-2, "full")
    assert asked == [torch.device("cpu")]
    assert not multiplies_bfloat16(torch.device("meta"))
    assert isinstance(multiplies_bfloat16(torch.device("cpu")), bool)


def test_fast_never_tightens() -> None:
    energy = Energy([Node("h", 3, Tanh())], [Drive("h", torch.nn.Linear(2, 3))])
    layer = Equilibrium(energy, FixedPoint(tolerance=0.1), Centered(tolerance=0.2))
    layer.hasten()
    assert (layer.solver.tolerance, layer.solver.precision) == (0.1, "rounded")
    assert layer.estimator == Centered(tolerance=0.2)
    reference = Equilibrium(energy, FixedPoint(), Implicit(tolerance=1e-6))
    reference.hasten()
    assert reference.estimator == Implicit(tolerance=1e-6), "a reference stays one"


@pytest.mark.parametrize("settings", ["fast", "exact"])
def test_a_system_remembers_its_settings(settings: str, tmp_path: Path) -> None:
    net = create("hopfield", settings)
    again = systems.from_config(net.config)
    assert again.config == net.config
    assert again.equilibrium.solver == net.equilibrium.solver
    assert again.equilibrium.estimator == net.equilibrium.estimator
    folder.save(tmp_path / "checkpoint", folder.prefixed("model.", net.state_dict()), {"system": net.config})
    tensors, state = folder.load(tmp_path / "checkpoint")
    loaded = systems.from_config(state["system"])
    folder.restore_module(loaded, folder.within("model.", tensors), "test")
    assert loaded.equilibrium.solver == net.equilibrium.solver
    x, y = examples(4)
    net.eval()
    loaded.eval()
    assert torch.equal(gradient(loaded, x, y), gradient(net, x, y))


def test_a_system_from_before_the_settings_is_exact() -> None:
    config = {k: v for k, v in create("mlp", "exact").config.items() if k != "settings"}
    assert systems.from_config(config).equilibrium.solver.precision == "full"


@pytest.mark.parametrize(("given", "nearest"), [("fsat", "fast"), ("exakt", "exact"), ("", "exact")])
def test_unknown_settings_are_refused(given: Any, nearest: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"systems.create\('toreqprop'\): expected settings among .*, got {given!r}.*{nearest}"
    ):
        systems.create("toreqprop", (1, 28, 28), 10, settings=given)


def test_training_takes_the_settings_and_fields_on_top() -> None:
    chosen = {"settings": "fast", "arch": "hopfield", "hidden": (12,), "solver.max_steps": 7, "estimator.beta": 0.02}
    layer = build(TrainConfig(system="toreqprop", set=chosen), (1, 28, 28), 10).equilibrium
    assert (layer.solver.precision, layer.solver.tolerance, layer.solver.max_steps) == ("rounded", 1e-2, 7)
    assert isinstance(layer.estimator, Centered)
    assert (layer.estimator.tolerance, layer.estimator.beta) == (5e-2, 0.02)
    plain = build(TrainConfig(system="toreqprop", set={"hidden": (12,)}), (1, 28, 28), 10).equilibrium
    assert plain.solver.precision == "full"


def test_drives_are_rounded_only_when_the_solver_rounds() -> None:
    """And arrive in float32, since a contrast needs the digits."""
    x, _ = examples(3)
    found = {}
    for settings in ("exact", "fast"):
        layer = create("hopfield", settings).equilibrium
        found[settings] = layer.dynamics.static(layer._bind(x))["h1"].detach()
        assert found[settings].dtype == torch.float32
    gap = float((found["fast"] - found["exact"]).norm() / found["exact"].norm())
    assert 1e-5 < gap < 1e-2


# --- torch.compile


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("cc") is None, reason="torch.compile needs a compiler")
def test_a_compiled_relaxation_is_the_same() -> None:
    g = torch.Generator().manual_seed(0)
    terms = [Drive("h", linear(4, 16, g)), Bilinear(Dense(16, 8, scale=0.1, generator=g), "h", "k")]
    energy = Energy([Node("h", 16, Tanh()), Node("k", 8, Tanh(2.0))], terms).float()
    bindings = energy.bind(torch.randn(6, 4, generator=g))
    sides: list[Solver] = [FixedPoint(tolerance=1e-5), Anderson(tolerance=1e-5)]
    with torch.no_grad():
        start = energy.initial(bindings)
        for solver in sides:
            problem = Relaxation(energy, bindings)
            compiled = problem.compiled()
            assert compiled.compiles
            eager, found = solver.solve(problem, start), replace(solver, compile=True).solve(problem, start)
            assert torch.equal(found.steps, eager.steps)
            assert bool(found.converged.all())
            for n, t in eager.state.items():
                torch.testing.assert_close(found.state[n], t, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_compiled_is_left_as_it_is() -> None:
    energy = Energy([Node("h", 3, Tanh())], [Drive("h", torch.nn.Linear(2, 3))])
    bindings = energy.bind(torch.randn(2, 2).to(torch.float32))
    problem = Relaxation(energy, bindings)
    assert problem.compiled() is not problem
    problem.static = {n: t.to(torch.complex64) for n, t in problem.static.items()}
    assert problem.compiled() is problem
