"""The architectures of TEP-SSR: one label for a sequence, one for every token, and one for every token as it comes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from toreq.core import control_norm
from toreq.errors import ConfigError
from toreq.estimators import Estimator
from toreq.solvers import Solver
from toreq.systems.base import System
from toreq.systems.tepssr import TEPSSR
from toreq.systems.tepssr_parts import POOLS, CausalBlock, CausalField, Stream

IGNORED = -100
"""The label of a position without a target."""


class StateSpaceClassifier(TEPSSR):
    r"""One label for a sequence or an image: :class:`TEPSSR` read out by means over parts of it.

    Args:
        input_shape, num_classes, solver, estimator: as for :class:`TEPSSR`.
        pool: a number K of equally long parts of the sequence whose means are read, ``"mean"`` (K = 1), ``"last"`` or
            ``"none"`` (every token with weights of its own).
        features, hidden, layers, gain, states, selective, patch, window, vocabulary, padding, positions, attention,
            heads, encoding, timescale, chunk, coupling_scale, norm_bound: as for :class:`TEPSSR`.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        *,
        pool: int | str = 7,
        features: int = 64,
        hidden: int = 64,
        layers: int = 1,
        gain: float = 16.0,
        states: int = 1,
        selective: bool = True,
        patch: int | str = "rows",
        window: int | None = None,
        vocabulary: int = 0,
        padding: int | None = None,
        positions: bool = False,
        attention: str | None = "linear",
        heads: int = 4,
        encoding: int = 0,
        timescale: float | None = None,
        chunk: int | None = None,
        coupling_scale: float = 0.4,
        norm_bound: float | None = 0.9,
    ) -> None:
        if pool == "tokens":
            raise ConfigError(
                f"StateSpaceClassifier: expected pool in {POOLS} or a number of parts, got 'tokens'; use "
                "StateSpaceTagger for a label of every token"
            )
        super().__init__(
            input_shape,
            num_classes,
            solver,
            estimator,
            pool=pool,
            features=features,
            hidden=hidden,
            layers=layers,
            gain=gain,
            states=states,
            selective=selective,
            patch=patch,
            window=window,
            vocabulary=vocabulary,
            padding=padding,
            positions=positions,
            attention=attention,
            heads=heads,
            encoding=encoding,
            timescale=timescale,
            chunk=chunk,
            coupling_scale=coupling_scale,
            norm_bound=norm_bound,
        )

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        return System.criterion(self, logits, y)


class StateSpaceTagger(TEPSSR):
    r"""A label for every token: logits ``(B, N, num_classes)``, labels ``(B, N)``, -100 where there is none.

    Args:
        input_shape, num_classes, solver, estimator: as for :class:`TEPSSR`.
        features, hidden, layers, gain, states, selective, patch, window, vocabulary, padding, positions, attention,
            heads, encoding, timescale, chunk, coupling_scale, norm_bound: as for :class:`TEPSSR`.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        *,
        features: int = 64,
        hidden: int = 64,
        layers: int = 0,
        gain: float = 16.0,
        states: int = 1,
        selective: bool = True,
        patch: int | str = "rows",
        window: int = 1,
        vocabulary: int = 0,
        padding: int | None = None,
        positions: bool = False,
        attention: str | None = "linear",
        heads: int = 4,
        encoding: int = 0,
        timescale: float | None = None,
        chunk: int | None = None,
        coupling_scale: float = 0.4,
        norm_bound: float | None = 0.9,
    ) -> None:
        super().__init__(
            input_shape,
            num_classes,
            solver,
            estimator,
            pool="tokens",
            features=features,
            hidden=hidden,
            layers=layers,
            gain=gain,
            states=states,
            selective=selective,
            patch=patch,
            window=window,
            vocabulary=vocabulary,
            padding=padding,
            positions=positions,
            attention=attention,
            heads=heads,
            encoding=encoding,
            timescale=timescale,
            chunk=chunk,
            coupling_scale=coupling_scale,
            norm_bound=norm_bound,
        )

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy over the positions that have a label.

        Args:
            logits: ``(B, N, num_classes)``.
            y: class indices ``(B, N)``, int64, in ``[0, num_classes)`` or -100.
        """
        return tagging_criterion(type(self).__name__, logits, y, self.num_classes)


class CausalStateSpace(TEPSSR):
    r"""A label for every token that depends on it and those before it only, e.g. the next symbol.

    .. math:: a = \mathrm{embed}(x) + V\tanh(S_x\,\mathrm{LN}(a) + c)

    A causal map is not symmetric, so that this field has no energy: it is learned by
    :class:`~toreq.estimators.NonConservative`, whose correction needs products with the Jacobian and its transpose.
    There is no attention.

    Args:
        input_shape, num_classes, solver, estimator: as for :class:`TEPSSR`.
        features, hidden, states, selective, patch, window, vocabulary, padding, encoding, timescale, chunk,
            coupling_scale: as for :class:`TEPSSR`.
        norm_bound: bound on the product of the norms of V and S; None: free.
    """

    causal = True

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        *,
        features: int = 64,
        hidden: int = 64,
        states: int = 1,
        selective: bool = True,
        patch: int | str = "rows",
        window: int = 1,
        vocabulary: int = 0,
        padding: int | None = None,
        encoding: int = 0,
        timescale: float | None = None,
        chunk: int | None = None,
        coupling_scale: float = 0.4,
        norm_bound: float | None = 0.9,
    ) -> None:
        super().__init__(
            input_shape,
            num_classes,
            solver,
            estimator,
            pool="tokens",
            features=features,
            hidden=hidden,
            layers=0,
            gain=1.0,
            states=states,
            selective=selective,
            patch=patch,
            window=window,
            vocabulary=vocabulary,
            padding=padding,
            positions=False,
            attention="none",
            heads=1,
            encoding=encoding,
            timescale=timescale,
            chunk=chunk,
            coupling_scale=coupling_scale,
            norm_bound=norm_bound,
        )

    def dynamics_of(self, stream: Stream) -> CausalField:
        share = None if self.norm_bound is None else math.sqrt(self.norm_bound)
        block = CausalBlock(self.state_space(stream, share), self.coupling_scale / math.sqrt(self.hidden))
        if share is not None:
            control_norm(block.out, share)
        return CausalField(self.node(stream), block, drive=stream)

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy over the positions that have a label, as for :class:`StateSpaceTagger`."""
        return tagging_criterion(type(self).__name__, logits, y, self.num_classes)


def tagging_criterion(where: str, logits: Tensor, y: Tensor, classes: int) -> Tensor:
    """Mean cross entropy over the positions whose label is not -100.

    Raises:
        ConfigError: for labels of another type, shape or range, or when no position has one (ranges on the CPU only).
    """
    if y.dtype != torch.int64 or y.shape != logits.shape[:2]:
        raise ConfigError(
            f"{where}.criterion: expected int64 labels of shape {tuple(logits.shape[:2])}, got {y.dtype} "
            f"{tuple(y.shape)}; give one for every position, -100 where there is none"
        )
    counted = y != IGNORED
    if y.device.type == "cpu" and not (bool(counted.any()) and bool(((y >= 0) & (y < classes))[counted].all())):
        raise ConfigError(
            f"{where}.criterion: expected labels in [0, {classes}) or -100 (not everywhere), got {int(y.min())} to "
            f"{int(y.max())}; create the system with more classes or mend the labels"
        )
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED)


ARCHITECTURES: dict[str, type[System]] = {
    "classifier": StateSpaceClassifier,
    "tagger": StateSpaceTagger,
    "causal": CausalStateSpace,
}
"""All that there are, by name; ``create("tepssr", ...)`` has the first, which gives one label for an input."""
