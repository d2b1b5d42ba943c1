"""Set-up shared by all tests: one thread, no denormals, and run-time checks of every annotation in toreq."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

# Before torch is imported: two workers with two threads each would fight for two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if TYPE_CHECKING:
    from toreq.evidence.claim import Claim, Outcome

# Shapes and types are checked in every call while the tests run; TOREQ_TYPECHECK=0 turns that off.
if os.environ.get("TOREQ_TYPECHECK", "1") != "0":
    from jaxtyping import install_import_hook

    # Must come before the first import of toreq, whose modules are instrumented as they are loaded.
    assert "toreq" not in sys.modules
    install_import_hook("toreq", "typechecker.check")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    # Not in pyproject.toml: pytest would import toreq for it before this file can instrument it.
    config.addinivalue_line("filterwarnings", "error::toreq.errors.ConvergenceWarning")


@pytest.fixture(autouse=True)
def _flush_denormals(request: pytest.FixtureRequest) -> Iterator[None]:
    """A relaxation that decays into subnormal numbers is many times slower and measures nothing of interest."""
    # Hypothesis needs subnormal numbers to draw floats, and refuses to work where they are flushed.
    torch.set_flush_denormal(not getattr(request.function, "is_hypothesis_test", False))
    yield
    # Code under test may have switched it on too.
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A layer of torch.nn draws its first values from the global generator: a test must not pass by luck of them."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A generator with a fixed seed, so that no test depends on another one's draws."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _no_outside_data(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests use bundled and generated data only, also on a machine that has the other sets."""
    monkeypatch.delenv("TOREQ_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Claim], dict[tuple[str, int], Outcome]]:
    """Every side of a claim at the smoke budget, run once for all tests of this module."""
    # imported here: most test files need none of it
    from toreq.evidence.budgets import BUDGETS
    from toreq.evidence.claim import Trial
    from toreq.evidence.workers import perform

    kept: dict[str, dict[tuple[str, int], Outcome]] = {}

    def outcomes(one: Claim) -> dict[tuple[str, int], Outcome]:
        if one.id not in kept:
            kept[one.id] = {}
            for side in one.sides:
                tuned = {} if one.tuning is None else one.tuning.start.get(side, {})
                trial = Trial(BUDGETS["smoke"], side, 0, "cpu", tmp_path_factory.mktemp("scratch"), tuned)
                kept[one.id][side, 0] = perform(one.run, trial, 1)[0]
        return kept[one.id]

    return outcomes
