"""LoopedTransformer: tokens that settle under an attention energy and a tied feed-forward potential."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from toreq.core import (
    Attention,
    Coupling,
    Dense,
    Drive,
    Energy,
    Lateral,
    LayerNorm,
    LinearAttention,
    Node,
    Potential,
    control_norm,
)
from toreq.errors import ConfigError
from toreq.estimators import Estimator
from toreq.solvers import Anderson, Solver
from toreq.systems.base import System


class Tokens(nn.Module):
    """Image patches (through a small perceptron) or symbols as tokens ``(B, N, D)``, with learned positions.

    Args:
        input_shape: ``(C, H, W)`` for images, ``(N,)`` for symbols.
        features: D.
        patch: height and width of a patch, or ``"rows"`` for one token per image row.
        vocabulary: number of symbols; 0 for images.
        window: of how many tokens of an image, this one and those before it, each is made.
    """

    def __init__(
        self, input_shape: Sequence[int], features: int, patch: int | str, vocabulary: int, window: int = 1
    ) -> None:
        super().__init__()
        self.size: tuple[int, int] | None = None
        self.window = window
        if vocabulary < 0:
            raise ConfigError(f"Tokens: expected vocabulary >= 0, got {vocabulary}; 0 is for images")
        if vocabulary:
            if len(input_shape) != 1:
                raise ConfigError(f"Tokens: expected input_shape (N,) for symbols, got {tuple(input_shape)}; drop axes")
            self.count, self.embed = input_shape[0], nn.Embedding(vocabulary, features)
        else:
            if len(input_shape) != 3:
                raise ConfigError(
                    f"Tokens: expected input_shape (C, H, W), got {tuple(input_shape)}; set vocabulary for symbols"
                )
            channels, height, width = input_shape
            if patch != "rows" and (isinstance(patch, str) or patch < 1):
                raise ConfigError(f"Tokens: expected a patch of at least 1 pixel or 'rows', got {patch!r}; e.g. 4 or 7")
            self.size = (1, width) if patch == "rows" else (int(patch), int(patch))
            if height % self.size[0] or width % self.size[1]:
                raise ConfigError(
                    f"Tokens: expected a patch that divides {height} x {width}, got {patch}; e.g. 4, 7 or "
                    f"'rows' for MNIST"
                )
            self.count = (height // self.size[0]) * (width // self.size[1])
            pixels = channels * math.prod(self.size) * window
            self.embed = nn.Sequential(nn.Linear(pixels, 2 * features), nn.GELU(), nn.Linear(2 * features, features))
        self.position = nn.Parameter(torch.randn(self.count, features))

    def forward(self, x: Tensor) -> Tensor:
        if self.size is not None:
            h, w = self.size
            x = x.unflatten(-2, (-1, h)).unflatten(-1, (-1, w)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
            if self.window > 1:
                # (B, N, P, window), the oldest first; what is before the first token is zero
                x = nn.functional.pad(x, (0, 0, self.window - 1, 0)).unfold(1, self.window, 1).flatten(2)
        return self.embed(x) + self.position


class TokenHead(nn.Module):
    """Linear read-out of all tokens, or of their mean.

    Args:
        count, features: N and D of the tokens ``(B, N, D)``.
        num_classes: number of logits.
        pool: ``"none"`` reads every token with weights of its own, ``"mean"`` their average.
    """

    def __init__(self, count: int, features: int, num_classes: int, pool: str) -> None:
        super().__init__()
        if pool not in ("none", "mean"):
            raise ConfigError(f"TokenHead: expected pool 'none' or 'mean', got {pool!r}; choose one")
        self.mean = pool == "mean"
        self.linear = nn.Linear(features if self.mean else count * features, num_classes)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h.mean(1) if self.mean else h.flatten(1))


class LoopedTransformer(System):
    r"""A transformer block in a loop whose energy exists (cf. Hoover et al. 2023).

    .. math:: E = \langle a, h\rangle - \Phi_{LN}(a) - \langle h, \mathrm{embed}(x)\rangle
              - \frac1b\sum_{heads}\sum_i\log\sum_j e^{b\langle q_i, k_j\rangle} - \sum\phi(A h + c)

    where :math:`h = \mathrm{LN}(a)` are the tokens. With ``gated``, :math:`-\tfrac12\langle g*h, W(g*h)\rangle` is
    added.

    Args:
        input_shape: ``(C, H, W)``, or ``(N,)`` of symbol indices with ``vocabulary``.
        num_classes: number of classes.
        solver, estimator: override the shipped ones.
        features: D.
        heads: attention heads.
        hidden: width of the potential's hidden layer.
        patch: side of the image patches, or ``"rows"``.
        vocabulary: number of symbols; 0 for images.
        pool: ``"none"`` for a head that reads every token, ``"mean"`` for one that reads their mean.
        attention: ``"softmax"``, ``"linear"`` (O(N)) or ``"none"``.
        gated: add a gated lateral coupling over the features.
        coupling_scale: initial deviation of all couplings times :math:`\sqrt D`; settles at 0.5 or less.
        norm_bound: bounds the linear part of every coupling's Jacobian to an equal share of this; None: free. (Softmax
            holds its share only where attention is even, since a matrix of its weights has a norm of 1 to the root of
            the number of tokens, and adds a part that depends on the keys' spread: the trained radius is measured, not
            bounded.)
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        *,
        features: int = 96,
        heads: int = 4,
        hidden: int = 192,
        patch: int | str = 7,
        vocabulary: int = 0,
        pool: str = "none",
        attention: str = "softmax",
        gated: bool = False,
        coupling_scale: float = 0.4,
        norm_bound: float | None = 0.9,
    ) -> None:
        super().__init__(input_shape, num_classes)
        self.features, self.heads, self.hidden = features, heads, hidden
        self.patch, self.vocabulary, self.pool = patch, vocabulary, pool
        kinds = {"softmax": Attention, "linear": LinearAttention, "none": None}
        if attention not in kinds:
            raise ConfigError(f"LoopedTransformer: expected attention in {list(kinds)}, got {attention!r}; choose one")
        if norm_bound is not None and not norm_bound > 0:
            raise ConfigError(f"LoopedTransformer: expected norm_bound None or > 0, got {norm_bound}; try 0.9")
        if features < 2 or heads < 1 or features % heads or hidden < 1:
            raise ConfigError(
                f"LoopedTransformer: expected heads that divide features and hidden >= 1, got features={features}, "
                f"heads={heads}, hidden={hidden}; e.g. 96, 4, 192"
            )
        embed = Tokens(self.input_shape, features, patch, vocabulary)
        scale = coupling_scale / math.sqrt(features)
        couplings: list[Coupling] = [Drive("tokens", embed)]
        kind = kinds[attention]
        share = None if norm_bound is None else norm_bound / (1 + (kind is not None) + gated)
        if kind is not None:
            attend = kind("tokens", features, heads, scale=scale)
            if share is not None:
                # its field has two parts, through queries and keys, each |W_q||W_k| times the norm of the mixing
                # matrix, which for softmax is 1 only where attention is even
                control_norm(attend, math.sqrt(share / 2), "query")
                control_norm(attend, math.sqrt(share / 2), "key")
            couplings.append(attend)
        op = Dense(features, hidden, scale=scale)
        if share is not None:
            control_norm(op, math.sqrt(share))
        couplings.append(Potential(op, "tokens"))
        if gated:
            gate = nn.Sequential(Tokens(self.input_shape, features, patch, vocabulary), nn.Sigmoid())
            lateral = Dense(features, features, symmetric=True, scale=scale / 2)
            if share is not None:
                control_norm(lateral, share)
            couplings.append(Lateral(lateral, "tokens", gate))
        nodes = [Node("tokens", (embed.count, features), LayerNorm(features))]
        solver = Anderson(length=3) if solver is None else solver
        head = TokenHead(embed.count, features, num_classes, pool)
        self.assemble(Energy(nodes, couplings), solver, estimator, head)

    def check_dtype(self, x: Tensor) -> None:
        """Symbols are integer indices; images are floating point."""
        if not self.vocabulary:
            super().check_dtype(x)
        elif x.is_floating_point():
            raise ConfigError(f"LoopedTransformer: expected integer symbols, got {x.dtype}; use x.long()")
        elif x.device.type == "cpu" and not 0 <= int(x.min()) <= int(x.max()) < self.vocabulary:
            raise ConfigError(
                f"LoopedTransformer: expected symbols in [0, {self.vocabulary}), got {int(x.min())} to {int(x.max())}; "
                "create the system with a larger vocabulary"
            )

    def feedforward(self) -> nn.Module:
        """One ordinary pre-norm transformer block of the same widths."""
        embed = Tokens(self.input_shape, self.features, self.patch, self.vocabulary)
        head = TokenHead(embed.count, self.features, self.num_classes, self.pool)
        block = nn.TransformerEncoderLayer(
            self.features, self.heads, self.hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        return nn.Sequential(embed, block, nn.LayerNorm(self.features), head)
