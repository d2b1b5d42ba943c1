"""The import direction of the design, and that its checker does see violations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from import_order import violations

SOURCE = Path(__file__).parents[1] / "src" / "toreq"


def test_the_package_keeps_the_import_order():
    assert violations(SOURCE) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/nodes.py", "from toreq.solvers import FixedPoint"),
        ("core/nodes.py", "import toreq.layer"),
        ("core/nodes.py", "from toreq import systems"),
        ("core/nodes.py", "from ..estimators.base import Estimator"),
        ("core/nodes.py", "from .. import training"),
        ("core/nodes.py", "import toreq"),
        ("core/nodes.py", "from toreq import Equilibrium"),
        ("core/nodes.py", "from toreq.data import load"),
        ("core/nodes.py", "if True:\n    import toreq.memory"),
        ("solvers/base.py", "def late():\n    from toreq.estimators import Centered"),
        ("solvers/base.py", "import importlib\nimportlib.import_module('toreq.training')"),
        ("layer.py", "from toreq.systems import create"),
        ("training/loop.py", "from toreq.diagnostics import check"),
        ("evidence/claims.py", "from toreq.cli import main"),
        ("data/images.py", "from toreq.core import nodes"),
        ("data/images.py", "import torchvision"),
        ("data/images.py", "from PIL import Image"),
        ("io.py", "from toreq.core import nodes"),
        ("errors.py", "from toreq.io import atomic_path"),
        ("novelty/thing.py", "import math"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, file: str, line: str):
    target = tmp_path / file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(line + "\n", encoding="utf-8")
    found = violations(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(file)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/nodes.py", "from toreq.core.state import State"),
        ("core/nodes.py", "from .state import State"),
        ("core/nodes.py", "import scipy"),
        ("layer.py", "from toreq.errors import ConfigError\nfrom toreq.core import nodes"),
        ("training/loop.py", "from toreq import data, systems"),
        ("training/loop.py", "from toreq import __version__"),
        ("evidence/claims.py", "from toreq.diagnostics import check"),
        ("cli/main.py", "import toreq\nfrom toreq.evidence import claims"),
        ("data/images.py", "def load():\n    from PIL import Image\nimport gzip, numpy"),
        ("io.py", "from toreq.errors import WriteError"),
        ("__init__.py", "from toreq import systems"),
    ],
)
def test_a_legal_import_passes(tmp_path: Path, file: str, line: str):
    target = tmp_path / file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(line + "\n", encoding="utf-8")
    assert violations(tmp_path) == []


def test_importing_toreq_leaves_the_heavy_tools_alone():
    # Plots, progress bars and downloads are for the commands that use them.
    heavy = ("matplotlib", "tensorboard", "PIL", "pooch", "requests", "lightning_fabric", "torchmetrics", "tyro")
    code = f"import sys, toreq, toreq.data; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=SOURCE.parent,
    )
    assert result.stdout.strip() == "[]"
