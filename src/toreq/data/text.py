"""Tiny Shakespeare: characters as symbols, whole or as windows with the next character as the label."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from toreq.data.dataset import Dataset
from toreq.data.files import Source, find_or_fetch, read_checked
from toreq.errors import DataError

TINY_SHAKESPEARE = Source(
    "tinyshakespeare/input.txt",
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/"
    "tinyshakespeare/input.txt",
    "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
_CONTEXT, _STRIDE = 64, 16
_LICENCE = "public domain (the repository of the file: MIT)"


@dataclass(frozen=True)
class Text:
    """A text as symbols.

    Attributes:
        train: int64 (characters,), the first 90 %.
        test: int64 (characters,), the rest.
        alphabet: the characters in the order of their symbols.
    """

    train: Tensor
    test: Tensor
    alphabet: str

    def encode(self, text: str) -> Tensor:
        """Return int64 symbols of `text`; raises `DataError` for a character outside the alphabet."""
        unknown = set(text) - set(self.alphabet)
        if unknown:
            raise DataError(f"Text.encode: expected characters of the alphabet, got {sorted(unknown)}; leave them out")
        return torch.tensor([self.alphabet.index(character) for character in text], dtype=torch.int64)

    def decode(self, symbols: Tensor) -> str:
        """Return the characters of int64 symbols (n,)."""
        return "".join(self.alphabet[symbol] for symbol in symbols.tolist())


def next_character_windows(symbols: Tensor, context: int, stride: int) -> tuple[Tensor, Tensor]:
    """Return windows (N, context) of `symbols` (n,), one every `stride`, and the symbol (N,) after each.

    Raises:
        DataError: a length below 1, or a text too short for one window.
    """
    if context < 1 or stride < 1 or len(symbols) <= context:
        raise DataError(
            f"next_character_windows: expected context, stride >= 1 and more than {context} symbols, got "
            f"context {context}, stride {stride} and {len(symbols)} symbols; use a shorter context"
        )
    windows = symbols.unfold(0, context + 1, stride)
    return windows[:, :-1].contiguous(), windows[:, -1].contiguous()


def load_text(root: str | os.PathLike[str] | None = None) -> Text:
    """Return Tiny Shakespeare, 1,115,394 characters of 65 kinds, split 90 / 10."""
    file = find_or_fetch(TINY_SHAKESPEARE, root)
    assert TINY_SHAKESPEARE.download_hash is not None
    data = read_checked(file, TINY_SHAKESPEARE.download_hash.removeprefix("sha256:"))
    codes = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    present = torch.bincount(codes, minlength=256) > 0
    symbols = (present.cumsum(0) - 1)[codes]
    cut = len(symbols) * 9 // 10
    alphabet = "".join(chr(code) for code in present.nonzero().flatten().tolist())
    return Text(symbols[:cut], symbols[cut:], alphabet)


def load_tinyshakespeare(root: str | os.PathLike[str] | None = None) -> Dataset:
    """Return next-character prediction from 64 characters, one window every 16; int64 symbols, 65 classes."""
    text = load_text(root)
    size = len(text.alphabet)
    return Dataset(
        "tinyshakespeare",
        f"tinyshakespeare-next-character-{_CONTEXT}",
        *next_character_windows(text.train, _CONTEXT, _STRIDE),
        *next_character_windows(text.test, _CONTEXT, _STRIDE),
        size,
        (_CONTEXT,),
        _LICENCE,
        num_symbols=size,
    )
