"""ListOps: the sampler that grows all trees at once against a recursive one, values against a stack machine."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest
import torch

from toreq import data
from toreq.data import listops
from toreq.data.batches import seeded
from toreq.errors import ConfigError, DataError

# Measured on 3,000 accepted samples of an implementation that is independent of this one.
SHARES = (0.171, 0.091, 0.077, 0.078, 0.090, 0.088, 0.077, 0.076, 0.077, 0.173)
ACCEPTED = 0.082


@pytest.fixture(scope="module")
def expressions() -> listops.Expressions:
    return listops.sample(3000, generator=seeded(0))


def _each(found: listops.Expressions) -> list[list[int]]:
    offsets = found.offsets.tolist()
    return [found.symbols[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def _recursive(draw: random.Random, depth: int) -> tuple[int, int]:
    """Length and depth of a random expression, as the grammar reads."""
    if depth == 10 or draw.random() >= 0.25:
        return 1, depth
    below = [_recursive(draw, depth + 1) for _ in range(draw.randint(2, 10))]
    return 2 + sum(n for n, _ in below), max(d for _, d in below)


def _depth(symbols: list[int]) -> int:
    depth = deepest = 1
    for symbol in symbols:
        depth += (listops.OPERATOR <= symbol < listops.CLOSE) - (symbol == listops.CLOSE)
        deepest = max(deepest, depth)
    return deepest


def test_the_evaluator_on_expressions_worked_by_hand():
    def value(written: str) -> int:
        names = ["", *map(str, range(10)), *listops.OPERATORS, "]"]
        symbols = [names.index(word) for word in written.split()]
        assert listops.text(symbols) == written
        return listops.evaluate([*symbols, 0, 0])

    assert value("7") == 7
    assert value("[MAX 2 9 [MIN 4 7 ] 0 ]") == 9
    assert value("[MED 1 8 4 ]") == 4
    assert value("[MED 1 8 4 3 ]") == 3  # the mean of 3 and 4, truncated
    assert value("[SM 9 8 7 [MIN 3 2 ] ]") == 6
    assert value("[MED [SM 5 5 ] 9 ]") == 4


@pytest.mark.parametrize("symbols", [[], [1, 2], [11, 1, 15], [11, 1, 2], [15], [11, 1, 2, 15, 15], [0, 1], [99]])
def test_what_is_no_expression_is_refused(symbols: list[int]):
    with pytest.raises(DataError):
        listops.evaluate(symbols)


def test_values_are_those_of_the_stack_machine(expressions: listops.Expressions):
    for symbols, value in list(zip(_each(expressions), expressions.values.tolist(), strict=True))[:400]:
        assert listops.evaluate(symbols) == value


def test_lengths_depths_and_distinctness(expressions: listops.Expressions):
    lengths = expressions.lengths
    assert 500 < int(lengths.min()) <= int(lengths.max()) < 2000
    found = _each(expressions)
    assert len({bytes(symbols) for symbols in found}) == 3000
    assert {_depth(symbols) for symbols in found[:300]} == {10}


def test_the_distribution_is_the_published_one(expressions: listops.Expressions):
    # 4.5 standard errors of the difference of two samples of 3,000
    shares = torch.bincount(expressions.values.long(), minlength=10) / 3000
    for share, expected in zip(shares.tolist(), SHARES, strict=True):
        assert abs(share - expected) < 4.5 * (2 * expected * (1 - expected) / 3000) ** 0.5
    accepted = 3000 / expressions.drawn
    assert abs(accepted - ACCEPTED) < 4.5 * ACCEPTED * (2 / 3000) ** 0.5


def test_lengths_are_those_of_a_recursive_sampler(expressions: listops.Expressions):
    draw, lengths, drawn = random.Random(0), [], 0
    while len(lengths) < 3000:
        length, depth = _recursive(draw, 1)
        drawn += 1
        if 500 < length < 2000:
            lengths.append(length)
            assert depth == 10
    own = expressions.lengths.double()
    error = (2 / 3000) ** 0.5 * statistics.stdev(lengths)
    assert abs(float(own.mean()) - statistics.mean(lengths)) < 4 * error
    assert abs(float(own.std()) - statistics.stdev(lengths)) < 4 * error
    assert abs(3000 / expressions.drawn - 3000 / drawn) < 4.5 * ACCEPTED * (2 / 3000) ** 0.5


def test_operators_and_numbers_of_arguments_are_uniform():
    grammar = listops.Grammar(max_depth=2, max_arguments=5, min_length=1, max_length=99)
    found = listops.sample(2000, grammar, generator=seeded(1))
    operators = torch.tensor([symbols[0] for symbols in _each(found)]).bincount(minlength=15)[11:15]
    # few distinct short expressions: of the long ones each operator has as many
    assert all(abs(n / 2000 - 0.25) < 0.05 for n in operators.tolist())
    assert set(found.lengths.tolist()) == {4, 5, 6, 7}
    assert len(set(map(bytes, _each(found)))) == 2000


def test_a_task_is_small_distinct_in_both_parts_and_padded():
    task, same = (data.sequence_task("listops-small", train=500, test=100, seed=3) for _ in range(2))
    assert torch.equal(task.train.x, same.train.x)
    assert torch.equal(task.test.y, same.test.y)
    assert (task.classes, task.vocabulary, task.padding, task.length) == (10, 16, 0, 63)
    assert len({bytes(x) for part in (task.train, task.test) for x in part.x.tolist()}) == 600
    for x, y in zip(task.test.x, task.test.y.tolist(), strict=True):
        assert listops.evaluate(x) == y
    lengths = task.train.lengths
    assert lengths is not None
    assert torch.equal((task.train.x != 0).sum(1), lengths.long())
    assert 4 < int(lengths.min()) <= int(lengths.max()) < 64


def test_an_exhausted_grammar_says_so():
    tiny = listops.Grammar(max_depth=2, max_arguments=2, min_length=0, max_length=5)
    # 10 digits, and 4 operators on pairs of digits
    assert len(listops.sample(410, tiny, generator=seeded(0)).values) == 410
    with pytest.raises(DataError, match="got 410"):
        listops.sample(411, tiny, generator=seeded(0))


def test_bad_grammars_are_refused():
    for changes in ({"max_depth": 1}, {"max_arguments": 1}, {"operator_share": 1.0}, {"max_length": 501}):
        with pytest.raises(ConfigError):
            listops.Grammar(**changes)  # pyright: ignore[reportArgumentType]
