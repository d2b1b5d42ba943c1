"""The torus memory against a table of all writes with their ages, and what unfolding leaves alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from toreq.errors import ConfigError
from toreq.memory import MemoryState, TorusMemory

BATCH = 2


@dataclass
class Table:
    """Every write with its address, value and age: the memory as its definition says, without a torus."""

    shape: tuple[int, ...]
    decay: tuple[float, ...]
    opening: tuple[float, ...]
    writes: list[tuple[list[float], Tensor, int]] = field(default_factory=list)

    def advance(self) -> None:
        self.writes = [(q, v, age + 1) for q, v, age in self.writes]

    def write(self, value: Tensor, address: list[float]) -> None:
        """A write between slots is one write to each of its neighbours."""
        for corner in itertools.product((0, 1), repeat=len(address)):
            share, slot = 1.0, []
            for q, up in zip(address, corner, strict=True):
                low = math.floor(q)
                share *= q - low if up else 1 - (q - low)
                slot.append(float(low + up))
            self.writes.append((slot, share * value, 0))

    def read(self, address: list[float], features: int) -> Tensor:
        total = torch.zeros(BATCH, features, dtype=torch.float64)
        for q, value, age in self.writes:
            if age >= self.shape[0]:
                continue
            weight = self.decay[0] ** age
            for i, n in enumerate(self.shape[1:]):
                around = min(abs(address[i] - q[i] + k * n) for k in range(-9, 10))
                weight *= self.decay[i + 1] ** (self.opening[i] * around)
            total = total + weight * value
        return total


SIZES = st.lists(st.integers(2, 4), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, data=st.data(), seed=st.integers(0, 1000))
def test_reads_are_the_decayed_sum_of_all_writes(sizes: list[int], data: st.DataObject, seed: int) -> None:
    shape = tuple(sizes)
    decay = tuple(data.draw(st.floats(0.1, 0.95)) for _ in shape)
    opening = tuple(data.draw(st.floats(0, 1)) for _ in shape[1:])
    memory = TorusMemory(shape, 3, decay, opening)
    table, state = Table(shape, decay, opening), memory.empty(BATCH, torch.float64)
    g = torch.Generator().manual_seed(seed)
    for moves in data.draw(st.lists(st.booleans(), max_size=14)):
        if moves:
            state = memory.advance(state)
            table.advance()
            continue
        # off the torus too: addresses are wrapped
        q = [data.draw(st.floats(-5, 9)) for _ in shape[1:]]
        value = torch.randn(BATCH, 3, generator=g, dtype=torch.float64)
        state = memory.write(state, value, q)
        table.write(value, q)
    for _ in range(3):
        p = [data.draw(st.floats(-5, 9)) for _ in shape[1:]]
        torch.testing.assert_close(memory.read(state, p), table.read(p, 3), rtol=1e-9, atol=1e-9)


def filled(memory: TorusMemory, steps: int, seed: int = 0) -> MemoryState:
    """A float64 state after ``steps`` steps with two writes each."""
    g = torch.Generator().manual_seed(seed)
    state = memory.empty(BATCH, torch.float64)
    for _ in range(steps):
        state = memory.advance(state)
        for _ in range(2):
            value = torch.randn(BATCH, memory.features, generator=g, dtype=torch.float64)
            state = memory.write(state, value, 9 * torch.rand(BATCH, len(memory.sizes), generator=g).double())
    return state


def test_each_example_has_its_own_address() -> None:
    memory = TorusMemory((3, 4, 2), 2, 0.5)
    g = torch.Generator().manual_seed(1)
    value = torch.randn(BATCH, 2, generator=g, dtype=torch.float64)
    at = torch.tensor([[1.25, 0.0], [3.5, 1.0]], dtype=torch.float64)
    together = memory.write(memory.empty(BATCH, torch.float64), value, at)
    points = torch.rand(BATCH, 5, 2, generator=g, dtype=torch.float64) * 4
    found = memory.read(together, points)
    assert found.shape == (BATCH, 5, 2)
    for b in range(BATCH):
        alone = memory.write(memory.empty(1, torch.float64), value[b : b + 1], at[b])
        for q in range(5):
            torch.testing.assert_close(memory.read(alone, points[b, q])[0], found[b, q])


def test_a_read_where_it_was_written_fades_by_age_and_distance() -> None:
    memory = TorusMemory((4, 6), 1, (0.5, 0.25))
    state = memory.write(memory.empty(1, torch.float64), torch.ones(1, 1, dtype=torch.float64), [5])
    for age in range(4):
        assert float(memory.read(state, [5])) == pytest.approx(0.5**age)
        # around the torus slot 1 is two slots from slot 5, slot 2 three
        assert float(memory.read(state, [1])) == pytest.approx(0.5**age * 0.25**2)
        assert float(memory.read(state, [2])) == pytest.approx(0.5**age * 0.25**3)
        state = memory.advance(state)
    assert float(memory.read(state, [5])) == pytest.approx(0, abs=1e-15), "older than the axis is long"


def test_states_are_not_changed_and_rows_are_not_copied() -> None:
    memory = TorusMemory((3, 4), 2, 0.8)
    before = filled(memory, 5)
    kept, read = before.slots.clone(), memory.read(before, [1.5])
    moved = memory.advance(before)
    after = memory.write(moved, torch.ones(BATCH, 2, dtype=torch.float64), [2])
    assert torch.equal(before.slots, kept)
    assert torch.equal(memory.read(before, [1.5]), read)
    shared = [any(row is old for old in before.rows) for row in after.rows]
    assert shared.count(False) == 1, "only the head's row may be new"
    assert moved.row(1) is before.row(0)
    assert torch.equal(after.row(0)[:, 2], torch.ones(BATCH, 2, dtype=torch.float64))
    assert bool((after.row(0)[:, [0, 1, 3]] == 0).all()), "a write touches its own slots only"
    assert after.row(-1) is after.row(2)


def test_the_fading_sum_does_not_drift() -> None:
    """Five hundred O(1) updates of a ring stay at the brute-force sum, in float32 too."""
    memory = TorusMemory((5,), 4, 0.9)
    state = memory.empty(1)
    g = torch.Generator().manual_seed(0)
    for _ in range(500):
        state = memory.write(memory.advance(state), torch.randn(1, 4, generator=g))
    brute = sum(0.9**age * state.row(age) for age in range(5))
    torch.testing.assert_close(memory.read(state), torch.as_tensor(brute), rtol=1e-4, atol=1e-5)


def test_what_has_left_the_ring_is_forgotten() -> None:
    memory = TorusMemory((3, 2), 1, 0.9)
    state = memory.write(memory.empty(1, torch.float64), torch.full((1, 1), 1e3, dtype=torch.float64), [0])
    for _ in range(3):
        state = memory.advance(state)
    assert float(state.slots.abs().max()) == 0
    assert float(state.fading.abs().max()) < 1e-12


def test_occupancy_is_the_mean_square_of_each_slot() -> None:
    memory = TorusMemory((3, 4), 2, 0.8)
    state = filled(memory, 4)
    torch.testing.assert_close(state.occupancy(), state.slots.square().mean((0, 3)))
    part = state.map(lambda t: t[:1])
    torch.testing.assert_close(memory.read(part, [1.0]), memory.read(state, [1.0])[:1])


def test_gradients_reach_values_and_addresses() -> None:
    memory = TorusMemory((3, 5), 2, 0.7)
    value = torch.randn(BATCH, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    written = torch.tensor([[0.3], [2.6]], dtype=torch.float64, requires_grad=True)
    asked = torch.tensor([[1.2], [4.4]], dtype=torch.float64, requires_grad=True)

    def recalled(v: Tensor, q: Tensor, p: Tensor) -> Tensor:
        state = memory.advance(memory.write(memory.empty(BATCH, torch.float64), v, q))
        return memory.read(state, p)

    assert torch.autograd.gradcheck(recalled, (value, written, asked))


@settings(max_examples=15, deadline=None)
@given(
    sizes=SIZES,
    size=st.integers(2, 5),
    place=st.integers(-3, 6),
    places=st.lists(st.floats(-8, 8), min_size=4, max_size=4),
    seed=st.integers(0, 100),
)
def test_unfolding_changes_no_read(sizes: list[int], size: int, place: int, places: list[float], seed: int) -> None:
    """Neither at once, nor after the same further writes at any place of the new axis."""
    memory = TorusMemory(sizes, 2, 0.8)
    state = filled(memory, 4, seed)
    wider, unfolded = memory.unfold(state, size, 0.3, place)
    assert wider.shape == (*sizes, size)
    # the new axis tells places apart once it is open
    beside = torch.tensor([0.0] * (len(sizes) - 1) + [place + 1.0], dtype=torch.float64)
    faded = wider.opened(len(sizes), 1.0).read(unfolded, beside)
    torch.testing.assert_close(faded, 0.3 * memory.read(state, beside[:-1]))
    g = torch.Generator().manual_seed(seed)
    for c in places:
        p = 5 * torch.rand(BATCH, len(sizes) - 1, generator=g, dtype=torch.float64)
        anywhere = torch.cat([p, torch.full((BATCH, 1), c, dtype=torch.float64)], 1)
        torch.testing.assert_close(wider.read(unfolded, anywhere), memory.read(state, p), rtol=1e-6, atol=1e-9)
        value = torch.randn(BATCH, 2, generator=g, dtype=torch.float64)
        state = memory.advance(memory.write(state, value, p))
        unfolded = wider.advance(wider.write(unfolded, value, anywhere))


def test_growth_beyond_the_limit_is_refused_with_the_numbers() -> None:
    memory = TorusMemory((4, 3), 5, 0.9, limit=10_000)
    state = memory.empty(BATCH)
    held = sum(t.numel() * t.element_size() for t in (*(row.clone() for row in state.rows), state.fading))
    assert memory.bytes(BATCH) == held == 600
    memory.unfold(state, 16)  # 9600
    with pytest.raises(ConfigError, match=r"at most 10000 bytes, got 10200 for 2 examples of 4 x 3 x 17 slots .*fewer"):
        memory.unfold(state, 17)
    with pytest.raises(ConfigError, match=r"empty: expected a state of at most 10000 bytes, got 10200"):
        memory.empty(34)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"shape": (1,)}, "sizes >= 2, got .*leave it out"),
        ({"shape": (4, 1, 3)}, "sizes >= 2"),
        ({"shape": ()}, "sizes >= 2"),
        ({"features": 0}, "features and limit >= 1"),
        ({"decay": 1.0}, r"decay in \(0, 1\) for each of 2 axes"),
        ({"decay": 0.0}, r"decay in \(0, 1\)"),
        ({"decay": (0.5, 1.5)}, r"decay in \(0, 1\)"),
        ({"decay": (0.5,)}, r"decay in \(0, 1\)"),
        ({"decay": float("nan")}, r"decay in \(0, 1\)"),
        ({"opening": (1.5,)}, r"opening in \[0, 1\]"),
        ({"opening": (1.0, 1.0)}, r"opening in \[0, 1\] for each of 1"),
    ],
)
def test_options_out_of_range_are_refused(bad: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TorusMemory(**{"shape": (4, 3), "features": 2, **bad})


def test_bad_values_and_addresses_are_refused() -> None:
    memory = TorusMemory((4, 3), 2, 0.9)
    state, value = memory.empty(BATCH), torch.ones(BATCH, 2)
    with pytest.raises(ConfigError, match=r"value of shape \(2, 2\), got \(2, 3\)"):
        memory.write(state, torch.ones(BATCH, 3), [0])
    for address in (None, [0, 1], torch.zeros(3, 1), torch.zeros(BATCH, 4, 1)):
        with pytest.raises(ConfigError, match="write: expected an address of shape"):
            memory.write(state, value, address)
    with pytest.raises(ConfigError, match="read: expected an address of shape"):
        memory.read(state, torch.zeros(1, 4, 1))
    with pytest.raises(ConfigError, match="finite address"):
        memory.read(state, [math.inf])
    with pytest.raises(ConfigError, match="sizes >= 2"):
        memory.unfold(state, 1)
    with pytest.raises(ConfigError, match=r"decay in \(0, 1\)"):
        memory.unfold(state, 3, 1.0)
    for axis in (0, 2):
        with pytest.raises(ConfigError, match="addressed axis from 1 to 1"):
            memory.opened(axis, 1.0)
