"""The run-time annotation checks are on, and understand dataclasses, modules, shapes and late references."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

from toreq.data import blobs
from toreq.io import atomic_write_text

pytestmark = pytest.mark.skipif(
    os.environ.get("TOREQ_TYPECHECK", "1") == "0", reason="the checks are switched off by TOREQ_TYPECHECK=0"
)

PROBE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import Tensor, nn
from jaxtyping import Float

@dataclass(frozen=True)
class Options:
    scale: float = 1.0
    after: Later | None = None

class Later:
    pass

class Layer(nn.Module):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.scale = options.scale

    def forward(self, x: Float[Tensor, "batch d"], w: Float[Tensor, "out d"]) -> Float[Tensor, "batch out"]:
        return self.scale * x @ w.T

def broken(x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
    return x[:, :-1]
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("probe")
    (folder / "toreq_probe.py").write_text(PROBE)
    sys.path.insert(0, str(folder))
    try:
        with jaxtyping.install_import_hook("toreq_probe", "typechecker.check"):
            yield importlib.import_module("toreq_probe")
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("toreq_probe", None)


def test_the_package_itself_is_checked(tmp_path: Path):
    with pytest.raises(jaxtyping.TypeCheckError):
        atomic_write_text(tmp_path / "file.txt", 3)  # type: ignore[arg-type]
    with pytest.raises(jaxtyping.TypeCheckError):
        blobs(4, (2,), 2, generator=None)  # type: ignore[arg-type]


def test_no_module_escaped_the_checks():
    plain = [
        name
        for name, module in sys.modules.items()
        if name.split(".")[0] == "toreq"
        and "jaxtyping" not in type(getattr(module.__spec__, "loader", None)).__module__
    ]
    assert plain == []


def test_right_calls_pass(probe):
    layer = probe.Layer(probe.Options(scale=2))  # an int is fine for a float
    assert layer(torch.ones(3, 4), torch.ones(5, 4)).shape == (3, 5)
    assert probe.Options(after=probe.Later()).after is not None


def test_wrong_shapes_types_and_results_are_caught(probe):
    layer = probe.Layer(probe.Options())
    with pytest.raises(jaxtyping.TypeCheckError):
        layer(torch.ones(3, 4), torch.ones(5, 3))
    with pytest.raises(jaxtyping.TypeCheckError):
        layer(torch.ones(3, 4, dtype=torch.int64), torch.ones(5, 4))
    with pytest.raises(jaxtyping.TypeCheckError):
        probe.Options(scale="large")
    with pytest.raises(jaxtyping.TypeCheckError):
        probe.broken(torch.ones(2, 3))
