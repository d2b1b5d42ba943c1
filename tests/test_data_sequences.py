"""Tasks on sequences: generators against brute force, images and text against their sources, refusals."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import Tensor

from toreq import data
from toreq.data import algorithmic, sequences, text
from toreq.data.batches import seeded
from toreq.errors import ConfigError, DataError


def test_copy_memory_repeats_its_items_after_the_delay():
    part = algorithmic.copy_memory(50, 7, items=4, symbols=5, generator=seeded(0))
    assert part.x.shape == part.y.shape == (50, 7 + 2 * 4 + 1)
    assert part.mask is not None
    for x, y, mask in zip(part.x.tolist(), part.y.tolist(), part.mask.tolist(), strict=True):
        assert all(1 <= s <= 5 for s in x[:4])
        assert x[4:] == [0] * 7 + [6] + [0] * 4
        assert y == [0] * 12 + x[:4]
        assert mask == [False] * 12 + [True] * 4


def test_adding_sums_the_two_marked_numbers():
    task = data.sequence_task("adding", train=4000, test=10, length=11, longer=())
    batch = task.batch(task.train, slice(None))
    value, marker = batch.x.unbind(2)
    assert torch.equal(marker.sum(1), torch.full((4000,), 2.0))
    assert torch.equal(marker[:, :5].sum(1), torch.ones(4000))
    torch.testing.assert_close(batch.y, (value * marker).sum(1), atol=1e-6, rtol=0)
    # uniform on [0, 1]: mean 1/2; the sum of two has variance 1/6
    assert float(value.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(batch.y.var()) == pytest.approx(1 / 6, rel=0.08)
    assert (task.outputs, task.targets, task.features) == (1, "sequence", 2)


def test_parity_is_that_of_every_prefix_or_of_the_whole():
    running = algorithmic.parity(64, 9, running=True, generator=seeded(1))
    whole = algorithmic.parity(64, 9, generator=seeded(1))
    assert torch.equal(running.x, whole.x)
    for x, y, last in zip(running.x.tolist(), running.y.tolist(), whole.y.tolist(), strict=True):
        assert y == [sum(x[: t + 1]) % 2 for t in range(9)]
        assert last == y[-1]


def test_sorting_puts_out_what_it_was_given_in_order():
    part = algorithmic.sorting(40, 6, symbols=4, generator=seeded(2))
    for x, y in zip(part.x.tolist(), part.y.tolist(), strict=True):
        assert y[6:] == sorted(x[:6])
        assert x[6:] == [0] * 6


def _way(grid: list[list[int]]) -> set[tuple[int, int]] | None:
    """The cells of a shortest way from start to goal by breadth-first search, None where there is none."""
    side = len(grid)
    cell = {grid[r][c]: (r, c) for r in range(side) for c in range(side)}
    start, goal = cell[algorithmic.START], cell[algorithmic.GOAL]
    before: dict[tuple[int, int], tuple[int, int] | None] = {start: None}
    queue = deque([start])
    while queue:
        r, c = at = queue.popleft()
        if at == goal:
            way, step = set(), goal
            while step is not None:
                way.add(step)
                step = before[step]
            return way
        for near in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
            inside = 0 <= near[0] < side and 0 <= near[1] < side
            if inside and grid[near[0]][near[1]] != algorithmic.WALL and near not in before:
                before[near] = at
                queue.append(near)
    return None


@pytest.mark.parametrize("rooms", [2, 5])
def test_a_maze_is_a_tree_and_its_path_the_shortest(rooms: int):
    part = algorithmic.maze_path(60, rooms, generator=seeded(3))
    side = 2 * rooms - 1
    assert part.mask is not None
    seen = set()
    for x, y, mask in zip(part.x, part.y, part.mask, strict=True):
        grid = x.reshape(side, side)
        # rooms and passages: a spanning tree has one passage fewer than rooms
        assert int((grid != algorithmic.WALL).sum()) == 2 * rooms * rooms - 1
        way = _way(grid.tolist())
        assert way is not None
        assert {tuple(cell) for cell in y.reshape(side, side).nonzero().tolist()} == way
        assert torch.equal(mask, x != algorithmic.WALL)
        seen.add(tuple(x.tolist()))
    assert len(seen) > (50 if rooms == 5 else 10)


def test_reachability_is_that_of_a_search_and_balanced():
    part = algorithmic.maze_reachable(101, 6, generator=seeded(4))
    answers = [_way(x.reshape(6, 6).tolist()) is not None for x in part.x]
    assert answers == part.y.bool().tolist()
    assert sum(answers) == 50


@pytest.mark.parametrize("name", ["copy", "adding", "parity", "parity-whole", "sort", "maze", "maze-reach"])
def test_tasks_are_functions_of_their_arguments_with_longer_tests(name: str):
    sizes = {"train": 12, "test": 8, "length": 4}
    one, same, other = (data.sequence_task(name, **sizes, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.train.x, same.train.x)
    assert torch.equal(one.longer["4x"].y, same.longer["4x"].y)
    assert not torch.equal(one.train.x, other.train.x)
    assert not torch.equal(one.train.x[:8], one.test.x)
    assert one.length < one.longer["2x"].x.shape[1] < one.longer["4x"].x.shape[1]
    assert {part.x.dtype for part in (one.train, one.test)} <= {torch.uint8, torch.int16}
    batch = one.batch(one.test, torch.tensor([1, 3]))
    assert batch.x.dtype == (torch.float32 if name == "adding" else torch.int64)
    assert batch.y.dtype == (torch.float32 if name == "adding" else torch.int64)
    assert torch.equal(batch.y, one.batch(one.test, slice(None)).y[[1, 3]])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("copy", {"length": -1}),
        ("adding", {"length": 1}),
        ("sort", {"train": 0}),
        ("maze", {"length": 1}),
        ("parity", {"longer": (1,)}),
        ("parity", {"lenght": 5}),
        ("partiy", {}),
        ("mnist-rows", {"chunk": 5}),
        ("listops-small", {"train": 0}),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, object]):
    with pytest.raises(ConfigError):
        data.sequence_task(name, **{"train": 4, "test": 4, **options})


def test_byte_storage_is_not_overrun():
    with pytest.raises(ConfigError, match="byte"):
        algorithmic.sorting(2, 3, symbols=256, generator=seeded(0))
    with pytest.raises(ConfigError, match="open_share"):
        algorithmic.maze_reachable(2, 3, open_share=0.99, generator=seeded(0))


# --- images


def test_sequential_mnist_holds_the_pixels_in_reading_order():
    whole = data.load("mnist").limit(20, 10)
    pixels = data.sequence_task("mnist-pixels", train=20, test=10)
    rows = data.sequence_task("mnist-rows", train=20, test=10)
    assert pixels.train.x.shape == (20, 784, 1)
    assert rows.test.x.shape == (10, 28, 28)
    assert torch.equal(rows.train.x, whole.train_x[:, 0])
    assert torch.equal(pixels.train.x.flatten(), whole.train_x.flatten())
    assert torch.equal(pixels.train.y.long(), whole.train_y)
    batch = rows.batch(rows.train, slice(0, 3))
    torch.testing.assert_close(batch.x, whole.images("train", slice(0, 3))[:, 0], atol=1e-7, rtol=0)
    assert (rows.classes, rows.features, rows.targets, rows.inputs) == (10, 28, "sequence", "features")


def test_the_permutation_is_one_of_the_pixels_and_fixed_by_its_seed():
    plain = data.sequence_task("mnist-pixels", train=50, test=10)
    one, same, other = (data.sequence_task("mnist-permuted", train=50, test=10, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.train.x, same.train.x)
    assert not torch.equal(one.train.x, other.train.x)
    assert not torch.equal(one.train.x, plain.train.x)
    # the order that maps one image maps every other one, in both parts: columns are the same as a set
    columns = sorted(map(tuple, plain.train.x[:, :, 0].T.tolist()))
    assert sorted(map(tuple, one.train.x[:, :, 0].T.tolist())) == columns
    order = torch.randperm(784, generator=seeded(0, 784))
    assert torch.equal(one.test.x, plain.test.x[:, order])


def test_sequential_cifar_says_which_copy_it_is(monkeypatch: pytest.MonkeyPatch):
    x = torch.arange(2 * 3 * 32 * 32).remainder(251).to(torch.uint8).reshape(2, 3, 32, 32)
    y = torch.tensor([0, 1])
    fake = data.Dataset(
        "cifar10",
        "cifar10-jpeg-recompressed",
        x,
        y,
        x,
        y,
        10,
        (3, 32, 32),
        "none",
    )
    monkeypatch.setattr(sequences, "load_cifar10", lambda root: fake)
    task = sequences.sequential_cifar10()
    assert task.train.x.shape == (2, 1024, 3)
    assert task.train.x[1, 32 * 4 + 7].tolist() == x[1, :, 4, 7].tolist()
    assert "jpeg-recompressed" in task.variant
    assert sequences.sequential_cifar10(chunk=32).train.x.shape == (2, 32, 96)


# --- text


def _text(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    symbols = torch.arange(1000).remainder(7)
    monkeypatch.setattr(sequences, "load_text", lambda root: text.Text(symbols[:900], symbols[900:], "abcdefg"))
    return symbols


def test_text_targets_are_the_next_characters(monkeypatch: pytest.MonkeyPatch):
    symbols = _text(monkeypatch)
    task = data.sequence_task("text", length=16)
    assert (task.classes, task.causal, task.metric) == (7, True, "bits per character")
    assert not task.more_is_better
    assert torch.equal(task.train.x.flatten().long(), symbols[: 56 * 16])
    assert torch.equal(task.train.y.flatten().long(), symbols[1 : 56 * 16 + 1])
    assert torch.equal(task.test.x.flatten().long(), symbols[900 : 900 + 6 * 16])
    few = data.sequence_task("text", length=16, train=7)
    assert torch.equal(few.train.x, task.train.x[torch.arange(7) * 56 // 7])
    with pytest.raises(DataError, match="windows"):
        data.sequence_task("text", length=16, train=57)


# --- the shape of a task


def _part(**changes: object) -> sequences.Sequences:
    parts: dict[str, object] = {"x": torch.zeros(3, 4, dtype=torch.uint8), "y": torch.zeros(3, dtype=torch.uint8)}
    return sequences.Sequences(**{**parts, **changes})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.zeros(3, 4)},
        {"y": torch.zeros(2, dtype=torch.uint8)},
        {"y": torch.zeros(3, 5, dtype=torch.uint8)},
        {"mask": torch.ones(3, 4, dtype=torch.bool)},
        {"lengths": torch.full((3,), 5, dtype=torch.int16)},
        {"x": torch.zeros(0, 4, dtype=torch.uint8), "y": torch.zeros(0, dtype=torch.uint8)},
    ],
)
def test_sequences_that_do_not_fit_are_refused(changes: dict[str, object]):
    _part()
    with pytest.raises(DataError):
        _part(**changes)


def test_a_task_refuses_symbols_beyond_its_vocabulary_and_mixed_parts():
    good, large = _part(), _part(x=torch.full((3, 4), 5, dtype=torch.uint8))
    sequences.SequenceTask("t", "t", good, good, classes=2, vocabulary=5)
    with pytest.raises(DataError, match=r"\[0, 5\)"):
        sequences.SequenceTask("t", "t", good, large, classes=2, vocabulary=5)
    with pytest.raises(DataError, match="same kind"):
        sequences.SequenceTask("t", "t", good, good, classes=2)


def test_every_named_task_is_made_by_the_registry():
    # those of outside data have tests of their own; the whole ListOps takes seconds and has a file of its own
    for name in set(data.sequence_task_names()) - {"cifar10-pixels", "cifar10-rows", "text", "listops"}:
        task = data.sequence_task(name, train=3, test=2)
        assert (len(task.train), len(task.test)) == (3, 2)
        assert name in (task.name, task.name.replace("-sequential", "-pixels")) or name.startswith("mnist-")
