"""check, doctor, show and report: they pass what is right and find what is planted."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from torch import nn

import toreq
from toreq import estimators, training
from toreq.core.state import scaled
from toreq.diagnostics.check import check, run_check
from toreq.diagnostics.doctor import examine, run_doctor
from toreq.diagnostics.memory import StorageMeter, memory_against_steps, peak_bytes
from toreq.diagnostics.report import write_demo_report
from toreq.diagnostics.show import run_show
from toreq.estimators import Centered, Estimate
from toreq.estimators.base import FreePhase, LinearNudge, Nudge

MiB = 1 << 20


def _net(**options: Any) -> toreq.systems.System:
    torch.manual_seed(0)
    return toreq.systems.create("toreqprop", (1, 6, 6), 3, **{"hidden": (12,), **options})


def _batch(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, 1, 6, 6, generator=generator), torch.arange(size) % 3


# --- memory


def test_meter_counts_what_is_alive_at_once() -> None:
    def use() -> None:
        a = torch.empty(MiB // 4, dtype=torch.float32)  # 1 MiB
        b = a * 2  # 2 MiB alive
        del a
        c = b.view(2, -1)  # a view costs nothing
        d = c + 1  # 2 MiB alive again, the first one is gone
        assert d.numel() == MiB // 4

    assert peak_bytes(use) == 2 * MiB


def test_meter_sees_saved_tensors() -> None:
    x = torch.ones(MiB // 4, requires_grad=True)
    with StorageMeter() as meter:
        y = x.exp().exp()
    assert meter.peak >= 2 * MiB
    assert y.requires_grad


def test_memory_is_flat_in_steps_and_unrolling_is_not() -> None:
    x, y = _batch()
    net = _net()
    flat = {p.steps: p.peak_mb for p in memory_against_steps(net, x, y, (10, 80))}
    grown = {p.steps: p.peak_mb for p in memory_against_steps(net, x, y, (10, 80), estimator="unrolled")}
    assert flat[80] <= 1.02 * flat[10]
    assert grown[80] > 1.3 * grown[10]


# --- check


# the memory is measured at a fixed number of steps, settled or not
@pytest.mark.filterwarnings("ignore::toreq.errors.ConvergenceWarning")
@pytest.mark.parametrize("arch", toreq.systems.architectures("toreqprop"))
def test_every_base_system_passes(arch: str) -> None:
    sizes: dict[str, dict[str, Any]] = {
        "mlp": {"hidden": (12,)},
        "hopfield": {"hidden": (12, 8)},
        "conv": {"channels": (3, 4), "kernel": 3, "stride": 1},
        "transformer": {"features": 8, "heads": 2, "hidden": 12, "patch": 3},
    }
    torch.manual_seed(0)
    net = toreq.systems.create("toreqprop", (1, 6, 6), 3, arch=arch, **sizes[arch])
    x, y = _batch()
    result = check(net, x, y, steps=(10, 20))
    assert result.passed, result.failures
    shipped = {name for name, _ in estimators.all_for(net.equilibrium.dynamics)}
    assert {row.estimator for row in result.gradients} == shipped


@dataclass(frozen=True, kw_only=True)
class WrongSign(Centered):
    name: ClassVar[str] = "wrong-sign"

    def estimate(self, free: FreePhase, nudge: Nudge, record: bool = False) -> Estimate:
        assert isinstance(nudge, LinearNudge)
        v = scaled(nudge.v, -torch.ones(next(iter(nudge.v.values())).shape[0]))
        return super().estimate(free, LinearNudge(v), record)


@dataclass(frozen=True, kw_only=True)
class Half(Centered):
    name: ClassVar[str] = "half"

    def estimate(self, free: FreePhase, nudge: Nudge, record: bool = False) -> Estimate:
        right = super().estimate(free, nudge, record)
        return replace(right, gradients=[None if g is None else g / 2 for g in right.gradients])


@pytest.mark.parametrize("wrong", [WrongSign, Half])
def test_a_wrong_estimator_fails_the_check(wrong: type[Centered], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(estimators.REGISTRY, "centered", wrong)
    x, y = _batch()
    result = check(_net(), x, y, steps=(10, 20))
    assert not result.passed


def test_json_has_what_it_promises(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    code = run_check(
        "toreqprop", json_path=file, options={"hidden": (16,)}, batch_size=8, steps=(5, 10), resident=False,
        console=Console(file=io.StringIO()),
    )  # fmt: skip
    assert code == 0
    written = json.loads(file.read_text())
    assert written["system"] == "toreqprop"
    assert {"estimator", "parameter", "cosine", "relative_error"} <= set(written["gradients"][0])
    assert {"steps", "peak_mb"} <= set(written["memory"][0])
    assert 0 < written["radius"] < 1


# --- doctor


def _separable(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes whose images have different rows lit."""
    x, y = _batch(size)
    x = 0.2 * x
    for k in range(3):
        x[y == k, :, 2 * k : 2 * k + 2] += 0.8
    return x, y


def test_doctor_is_silent_on_a_healthy_net() -> None:
    net, (x, y) = _net(coupling_scale=0.4), _separable(32)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = net.criterion(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [f.code for f in examine(net, x, y, losses) if f.severity == "problem"] == []


def _codes(net: nn.Module, losses: tuple[float, ...] = (1.0, 0.8, 0.6, 0.5)) -> set[str]:
    x, y = _batch(32)
    findings = examine(net, x, y, list(losses))
    assert all(f.what and f.remedy for f in findings)
    return {f.code for f in findings}


def _inverting(solver: toreq.solvers.Solver) -> toreq.systems.System:
    """A net whose undamped relaxation flips its state at every step."""
    net = _net(norm_bound=None)
    with torch.no_grad():
        lateral: Any = net.equilibrium.dynamics.couplings[1]
        lateral.op.weight.copy_(-2.5 * torch.eye(12))
    net.equilibrium.solver = solver
    return net


@pytest.mark.filterwarnings("ignore::toreq.errors.ConvergenceWarning")
def test_doctor_finds_unsettled_examples() -> None:
    assert "unsettled-free" in _codes(_inverting(toreq.solvers.FixedPoint(max_steps=30)))


def test_doctor_finds_a_radius_above_one() -> None:
    # damping settles it all the same, so that the radius at the equilibrium itself can be measured
    assert "radius" in _codes(_inverting(toreq.solvers.FixedPoint(damping=0.4)))


def test_doctor_finds_saturated_units() -> None:
    net = _net(nonlinearity="hard_sigmoid")
    with torch.no_grad():
        drive: Any = net.equilibrium.dynamics.couplings[0]
        drive.module[1].bias[:9] = -50.0
    assert "saturated" in _codes(net)


def test_doctor_finds_a_beta_that_is_too_large() -> None:
    net = _net(norm_bound=0.9)
    net.equilibrium.estimator = Centered(beta=0.5, max_halvings=0)
    assert "asym" in _codes(net)


def test_doctor_finds_a_beta_too_small_for_the_digits() -> None:
    net = _net()
    net.equilibrium.estimator = Centered(beta=1e-7)
    with pytest.warns(toreq.errors.ConvergenceWarning):
        codes = _codes(net)
    assert "beta-digits" in codes


def test_doctor_finds_couplings_that_do_nothing_and_a_loss_that_does_not_fall() -> None:
    assert "loss" in _codes(_net(), (1.0, 1.0, 1.01, 1.0, 1.02, 1.0))
    assert "loss" not in _codes(_net())


# --- show and report


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "small"
    config = training.config_for(
        "toreqprop", {"hidden": (32,)}, epochs=2, limit_train=300, limit_test=100, out=str(out), threads=1
    )
    training.train(config)
    return out


def _assert_self_contained(page: str) -> None:
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert not re.search(r"(src|href)=[\"']https?:", page)
    assert "@import" not in page
    assert "<script src" not in page


def test_show_draws_everything(run_folder: Path, tmp_path: Path) -> None:
    assert run_show(run_folder, tmp_path, Console(file=io.StringIO())) == 0
    pictures = {p.stem for p in tmp_path.glob("*.png")}
    for wanted in ("learning", "residual", "energy", "steps", "confusion"):
        assert any(wanted in name for name in pictures), (wanted, pictures)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.glob("*.png"))
    (page,) = tmp_path.glob("*.html")
    _assert_self_contained(page.read_text())


def test_doctor_reads_a_run(run_folder: Path) -> None:
    out = io.StringIO()
    assert run_doctor(run_folder, Console(file=out, width=120)) == 0
    assert out.getvalue().strip()


def test_report_is_one_page(run_folder: Path, tmp_path: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    rows = [{**summary, "run": str(run_folder), "side": "eqprop"}, {**summary, "side": "bp-ff", "test_accuracy": 0.5}]
    page = write_demo_report(rows, tmp_path).read_text()
    _assert_self_contained(page)
    assert f"{100 * summary['test_accuracy']:.2f}%" in page
    assert "50.00%" in page
