"""ListOps: nested operations on lists of digits, drawn from the grammar of the Long Range Arena (Tay et al. 2020).

An expression is a digit, or an operator followed by at least two expressions and a closing bracket. All trees of a draw
grow level by level in the same tensors, so that a hundred thousand take seconds and no recursion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toreq.data.batches import seeded
from toreq.data.sequences import Sequences, SequenceTask
from toreq.errors import ConfigError, DataError

PADDING, DIGIT, OPERATOR, CLOSE = 0, 1, 11, 15
"""Symbols: padding, then the digits 0..9, then the operators in the order of `OPERATORS`, then the closing bracket."""
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
VOCABULARY = 16
LICENCE = "generated"
_CHUNK = 20_000
"""Trees grown at once: a few million nodes, some hundred megabytes."""
_IDLE = 200
"""Chunks without a new tree after which a grammar is taken to be exhausted."""


@dataclass(frozen=True)
class Grammar:
    """What expressions are drawn from; the defaults are those of the Long Range Arena.

    Attributes:
        max_depth: depth of the deepest digit; the root has depth 1. At least 2.
        max_arguments: an operator takes 2 to so many arguments, each number as likely.
        min_length, max_length: bounds on the number of symbols, both excluded.
        operator_share: chance of an operator at a depth below `max_depth`, in (0, 1).
    """

    max_depth: int = 10
    max_arguments: int = 10
    min_length: int = 500
    max_length: int = 2000
    operator_share: float = 0.25

    def __post_init__(self) -> None:
        if self.max_depth < 2 or self.max_arguments < 2 or not 0 < self.operator_share < 1:
            raise ConfigError(
                f"listops.Grammar: expected depth and arguments >= 2 and a share in (0, 1), got {self.max_depth}, "
                f"{self.max_arguments} and {self.operator_share}; e.g. 10, 10 and 0.25"
            )
        if self.max_length - self.min_length < 2 or self.max_length < 5:
            raise ConfigError(
                f"listops.Grammar: expected lengths between the bounds (both excluded) and room for an operator, got "
                f"{self.min_length} and {self.max_length}; e.g. 500 and 2000"
            )


SMALL = Grammar(max_depth=4, max_arguments=5, min_length=4, max_length=64)
"""A variant that a small network can learn within minutes."""


@dataclass(frozen=True)
class Expressions:
    """Distinct expressions, one after the other.

    Attributes:
        symbols: uint8 (total,).
        offsets: int64 (N + 1,): expression i is `symbols[offsets[i]:offsets[i + 1]]`.
        values: uint8 (N,), 0..9.
        drawn: trees drawn for them, also those of other lengths and those seen before.
    """

    symbols: Tensor
    offsets: Tensor
    values: Tensor
    drawn: int

    @property
    def lengths(self) -> Tensor:
        """int64 (N,)."""
        return self.offsets.diff()

    def padded(self, width: int) -> Tensor:
        """The symbols as uint8 (N, width), padded at the end; `width` at least the longest."""
        lengths = self.lengths
        if width < int(lengths.max()):
            raise DataError(f"Expressions.padded: expected width >= {int(lengths.max())}, got {width}; pad to more")
        out = torch.zeros(len(lengths), width, dtype=torch.uint8)
        out[torch.arange(width) < lengths[:, None]] = self.symbols
        return out


def sample(
    count: int, grammar: Grammar = Grammar(), *, generator: torch.Generator, seen: set[bytes] | None = None
) -> Expressions:
    """Draw `count` distinct expressions.

    Args:
        count: at least 1.
        grammar: what they are drawn from.
        generator: on the CPU.
        seen: digests of expressions not to draw again; those that are drawn are added.

    Raises:
        ConfigError: `count` below 1.
        DataError: the grammar seems to have no further expressions.
    """
    if count < 1:
        raise ConfigError(f"listops.sample: expected count >= 1, got {count}; ask for one or more")
    seen = set() if seen is None else seen
    symbols: list[Tensor] = []
    values: list[Tensor] = []
    lengths: list[Tensor] = []
    have = drawn = idle = 0
    # small draws from a fertile grammar need no large chunk; the size depends on the arguments alone
    chunk = min(_CHUNK, max(1000, 16 * count))
    while have < count:
        forest = _grow(chunk, grammar, generator)
        accepted, origin = _within(forest, chunk, grammar)
        flat, length, value = _serialise(accepted, len(origin))
        fresh = _unseen(flat, length, seen, count - have)
        idle = 0 if len(fresh) else idle + 1
        if idle == _IDLE:
            raise DataError(
                f"listops.sample: expected {count} distinct expressions, got {have} and none among the last "
                f"{_IDLE * chunk} trees; ask for fewer, or widen the grammar's depth, arguments or lengths"
            )
        have += len(fresh)
        drawn += chunk if have < count else int(origin[fresh[-1]]) + 1
        chosen = torch.zeros(len(length), dtype=torch.bool)
        chosen[fresh] = True
        symbols.append(flat[chosen.repeat_interleave(length)])
        values.append(value[fresh])
        lengths.append(length[fresh])
    total = torch.cat(lengths)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), total.cumsum(0)])
    return Expressions(torch.cat(symbols), offsets, torch.cat(values), drawn)


def evaluate(symbols: Sequence[int] | Tensor) -> int:
    """Return the value 0..9 of one expression, read symbol by symbol with a stack; padding at the end is skipped.

    Raises:
        DataError: it is no expression.
    """
    read = symbols.tolist() if isinstance(symbols, Tensor) else list(symbols)
    stack: list[list[int]] = [[]]
    for place, symbol in enumerate(read):
        if symbol == PADDING:
            if any(read[place:]):
                raise DataError(f"listops.evaluate: expected padding at the end only, got it at {place}; cut it out")
            break
        if DIGIT <= symbol < OPERATOR:
            stack[-1].append(symbol - DIGIT)
        elif OPERATOR <= symbol < CLOSE:
            stack.append([symbol - OPERATOR])
        elif symbol == CLOSE and len(stack) > 1 and len(stack[-1]) > 2:
            operator, *arguments = stack.pop()
            stack[-1].append(_apply(operator, arguments))
        else:
            raise DataError(f"listops.evaluate: expected an expression, got symbol {symbol} at {place}; check it")
    if len(stack) != 1 or len(stack[0]) != 1:
        raise DataError("listops.evaluate: expected one whole expression, got another number; check the brackets")
    return stack[0][0]


def text(symbols: Sequence[int] | Tensor) -> str:
    """Return an expression as it is written, as in ``[MAX 2 9 [MIN 4 7 ] 0 ]``."""
    names = ["", *map(str, range(10)), *OPERATORS, "]"]
    return " ".join(names[int(s)] for s in symbols if int(s) != PADDING)


def listops(
    train: int = 96_000, test: int = 2_000, grammar: Grammar = Grammar(), *, seed: int = 0, name: str = "listops"
) -> SequenceTask:
    """Return ListOps as a task: the value of an expression, 10 classes; no expression twice, in either part.

    Args:
        train, test: numbers of expressions.
        grammar: what they are drawn from.
        seed: of both parts.
        name: of the task.
    """
    seen: set[bytes] = set()
    parts = [sample(n, grammar, generator=seeded(seed, key), seen=seen) for key, n in ((0, train), (1, test))]
    width = grammar.max_length - 1
    sets = [Sequences(p.padded(width), p.values, lengths=p.lengths.to(torch.int16)) for p in parts]
    bounds = f"depth{grammar.max_depth}-arguments{grammar.max_arguments}-{grammar.min_length}-{grammar.max_length}"
    return SequenceTask(
        name, f"listops-{bounds}-seed{seed}", *sets, classes=10, vocabulary=VOCABULARY, padding=PADDING, licence=LICENCE
    )


@dataclass(frozen=True)
class _Level:
    """The nodes of one depth: siblings side by side, in the order of their parents."""

    tree: Tensor
    parent: Tensor
    operator: Tensor  # -1 for a digit
    digit: Tensor


def _grow(trees: int, grammar: Grammar, generator: torch.Generator) -> list[_Level]:
    levels: list[_Level] = []
    tree, parent = torch.arange(trees), torch.full((trees,), -1)
    for depth in range(1, grammar.max_depth + 1):
        n = len(tree)
        digit = torch.randint(10, (n,), generator=generator)
        operator = torch.full((n,), -1)
        if depth < grammar.max_depth:
            nested = torch.rand(n, generator=generator) < grammar.operator_share
            operator[nested] = torch.randint(len(OPERATORS), (int(nested.sum()),), generator=generator)
        levels.append(_Level(tree, parent, operator, digit))
        inner = (operator >= 0).nonzero().flatten()
        if len(inner) == 0:
            break
        arguments = torch.randint(2, grammar.max_arguments + 1, (len(inner),), generator=generator)
        parent = inner.repeat_interleave(arguments)
        tree = tree[parent]
    return levels


def _within(levels: list[_Level], trees: int, grammar: Grammar) -> tuple[list[_Level], Tensor]:
    """The trees of the lengths that are wanted, numbered anew, and their old numbers."""
    length = torch.zeros(trees, dtype=torch.int64)
    for level in levels:
        length += torch.bincount(level.tree, weights=1.0 + (level.operator >= 0).double(), minlength=trees).long()
    wanted = (length > grammar.min_length) & (length < grammar.max_length)
    number = wanted.cumsum(0) - 1
    kept: list[_Level] = []
    above = torch.empty(0, dtype=torch.int64)
    for level in levels:
        mask = wanted[level.tree]
        parent = level.parent[mask]
        parent = parent if not kept else above[parent]
        kept.append(_Level(number[level.tree[mask]], parent, level.operator[mask], level.digit[mask]))
        above = mask.cumsum(0) - 1
    return kept, wanted.nonzero().flatten()


def _serialise(levels: list[_Level], trees: int) -> tuple[Tensor, Tensor, Tensor]:
    """All trees in writing order, one after the other: symbols (total,), lengths and values (trees,)."""
    sizes, values = _sizes_and_values(levels)
    length = sizes[0] if trees else torch.zeros(0, dtype=torch.int64)
    symbols = torch.zeros(int(length.sum()), dtype=torch.uint8)
    place = length.cumsum(0) - length
    for depth, level in enumerate(levels):
        if depth:
            # a sibling starts where the one before it ends; the first one after the parent's operator
            ahead = sizes[depth].cumsum(0) - sizes[depth]
            first = torch.ones(len(ahead), dtype=torch.bool)
            first[1:] = level.parent[1:] != level.parent[:-1]
            rank = first.cumsum(0) - 1
            place = place[level.parent] + 1 + ahead - ahead[first][rank]
        nested = level.operator >= 0
        symbols[place] = torch.where(nested, level.operator + OPERATOR, level.digit + DIGIT).to(torch.uint8)
        symbols[(place + sizes[depth] - 1)[nested]] = CLOSE
    return symbols, length, values.to(torch.uint8)


def _sizes_and_values(levels: list[_Level]) -> tuple[list[Tensor], Tensor]:
    """Symbols below each node, by level, and the values of the roots; from the leaves upwards."""
    sizes: list[Tensor] = []
    below: tuple[Tensor, Tensor, Tensor] | None = None
    for level in reversed(levels):
        size = 1 + (level.operator >= 0).long()
        value = level.digit.clone()
        if below is not None:
            parent, size_below, value_below = below
            size.index_add_(0, parent, size_below)
            _reduce(level.operator, parent, value_below, value)
        sizes.append(size)
        below = level.parent, size, value
    assert below is not None
    return sizes[::-1], below[2]


def _reduce(operator: Tensor, parent: Tensor, argument: Tensor, value: Tensor) -> None:
    """Write the values of all operators of one level from those of their arguments."""
    count = torch.bincount(parent, minlength=len(operator))
    # digits 0..9, so sorting (parent, value) as one number sorts each operator's arguments
    ordered = (parent * 10 + argument).sort().values % 10
    start = count.cumsum(0) - count
    total = torch.zeros_like(value).index_add_(0, parent, argument)
    for name, of in (
        ("[MIN", lambda at: ordered[start[at]]),
        ("[MAX", lambda at: ordered[(start + count - 1)[at]]),
        ("[MED", lambda at: (ordered[(start + (count - 1) // 2)[at]] + ordered[(start + count // 2)[at]]) // 2),
        ("[SM", lambda at: total[at] % 10),
    ):
        at = (operator == OPERATORS.index(name)).nonzero().flatten()
        value[at] = of(at)


def _apply(operator: int, arguments: list[int]) -> int:
    name = OPERATORS[operator]
    if name == "[MIN":
        return min(arguments)
    if name == "[MAX":
        return max(arguments)
    if name == "[SM":
        return sum(arguments) % 10
    ordered, middle = sorted(arguments), len(arguments) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


def _unseen(symbols: Tensor, lengths: Tensor, seen: set[bytes], most: int) -> Tensor:
    """Numbers of the first so many expressions that were not seen before, which they then are."""
    data = symbols.numpy().tobytes()
    fresh: list[int] = []
    start = 0
    for number, length in enumerate(lengths.tolist()):
        digest = hashlib.blake2b(data[start : start + length], digest_size=16).digest()
        start += length
        if digest not in seen:
            seen.add(digest)
            fresh.append(number)
            if len(fresh) == most:
                break
    return torch.tensor(fresh, dtype=torch.int64)
