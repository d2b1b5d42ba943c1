"""Every example runs as it stands, at a small setting, and does what it says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"
CHANCE = 0.1


def load(name: str) -> ModuleType:
    """The example as a module, freshly executed."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    tested = {"quickstart", "new_energy", "wrap_block", "papers", "control", "mstep_exit"}
    elsewhere = {"continual_contexts", "denoising", "predictive_transformer", "tagging"}
    assert {path.stem for path in FOLDER.glob("*.py")} == tested | elsewhere


def test_quickstart_learns() -> None:
    assert load("quickstart").main(train=1000, test=500, epochs=2) > 6 * CHANCE


def test_new_energy_has_the_implicit_gradient_and_learns() -> None:
    cosine, loss = load("new_energy").main(steps=30, batch=16)
    assert cosine > 0.9999
    assert loss < 1.0  # ten classes at chance: 2.3


def test_new_energy_fits_in_fifteen_lines() -> None:
    text = (FOLDER / "new_energy.py").read_text()
    part = text.split("[start:energy]")[1].split("# --8<-- [end:energy]")[0]
    code = [line for line in part.splitlines() if line.strip()]
    assert 10 <= len(code) <= 15


def test_wrapped_block_has_the_implicit_gradient_and_learns() -> None:
    cosine, accuracy = load("wrap_block").main(train=300, test=200, epochs=3)
    assert cosine > 0.999
    assert accuracy > 2 * CHANCE


def test_papers_network_learns() -> None:
    assert load("papers").main(train=1000, test=500, epochs=2) > 6 * CHANCE


def test_pyramid_learns_and_lets_digits_leave() -> None:
    found = load("mstep_exit").main(train=640, test=200, epochs=2)
    assert found[1.0][0] > 4 * CHANCE
    assert found[0.5][1] < found[1.0][1] == 1.0


def test_control_runs() -> None:
    pytest.importorskip("stable_baselines3")
    before, after = load("control").main(steps=256)
    assert 0 <= before <= 1
    assert 0 <= after <= 1


@pytest.mark.slow
def test_control_learns_to_remember() -> None:
    pytest.importorskip("stable_baselines3")
    _, after = load("control").main(steps=4096)
    assert after > 0.9  # without the cue 0.5 at most


@pytest.mark.cli
def test_an_example_runs_from_the_command_line() -> None:
    command = [sys.executable, str(FOLDER / "quickstart.py"), "--train", "100", "--test", "100", "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
