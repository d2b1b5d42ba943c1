"""The checks can fail: three deliberately wrong estimators are caught (``scripts/mutate.py`` plants the rest)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "mutate.py"
WRONG = {
    "nudge: wrong sign": "test_estimators.py::test_linear_network_against_exact_algebra",
    "centered: factor 1/2 missing": "test_estimators.py::test_linear_network_against_exact_algebra",
    "bilinear: missing adjoint": "test_couplings.py::test_field_is_the_gradient_of_the_value",
}


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutate", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_estimator_is_caught(name: str, tmp_path: Path) -> None:
    mutate = _script()
    (defect,) = [d for d in mutate.DEFECTS if d.name == name]
    package = mutate.copy_package(tmp_path)
    mutate.patch(package, defect)
    code, failed = mutate.run_tests(package, [WRONG[name]], ["-x"])
    assert code == 1
    assert failed


@pytest.mark.slow
def test_without_a_defect_the_same_tests_pass(tmp_path: Path) -> None:
    mutate = _script()
    code, failed = mutate.run_tests(mutate.copy_package(tmp_path), sorted(set(WRONG.values())))
    assert (code, failed) == (0, [])


def test_every_defect_still_finds_its_place() -> None:
    mutate = _script()
    package = mutate.ROOT / "src" / "toreq"
    assert len(mutate.DEFECTS) >= 20
    for defect in mutate.DEFECTS:
        assert (package / defect.file).read_text().count(defect.old) == 1, (
            f"{defect.name}: stale, mend scripts/mutate.py"
        )
        assert defect.old != defect.new
