"""The parts of TEP-SSR by themselves: streams, attention that overlooks padding, read-outs, sinusoids, chunks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from oracles import autograd_field
from toreq.core import Coupling
from toreq.errors import ConfigError
from toreq.systems.tepssr import chunk_for
from toreq.systems.tepssr_parts import (
    MaskedAttention,
    MaskedLinearAttention,
    Reader,
    Real,
    Stream,
    sinusoids,
)

N, VOCABULARY = 11, 6


@pytest.mark.parametrize("kind", [MaskedAttention, MaskedLinearAttention])
def test_masked_attention(kind: type) -> None:
    """Field against autograd of the value; as the ordinary attention of the tokens that count; deaf to padding."""
    g = torch.Generator().manual_seed(6)
    attend = kind(Real(0), "a", 6, heads=2, scale=0.7, generator=g).double()
    plain = kind.__mro__[1]("a", 6, heads=2).double()
    plain.load_state_dict(attend.state_dict())
    x = torch.tensor([[3, 2, 1, 0, 0], [1, 1, 2, 2, 3]])
    h = {"a": torch.randn(2, 5, 6, generator=g, dtype=torch.float64)}
    with torch.no_grad():
        bound = attend.bind(x)
        found = attend.field(h, bound)["a"]
        with torch.enable_grad():
            wanted = autograd_field(lambda s: attend.value(s, bound), h)["a"]
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        assert not found[0, 3:].any()
        for row, count in ((0, 3), (1, 5)):
            part = {"a": h["a"][row : row + 1, :count]}
            torch.testing.assert_close(plain.field(part, plain.bind(x))["a"][0], found[row, :count])
            value = attend.value({"a": h["a"][row : row + 1]}, bound.map(lambda t: t, lambda t, r=row: t[r : r + 1]))
            torch.testing.assert_close(plain.value(part, plain.bind(x)), value)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [MaskedAttention, MaskedLinearAttention])
def test_contrasts_of_attention_keep_their_digits(kind: type, masked: bool) -> None:
    """In float64 the contrast of values; in float32 as exact for states that differ by a millionth."""
    g = torch.Generator().manual_seed(7)
    kinds = kind if masked else kind.__mro__[1]
    mask = (Real(0),) if masked else ()
    attend = kinds(*mask, "a", 6, heads=2, scale=0.7, generator=g).double()
    x = torch.tensor([[3, 2, 1, 0, 0], [1, 1, 2, 2, 3]])
    plus = {"a": torch.randn(2, 5, 6, generator=g, dtype=torch.float64)}
    weight = torch.tensor([0.7, -1.3], dtype=torch.float64)
    for size, tolerance in ((0.8, 1e-10), (1e-6, 1e-7)):
        minus = {"a": plus["a"] + size * torch.randn(2, 5, 6, generator=g, dtype=torch.float64)}
        bound = attend.bind(x)
        wanted = Coupling.gradient(attend, plus, minus, weight, bound)["qk"].detach()
        found = attend.gradient(plus, minus, weight, bound)["qk"].detach()
        assert float((found - wanted).norm()) < tolerance * float(wanted.norm())
    single = {"a": plus["a"].float()}
    near = {"a": single["a"] + 1e-5 * torch.randn(2, 5, 6, generator=g)}
    wanted = attend.gradient(*({"a": s["a"].double()} for s in (single, near)), weight, attend.bind(x))["qk"].detach()
    attend = attend.float()
    found = attend.gradient(single, near, weight.float(), attend.bind(x))["qk"].detach()
    assert float((found - wanted).norm()) < 1e-5 * float(wanted.norm())


def test_sinusoids_tell_steps_apart() -> None:
    waves = torch.stack([sinusoids(k, torch.zeros(7, dtype=torch.float64)) for k in range(20)])
    assert waves.shape == (20, 7)
    torch.testing.assert_close(waves[:, 0], torch.arange(20, dtype=torch.float64).sin())
    assert float((torch.cdist(waves, waves) + 9 * torch.eye(20, dtype=torch.float64)).min()) > 0.1


@pytest.mark.parametrize("parts", [1, 3, 4, 9])
def test_parts_of_a_sequence_are_read_by_their_means(parts: int) -> None:
    """As torch's adaptive pooling of the tokens that count, wherever padding stands."""
    g = torch.Generator().manual_seed(11)
    h = torch.randn(3, 7, 5, generator=g)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    reader = Reader(7, 5, 2, parts)
    with torch.no_grad():
        found, unmasked = reader(h, mask), reader(h)
        for row in range(3):
            real = h[row, mask[row]]
            pooled = nn.functional.adaptive_avg_pool1d(real.T, parts).T if len(real) else torch.zeros(parts, 5)
            torch.testing.assert_close(found[row], reader.linear(pooled.flatten()))
            whole = nn.functional.adaptive_avg_pool1d(h[row].T, parts).T
            torch.testing.assert_close(unmasked[row], reader.linear(whole.flatten()))


def test_a_window_holds_the_positions_before() -> None:
    stream = Stream((9, 2), 8, "rows", 0, window=3)
    g = torch.Generator().manual_seed(12)
    x = torch.rand(2, 9, 2, generator=g)
    other = x.clone()
    other[:, 4] += 1
    moved = (stream(x) - stream(other)).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False] * 4 + [True] * 3 + [False] * 2
    with pytest.raises(ConfigError, match="1 for symbols"):
        Stream((9,), 8, "rows", VOCABULARY, window=2)


def test_stream_is_normalised_and_blank_at_padding() -> None:
    stream = Stream((N,), 16, "rows", VOCABULARY, mask=Real(0))
    x = torch.tensor([[1, 2, 3, 0, 0]])
    out = stream(x)
    assert not out[0, 3:].any()
    torch.testing.assert_close(out[0, :3].var(-1, unbiased=False), torch.ones(3), rtol=1e-3, atol=1e-3)
    assert not [n for n, _ in stream.named_parameters() if "position" in n]
    assert [n for n, _ in Stream((N,), 16, "rows", VOCABULARY, positions=True).named_parameters() if "position" in n]


@pytest.mark.parametrize(("count", "chunk"), [(784, 56), (28, 28), (1024, 64), (17, 17), (3, 32), (37, 37), (67, 32)])
def test_chunks_that_leave_none_half_empty(count: int, chunk: int) -> None:
    assert chunk_for(count) == chunk
    assert chunk_for(count, 32) <= 32
