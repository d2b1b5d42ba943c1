"""Checkpoints: what was saved comes back exactly, a crash loses nothing, and a bad file says what is wrong with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from toreq import io
from toreq.errors import CheckpointError
from toreq.training import checkpoint, rng


def _tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model/a": torch.randn(3, 2, generator=generator),
        "model/b": torch.arange(4),
        "optimizer/0/step": torch.tensor(7.0),
    }


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_round_trip_is_exact_and_leaves_one_tensor_file(tmp_path: Path) -> None:
    for seed in (0, 1):
        checkpoint.save(tmp_path / "checkpoint", _tensors(seed), {"step": seed, "x": 0.1})
    tensors, state = checkpoint.load(tmp_path / "checkpoint")
    _assert_same(tensors, _tensors(1))
    assert state == {"step": 1, "x": 0.1}
    assert sorted(path.suffix for path in (tmp_path / "checkpoint").iterdir()) == [".json", ".safetensors"]


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    checkpoint.save(tmp_path, {"a": shared, "b": shared.T}, {})
    tensors, _ = checkpoint.load(tmp_path)
    _assert_same(tensors, {"a": shared, "b": shared.T.contiguous()})


class _Crash(BaseException):
    """Stands for the process dying: nothing may catch it."""


@pytest.mark.parametrize("call", range(6))
def test_a_crash_at_any_file_operation_keeps_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    checkpoint.save(tmp_path, _tensors(0), {"step": 0})
    calls = 0

    def crashing(real):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > call:
                raise _Crash
            return real(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(os, "replace", crashing(os.replace))
    monkeypatch.setattr(os, "fsync", crashing(os.fsync))
    crashed = False
    try:
        checkpoint.save(tmp_path, _tensors(1), {"step": 1})
    except _Crash:
        crashed = True
    monkeypatch.undo()
    tensors, state = checkpoint.load(tmp_path)
    _assert_same(tensors, _tensors(state["step"]))
    assert crashed or state["step"] == 1
    # What the crash left behind is gone after the next save.
    checkpoint.save(tmp_path, _tensors(2), {"step": 2})
    _assert_same(checkpoint.load(tmp_path)[0], _tensors(2))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_full_disk_keeps_the_checkpoint_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, _tensors(0), {"step": 0})

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(tmp_path, _tensors(1), {"step": 1})
    monkeypatch.undo()
    _assert_same(checkpoint.load(tmp_path)[0], _tensors(0))


def _truncate_tensors(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-5])


def _flip_a_bit(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(bytes(blob))


def _truncate_state(folder: Path) -> None:
    path = folder / "state.json"
    path.write_text(path.read_text()[:-20])


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate_tensors, "truncated"),
        (_flip_a_bit, "damaged"),
        (_truncate_state, "expected JSON"),
        (lambda folder: (folder / "state.json").unlink(), "nothing was saved"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "cannot read"),
        (lambda folder: _edit(folder, format="other"), "not written by toreq"),
        (lambda folder: _edit(folder, version=99), "expected version 1"),
        (lambda folder: _edit(folder, tensors={}), "damaged"),
        (lambda folder: (folder / "state.json").write_text("[1, 2]"), "not written by toreq"),
    ],
)
def test_a_bad_checkpoint_says_what_is_wrong(tmp_path: Path, damage, reason: str) -> None:
    checkpoint.save(tmp_path, _tensors(0), {"step": 0})
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=reason):
        checkpoint.load(tmp_path)


def test_a_checkpoint_of_another_network_is_refused() -> None:
    module = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=r"'weight' of shape \(2, 3\), got \(2, 4\)"):
        checkpoint.restore_module(module, nn.Linear(4, 2).state_dict(), "here")
    with pytest.raises(CheckpointError, match="expected the tensor 'bias'"):
        checkpoint.restore_module(module, {"weight": module.weight}, "here")
    with pytest.raises(CheckpointError, match="'extra'"):
        checkpoint.restore_module(module, {**module.state_dict(), "extra": torch.zeros(1)}, "here")


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.Adam(parameters, lr=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lambda parameters: torch.optim.RMSprop(parameters, lr=0.1),
    ],
)
def test_an_optimizer_goes_on_exactly(tmp_path: Path, make) -> None:
    def advance(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            module(torch.ones(1, 3)).pow(2).sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    unbroken = nn.Linear(3, 2)
    broken, resumed = nn.Linear(3, 2), nn.Linear(3, 2)
    broken.load_state_dict(unbroken.state_dict())
    first = make(unbroken.parameters())
    advance(unbroken, first, 5)

    second = make(broken.parameters())
    advance(broken, second, 2)
    own, record = checkpoint.optimizer_tensors(second)
    named = {**checkpoint.prefixed("model", broken.state_dict()), **checkpoint.prefixed("optimizer", own)}
    checkpoint.save(tmp_path, named, {"optimizer": record})
    tensors, state = checkpoint.load(tmp_path)
    checkpoint.restore_module(resumed, checkpoint.within("model", tensors), "here")
    third = make(resumed.parameters())
    checkpoint.restore_optimizer(third, checkpoint.within("optimizer", tensors), state["optimizer"], "here")
    advance(resumed, third, 3)
    _assert_same(resumed.state_dict(), unbroken.state_dict())


def test_generators_inside_a_network_are_found_and_restored() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(1)

    module = nn.Sequential(Noisy(), Noisy())
    states = rng.capture(module)
    assert {"torch", "generator.0.generator", "generator.1.generator"} <= set(states)

    def draw() -> list[float]:
        noisy = [float(torch.rand((), generator=part.generator)) for part in module]  # type: ignore[union-attr]
        return [*noisy, float(torch.rand(()))]

    first = draw()
    with rng.preserved(module):
        second = draw()
        assert second != first
    assert draw() == second
    rng.restore(module, states)
    assert draw() == first


def test_files_are_written_by_the_atomic_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The crash test above holds only as long as every byte goes through `toreq.io`."""
    opened: list[str] = []
    real = io.atomic_path
    monkeypatch.setattr(io, "atomic_path", lambda path: opened.append(Path(path).suffix) or real(path))
    checkpoint.save(tmp_path, _tensors(0), {"step": 0})
    assert opened == [".safetensors", ".json"]
    blob = next(tmp_path.glob("*.safetensors")).read_bytes()
    _assert_same(safetensors.torch.load(blob), _tensors(0))
