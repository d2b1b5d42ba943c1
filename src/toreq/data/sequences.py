"""Tasks on sequences in one shape, and those made of images and text: pixels one by one, next characters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from toreq.data.batches import seeded
from toreq.data.dataset import Dataset
from toreq.data.images import load_cifar10, load_mnist
from toreq.data.text import load_text
from toreq.errors import ConfigError, DataError

Metric = Literal["accuracy", "bits per character", "share within 0.04"]
_STORED = (torch.uint8, torch.int16)
_PERMUTATION = 784
"""Key of the random stream of permutations, apart from those of the subsets."""


@dataclass(frozen=True)
class Sequences:
    """Sequences of one width with their targets, as stored.

    Attributes:
        x: uint8 or int16, (N, L) symbols or (N, L, F) features.
        y: uint8 or int16, (N,) for a target per sequence or (N, L) for one per position.
        mask: bool (N, L), the positions whose targets count; None for all, and with a target per sequence.
        lengths: int16 (N,), the symbols that are no padding; None for all L.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None = None
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x.dtype not in _STORED or self.y.dtype not in _STORED or self.x.ndim not in (2, 3):
            raise DataError(
                f"Sequences: expected uint8 or int16 x (N, L) or (N, L, F) and y, got {self.x.dtype} of shape "
                f"{tuple(self.x.shape)} and {self.y.dtype}; convert them"
            )
        own = tuple(self.x.shape[:2])
        if tuple(self.y.shape) not in (own[:1], own) or not len(self.x):
            raise DataError(
                f"Sequences: expected targets of shape {own[:1]} or {own}, at least one, got {tuple(self.y.shape)}; "
                "give one for each sequence or for each position"
            )
        if self.mask is not None and (self.mask.dtype != torch.bool or self.mask.shape != self.y.shape):
            raise DataError(
                f"Sequences: expected a bool mask of the shape of the targets {tuple(self.y.shape)}, got "
                f"{self.mask.dtype} of shape {tuple(self.mask.shape)}; a target per sequence has none"
            )
        if self.lengths is not None and (self.lengths.shape != own[:1] or int(self.lengths.max()) > own[1]):
            raise DataError(f"Sequences: expected {own[0]} lengths up to {own[1]}, got others; count the symbols")

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.x)

    def first(self, count: int) -> Sequences:
        """The first so many sequences, or all that there are."""
        parts = (self.x, self.y, self.mask, self.lengths)
        return Sequences(*(None if p is None else p[:count] for p in parts))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Batch:
    """Sequences as a model takes them.

    Attributes:
        x: int64 (B, L) symbols, or floats (B, L, F).
        y: int64 class indices, or floats where there are no classes; (B,) or (B, L).
        mask: bool (B, L), or None.
        lengths: int64 (B,), or None.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None
    lengths: Tensor | None


@dataclass(frozen=True)
class SequenceTask:
    """A task for any model from (B, L) symbols or (B, L, F) features to (B, L, C), or to (B, C) if a sequence has one
    target.

    Attributes:
        name: what it was asked for by.
        variant: what exactly it is; results record it.
        train, test: the two parts.
        classes: C, or 0 for a number (C is 1 then).
        vocabulary: number of symbols, 0 for features.
        metric: how it is measured: percent of targets that are right, bits per character, or percent of numbers
            within 0.04.
        longer: other test sets, by name (``"2x"``), for a model that was trained on `train`.
        scale: what stored features are multiplied by.
        target_scale: what stored targets are multiplied by, where they are numbers.
        causal: whether a position must not see later ones, since they hold its target.
        padding: the symbol that fills up short sequences, None where there is none.
        licence: the terms, in a line.
    """

    name: str
    variant: str
    train: Sequences
    test: Sequences
    classes: int
    vocabulary: int = 0
    metric: Metric = "accuracy"
    longer: Mapping[str, Sequences] = field(default_factory=dict)
    scale: float = 1.0
    target_scale: float = 1.0
    causal: bool = False
    padding: int | None = None
    licence: str = "generated"

    def __post_init__(self) -> None:
        for part in (self.train, self.test, *self.longer.values()):
            if (part.x.ndim == 2) != bool(self.vocabulary) or part.y.ndim != self.train.y.ndim:
                raise DataError(
                    f"SequenceTask {self.name!r}: expected the same kind of inputs and targets in every part, symbols "
                    f"with a vocabulary and features without, got x {tuple(part.x.shape)}, y {tuple(part.y.shape)}, "
                    f"vocabulary {self.vocabulary}; make them alike"
                )
            for values, bound in ((part.x, self.vocabulary), (part.y, self.classes)):
                if bound and not 0 <= int(values.min()) <= int(values.max()) < bound:
                    raise DataError(
                        f"SequenceTask {self.name!r}: expected numbers in [0, {bound}), got {int(values.min())} to "
                        f"{int(values.max())}; check vocabulary and classes"
                    )

    @property
    def inputs(self) -> Literal["symbols", "features"]:
        """What a position holds."""
        return "symbols" if self.vocabulary else "features"

    @property
    def features(self) -> int:
        """F, the numbers at each position; 0 for symbols."""
        return 0 if self.vocabulary else self.train.x.shape[2]

    @property
    def targets(self) -> Literal["sequence", "position"]:
        """What has a target."""
        return "position" if self.train.y.ndim == 2 else "sequence"

    @property
    def outputs(self) -> int:
        """C, the numbers that a model gives."""
        return self.classes or 1

    @property
    def length(self) -> int:
        """L of the training sequences."""
        return self.train.x.shape[1]

    @property
    def more_is_better(self) -> bool:
        """Whether the metric grows with skill."""
        return self.metric != "bits per character"

    def batch(self, part: Sequences, index: Tensor | slice, device: torch.device | str = "cpu") -> Batch:
        """The sequences at `index` of a part, converted: symbols and classes to int64, the rest to scaled floats."""
        x, y = part.x[index].to(device), part.y[index].to(device)
        return Batch(
            x.long() if self.vocabulary else x.float() * self.scale,
            y.long() if self.classes else y.float() * self.target_scale,
            None if part.mask is None else part.mask[index].to(device),
            None if part.lengths is None else part.lengths[index].long().to(device),
        )


def sequential_mnist(
    train: int | None = None, test: int | None = None, *, chunk: int = 1, permuted: bool = False, seed: int = 0
) -> SequenceTask:
    """Return MNIST, its 784 pixels in reading order (Le et al. 2015).

    Args:
        train, test: numbers of images, balanced over the classes; None for all.
        chunk: pixels at each position, a divisor of 784: 1 for one by one, 28 for rows.
        permuted: shuffle the pixels, all images alike, before they are cut into chunks.
        seed: of the permutation.
    """
    return _pixels(load_mnist().limit(train, test), chunk, seed if permuted else None)


def sequential_cifar10(
    train: int | None = None,
    test: int | None = None,
    *,
    chunk: int = 1,
    root: str | os.PathLike[str] | None = None,
) -> SequenceTask:
    """Return CIFAR-10, 1024 positions of three channels in reading order, or fewer positions of several pixels.

    The task's ``variant`` says whether the images are the original ones or a JPEG-recompressed copy, whose results are
    not comparable with published ones.

    Args:
        train, test: numbers of images, balanced over the classes; None for all.
        chunk: pixels at each position, a divisor of 1024.
        root: the data folder, as for `load`.
    """
    return _pixels(load_cifar10(root).limit(train, test), chunk, None)


def tiny_shakespeare(
    length: int = 128,
    train: int | None = None,
    test: int | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
) -> SequenceTask:
    """Return the prediction of every next character in windows of so many characters, side by side.

    A position sees its window up to itself, so the first ones see little: bits per character fall as windows grow, and
    only those of one length compare.

    Args:
        length: characters of a window, at least 1.
        train, test: numbers of windows; the training windows are spread over the text, the test windows are its first.
        root: the data folder, as for `load`.
    """
    whole = load_text(root)
    parts: list[Sequences] = []
    for part, count in ((whole.train, train), (whole.test, test)):
        windows = (len(part) - 1) // length if length > 0 else 0
        wanted = windows if count is None else count
        if not 1 <= wanted <= windows:
            raise DataError(
                f"tiny_shakespeare: expected 1 to {windows} windows of length {length} >= 1, got {wanted}; "
                "ask for fewer"
            )
        symbols = part[: windows * length + 1].to(torch.uint8)
        x, y = symbols[:-1].reshape(windows, length), symbols[1:].reshape(windows, length)
        if part is whole.train:
            index = torch.arange(wanted) * windows // wanted
            x, y = x[index], y[index]
        parts.append(Sequences(x[:wanted].contiguous(), y[:wanted].contiguous()))
    size = len(whole.alphabet)
    return SequenceTask(
        "text",
        f"tinyshakespeare-every-next-character-{length}",
        *parts,
        classes=size,
        vocabulary=size,
        metric="bits per character",
        causal=True,
        licence="public domain (the repository of the file: MIT)",
    )


def _pixels(data: Dataset, chunk: int, permutation: int | None) -> SequenceTask:
    channels, height, width = data.input_shape
    pixels = height * width
    if chunk < 1 or pixels % chunk:
        raise ConfigError(f"sequences: expected a chunk that divides {pixels} pixels, got {chunk}; e.g. 1 or {width}")
    order = torch.arange(pixels)
    if permutation is not None:
        order = torch.randperm(pixels, generator=seeded(permutation, _PERMUTATION))

    def part(x: Tensor, y: Tensor) -> Sequences:
        flat = x.flatten(2)[:, :, order].transpose(1, 2)  # (N, pixels, channels)
        return Sequences(flat.reshape(len(x), pixels // chunk, chunk * channels), y.to(torch.uint8))

    kind = f"-permuted{permutation}" if permutation is not None else ""
    return SequenceTask(
        f"{data.name}-sequential",
        f"{data.variant}-sequential-by-{chunk}{kind}",
        part(data.train_x, data.train_y),
        part(data.test_x, data.test_y),
        classes=data.num_classes,
        scale=1 / 255,
        licence=data.licence,
    )
