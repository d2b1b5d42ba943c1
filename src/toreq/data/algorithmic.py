"""Generated tasks on sequences whose length is an argument: copy memory, adding, parity, sorting, mazes.

Each task comes with longer test sets, so that a model trained at one length can be tested at twice and four times it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from toreq.data.batches import seeded
from toreq.data.sequences import Metric, Sequences, SequenceTask
from toreq.errors import ConfigError

TOLERANCE = 0.04
"""How near the sum must be to count as right in the adding problem (Hochreiter and Schmidhuber 1997)."""
WALL, OPEN, START, GOAL = 0, 1, 2, 3
_STEPS = 16_383
"""Adding problem: numbers are stored as k / 16383, so that a sum of two still is an int16."""


def copy_memory(count: int, length: int, *, items: int = 10, symbols: int = 8, generator: torch.Generator) -> Sequences:
    """Return the copy memory task (Arjovsky et al. 2016): repeat `items` symbols after a delay of `length`.

    The input is the items, `length` blanks, a marker, and as many blanks as items, over which the items are to come out
    in their order: `length` + 2 items + 1 positions. Blank is 0, the items 1..symbols, the marker symbols + 1. Only the
    outputs of the items count.
    """
    _at_least("copy_memory", (count, 1), (length, 0), (items, 1), (symbols, 1))
    _at_most_bytes("copy_memory", symbols + 2)
    seen = torch.randint(1, symbols + 1, (count, items), generator=generator, dtype=torch.uint8)
    width = length + 2 * items + 1
    x, y = torch.zeros(count, width, dtype=torch.uint8), torch.zeros(count, width, dtype=torch.uint8)
    x[:, :items], x[:, items + length], y[:, -items:] = seen, symbols + 1, seen
    return Sequences(x, y, mask=_last(count, width, items))


def adding(count: int, length: int, *, generator: torch.Generator) -> Sequences:
    """Return the adding problem (Hochreiter and Schmidhuber 1997): the sum of the two marked ones of `length` numbers.

    Features (number in [0, 1], marker 0 or 1), both stored times 16383; one mark in the first half, one in the second.
    Always answering 1 has a mean squared error of 1/6.
    """
    _at_least("adding", (count, 1), (length, 2))
    value = torch.randint(0, _STEPS + 1, (count, length), generator=generator)
    half = length // 2
    first = torch.randint(half, (count,), generator=generator)
    second = torch.randint(half, length, (count,), generator=generator)
    marker = torch.zeros(count, length, dtype=torch.int64)
    rows = torch.arange(count)
    marker[rows, first] = marker[rows, second] = _STEPS
    total = value[rows, first] + value[rows, second]
    return Sequences(torch.stack([value, marker], 2).to(torch.int16), total.to(torch.int16))


def parity(count: int, length: int, *, running: bool = False, generator: torch.Generator) -> Sequences:
    """Return bits (count, length) and whether the number of ones is odd, or with `running` that of every prefix."""
    _at_least("parity", (count, 1), (length, 1))
    x = torch.randint(2, (count, length), generator=generator, dtype=torch.uint8)
    y = (x.long().cumsum(1) % 2).to(torch.uint8)
    return Sequences(x, y if running else y[:, -1].contiguous())


def sorting(count: int, length: int, *, symbols: int = 16, generator: torch.Generator) -> Sequences:
    """Return `length` symbols to be put out in ascending order after them.

    The input is the symbols 1..symbols and `length` blanks (0), over which they are to come out sorted; only these
    outputs count.
    """
    _at_least("sorting", (count, 1), (length, 1), (symbols, 1))
    _at_most_bytes("sorting", symbols + 1)
    given = torch.randint(1, symbols + 1, (count, length), generator=generator, dtype=torch.uint8)
    blank = torch.zeros_like(given)
    y = torch.cat([blank, given.sort(1).values], 1)
    return Sequences(torch.cat([given, blank], 1), y, mask=_last(count, 2 * length, length))


def maze_path(count: int, length: int, *, generator: torch.Generator) -> Sequences:
    """Return mazes of `length` x `length` rooms, and which cells lie on the way from start to goal.

    A maze is a random spanning tree of the rooms (edges taken in random order unless they close a circle, as Kruskal
    does), so that the way is the only one and therefore the shortest. Cells, row by row, are rooms, passages and the
    walls between them: (2 length - 1)^2 positions of `WALL`, `OPEN`, `START`, `GOAL`. Only cells that are not wall
    count.
    """
    _at_least("maze_path", (count, 1), (length, 2))
    grid = _spanning_trees(count, length, generator)
    side = grid.shape[1]
    start, goal = _two_different(count, length * length, generator)
    rows = torch.arange(count)
    ends = torch.zeros(count, side, side, dtype=torch.bool)
    for symbol, room in ((START, start), (GOAL, goal)):
        at = (rows, 2 * (room // length), 2 * (room % length))
        grid[at], ends[at] = symbol, True
    x = grid.flatten(1)
    return Sequences(x, _without_dead_ends(grid != WALL, ends).to(torch.uint8).flatten(1), mask=x != WALL)


def maze_reachable(count: int, length: int, *, open_share: float = 0.6, generator: torch.Generator) -> Sequences:
    """Return grids of `length` x `length` cells, each open by chance, and whether the goal can be reached.

    Steps go to the four neighbours. The answers no and yes take turns.
    `length`^2 positions of `WALL`, `OPEN`, `START`, `GOAL`.
    """
    _at_least("maze_reachable", (count, 1), (length, 2))
    if not 0.1 <= open_share <= 0.9:
        # beyond, one of the two answers is so rare that the drawing would not end
        raise ConfigError(f"maze_reachable: expected open_share in [0.1, 0.9], got {open_share}; e.g. 0.6")
    wanted = torch.arange(count) % 2
    x = torch.zeros(count, length, length, dtype=torch.uint8)
    have = [0, 0]
    while sum(have) < count:
        grid, answers = _random_grids(max(64, count), length, open_share, generator)
        for answer in (0, 1):
            places = (wanted == answer).nonzero().flatten()[have[answer] :]
            found = grid[answers == answer][: len(places)]
            x[places[: len(found)]] = found
            have[answer] += len(found)
    return Sequences(x.flatten(1), wanted.to(torch.uint8))


def copy_task(
    train: int = 20_000, test: int = 1_000, length: int = 40, *, longer: Sequence[int] = (2, 4), seed: int = 0
) -> SequenceTask:
    """Return `copy_memory` as a task: 10 items of 8 kinds, `length` blanks between."""
    return _task("copy", copy_memory, train, test, length, longer, seed, classes=9, vocabulary=10)


def adding_task(
    train: int = 20_000, test: int = 1_000, length: int = 50, *, longer: Sequence[int] = (2, 4), seed: int = 0
) -> SequenceTask:
    """Return `adding` as a task: one number for each sequence."""
    return _task("adding", adding, train, test, length, longer, seed, metric="share within 0.04", scale=1 / _STEPS)


def parity_task(
    train: int = 20_000,
    test: int = 1_000,
    length: int = 16,
    *,
    running: bool = True,
    longer: Sequence[int] = (2, 4),
    seed: int = 0,
) -> SequenceTask:
    """Return `parity` as a task: the parity of every prefix, or of the whole when not `running`."""

    def generate(count: int, length: int, *, generator: torch.Generator) -> Sequences:
        return parity(count, length, running=running, generator=generator)

    name = "parity" if running else "parity-whole"
    return _task(name, generate, train, test, length, longer, seed, classes=2, vocabulary=2)


def sort_task(
    train: int = 20_000, test: int = 1_000, length: int = 12, *, longer: Sequence[int] = (2, 4), seed: int = 0
) -> SequenceTask:
    """Return `sorting` as a task: 16 kinds of symbols."""
    return _task("sort", sorting, train, test, length, longer, seed, classes=17, vocabulary=17)


def maze_task(
    train: int = 20_000,
    test: int = 1_000,
    length: int = 5,
    *,
    path: bool = True,
    longer: Sequence[int] = (2, 4),
    seed: int = 0,
) -> SequenceTask:
    """Return `maze_path` as a task, or `maze_reachable`; twice the length is twice the side, four times the cells."""
    generate = maze_path if path else maze_reachable
    return _task("maze" if path else "maze-reach", generate, train, test, length, longer, seed, classes=2, vocabulary=4)


def _task(
    name: str,
    generate: Callable[..., Sequences],
    train: int,
    test: int,
    length: int,
    longer: Sequence[int],
    seed: int,
    *,
    classes: int = 0,
    vocabulary: int = 0,
    metric: Metric = "accuracy",
    scale: float = 1.0,
) -> SequenceTask:
    if any(factor < 2 for factor in longer):
        raise ConfigError(f"{name}: expected factors of 2 or more in `longer`, got {tuple(longer)}; e.g. (2, 4)")
    return SequenceTask(
        name,
        f"{name}-{length}-seed{seed}",
        generate(train, length, generator=seeded(seed, 0)),
        generate(test, length, generator=seeded(seed, 1)),
        classes=classes,
        vocabulary=vocabulary,
        metric=metric,
        longer={f"{f}x": generate(test, f * length, generator=seeded(seed, f)) for f in longer},
        scale=scale,
        target_scale=scale,
    )


def _last(count: int, width: int, positions: int) -> Tensor:
    return (torch.arange(width) >= width - positions).expand(count, width)


def _two_different(count: int, kinds: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    first = torch.randint(kinds, (count,), generator=generator)
    second = torch.randint(kinds - 1, (count,), generator=generator)
    return first, second + (second >= first)


def _spanning_trees(count: int, side: int, generator: torch.Generator) -> Tensor:
    """uint8 (count, 2 side - 1, 2 side - 1), open where there is a room or a passage between two."""
    room = torch.arange(side * side).reshape(side, side)
    one = torch.cat([room[:, :-1].flatten(), room[:-1].flatten()])
    other = torch.cat([room[:, 1:].flatten(), room[1:].flatten()])
    order = torch.rand(count, len(one), generator=generator).argsort(1)
    part = torch.arange(side * side).repeat(count, 1)  # rooms of one number are connected
    grid = torch.zeros(count, 2 * side - 1, 2 * side - 1, dtype=torch.uint8)
    grid[:, ::2, ::2] = OPEN
    rows = torch.arange(count)
    for edge in order.T:
        a, b = one[edge], other[edge]
        from_, to = part[rows, a], part[rows, b]
        # the cell between two neighbouring rooms is halfway between theirs
        at = (rows, a // side + b // side, a % side + b % side)
        grid[at] = torch.where(from_ != to, OPEN, grid[at])
        part = torch.where(part == from_[:, None], to[:, None], part)
    return grid


def _neighbours(cells: Tensor) -> Tensor:
    """How many of the four neighbours of each cell are set; (count, H, W) bool to int64."""
    padded = torch.nn.functional.pad(cells.long(), (1, 1, 1, 1))
    return padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]


def _without_dead_ends(open_: Tensor, ends: Tensor) -> Tensor:
    """What is left of trees when all leaves but the two ends have been cut: the path between these."""
    while True:
        kept = open_ & (ends | (_neighbours(open_) > 1))
        if torch.equal(kept, open_):
            return kept
        open_ = kept


def _random_grids(count: int, side: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    open_ = torch.rand(count, side, side, generator=generator) < share
    start, goal = _two_different(count, side * side, generator)
    rows = torch.arange(count)
    grid = open_.to(torch.uint8)
    reached = torch.zeros_like(open_)
    for symbol, cell in ((START, start), (GOAL, goal)):
        at = (rows, cell // side, cell % side)
        open_[at], grid[at] = True, symbol
    reached[rows, start // side, start % side] = True
    while True:
        spread = open_ & (reached | (_neighbours(reached) > 0))
        if torch.equal(spread, reached):
            return grid, reached[rows, goal // side, goal % side].long()
        reached = spread


def _at_least(where: str, *bounds: tuple[int, int]) -> None:
    if any(value < least for value, least in bounds):
        raise ConfigError(
            f"{where}: expected sizes of at least {[least for _, least in bounds]}, got "
            f"{[value for value, _ in bounds]}; use larger ones"
        )


def _at_most_bytes(where: str, vocabulary: int) -> None:
    if vocabulary > 256:
        raise ConfigError(f"{where}: expected symbols that fit into a byte, got {vocabulary} kinds; use fewer")
