"""The sequences of S9: which mark was the last one, and which value went with a key."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
SYMBOLS, MARKS, RARE = 8, 2, 1 / 16
"""Symbols of a sequence, those of them that are marks, and how often a mark comes."""
KEYS = 8


def last_mark(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random symbols among which marks are rare; the label of a position is the last mark up to it, -100 before any.

    Args:
        count: sequences.
        length: of each.
        generator: of symbols and marks.
    """
    x = torch.randint(MARKS, SYMBOLS, (count, length), generator=generator)
    marked = torch.rand(count, length, generator=generator) < RARE
    x = torch.where(marked, torch.randint(MARKS, (count, length), generator=generator), x)
    place = torch.where(x < MARKS, torch.arange(length), -1).cummax(1).values
    return x, torch.where(place >= 0, x.gather(1, place.clamp_min(0)), IGNORED)


def across(x: Tensor, size: int) -> Tensor:
    """The positions whose last mark stands in an earlier segment, ``(B, N)``."""
    place = torch.where(x < MARKS, torch.arange(x.shape[1], device=x.device), -1).cummax(1).values
    begins = torch.arange(x.shape[1], device=x.device) // size * size
    return (place >= 0) & (place < begins)


def recall(count: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of a key and a value, no key twice, and one of the keys once more; the label is its value.

    Args:
        count: sequences, of ``2 * pairs + 1`` symbols: keys, then values.
        pairs: at most `KEYS`.
        generator: of keys and values.
    """
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(KEYS, (count, pairs), generator=generator)
    asked = torch.randint(pairs, (count, 1), generator=generator)
    x = torch.stack([keys, KEYS + values], 2).flatten(1)
    return torch.cat([x, keys.gather(1, asked)], 1), values.gather(1, asked)[:, 0]
