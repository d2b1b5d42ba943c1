"""TEP-SSR: tokens that settle under a state-space potential, linear in their number."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from toreq.core import (
    SSM,
    Attention,
    Bilinear,
    Coupling,
    Drive,
    Dynamics,
    LayerNorm,
    LinearAttention,
    Node,
    Potential,
    Tanh,
    control_norm,
)
from toreq.errors import ConfigError, nearest
from toreq.estimators import Estimator
from toreq.solvers import Anderson, Solver
from toreq.systems.base import System, chain_bounds
from toreq.systems.tepssr_parts import (
    Carried,
    CausalField,
    MaskedAttention,
    MaskedLinearAttention,
    OnePass,
    Reader,
    Real,
    Stream,
    TokenEnergy,
)

ATTENTIONS = ("linear", "softmax", "none")


class TEPSSR(System):
    r"""Tokens joined by state-space maps, with attention beside them (the seed's state-space recirculation).

    .. math:: E = \sum_{l=0}^{L}\left[\langle a_l, h_l\rangle - \Phi_l(a_l)\right]
              - \langle h_0, \mathrm{embed}(x)\rangle
              - \sum_{l=1}^{L}\langle h_l, S^l_x h_{l-1} + c_l\rangle - K_{\mathrm{attention}}(h_0)

    with tokens :math:`h_0 = \mathrm{LN}(a_0)`, of gain 1, layers :math:`h_l = \tanh(g^l a_l)` and
    :math:`S^l_x` an :class:`~toreq.core.SSM` over the tokens, linear in the state. The field on the tokens is
    :math:`\mathrm{embed}(x) + S_x^{1\top} h_1` and that of the attention: every token hears every other one by a
    forward scan, a nonlinearity and a reversed scan, in O(N). With ``layers=0`` the tokens are the only node, under
    the potential :math:`\sum\log\cosh(S_x h_0 + c)`: what one layer with g = 1 amounts to once it has settled.

    Subclasses say what is read out: the last layer. With ``positions=False`` and no token-wise weights in the read-out
    any number of symbols or numbers will do, whatever ``input_shape`` says; images are of its size.

    Args:
        input_shape: ``(C, H, W)``, ``(N, F)`` numbers, or ``(N,)`` of symbol indices with ``vocabulary``.
        num_classes: number of classes.
        solver, estimator: override the shipped ones.
        pool: of the read-out.
        features: D.
        hidden: M, the channels of the state-space maps.
        layers: L, of tanh nodes above the tokens, each ``(N, M)``.
        gain: g, by which each layer is steeper than what is below it. The way up is that much stronger than the way
            down, at the same radius of the relaxation.
        states: complex numbers of state per channel.
        selective: step sizes and gates of the state-space maps are functions of the input.
        patch: side of the image patches (1: pixels), or ``"rows"``.
        window: of how many rows, patches, pixels or positions of the input, up to its own, a token is made; 1 for
            symbols. None: 4, or 1 for symbols and patches of several pixels.
        vocabulary: number of symbols; 0 for images and numbers.
        padding: the symbol that fills up short sequences, which then changes nothing; None: all symbols count.
        positions: learned positions, for the length given.
        attention: ``"linear"`` (O(N)), ``"softmax"`` or ``"none"`` (or None).
        heads: attention heads.
        encoding: steps of the start that see a timestep encoding, annealed to nothing at the last of them.
        timescale: longest initial time constant in tokens; half of N when None (at least 2).
        chunk: tokens per matrix product; when None a divisor of N of at most 64, or 32 where selective.
        coupling_scale: initial deviation of all couplings times the root of their inputs' size.
        norm_bound: bounds the linear part of the relaxation's Jacobian, by equal shares for the state-space maps
            together and the attention; None: free. (Softmax holds its share only where attention is even, since a
            matrix of its weights has a norm of 1 to the root of N, and adds a part that depends on the keys' spread:
            the trained radius is measured, not bounded.)
    """

    causal = False

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        solver: Solver | None,
        estimator: Estimator | None,
        *,
        pool: int | str,
        features: int,
        hidden: int,
        layers: int,
        gain: float,
        states: int,
        selective: bool,
        patch: int | str,
        window: int | None,
        vocabulary: int,
        padding: int | None,
        positions: bool,
        attention: str | None,
        heads: int,
        encoding: int,
        timescale: float | None,
        chunk: int | None,
        coupling_scale: float,
        norm_bound: float | None,
    ) -> None:
        super().__init__(input_shape, num_classes)
        where = type(self).__name__
        attention = "none" if attention is None else attention
        if attention not in ATTENTIONS:
            raise ConfigError(
                f"{where}: expected attention in {ATTENTIONS}, got {attention!r}; {nearest(attention, ATTENTIONS)}"
            )
        if features < 2 or min(heads, hidden, states) < 1 or (attention != "none" and features % heads):
            raise ConfigError(
                f"{where}: expected heads that divide features, hidden and states >= 1, got features={features}, "
                f"heads={heads}, hidden={hidden}, states={states}; e.g. 64, 4, 64, 1"
            )
        if (norm_bound is not None and not norm_bound > 0) or not coupling_scale > 0 or encoding < 0:
            raise ConfigError(
                f"{where}: expected norm_bound None or > 0, coupling_scale > 0, encoding >= 0, got {norm_bound}, "
                f"{coupling_scale}, {encoding}; e.g. 0.9, 0.4, 0"
            )
        if padding is not None and not 0 <= padding < vocabulary:
            raise ConfigError(
                f"{where}: expected padding to be one of {vocabulary} symbols, got {padding}; leave it None for images "
                "and numbers"
            )
        if layers < 0 or not gain > 0:
            raise ConfigError(
                f"{where}: expected layers >= 0 and gain > 0, got {layers} and {gain}; e.g. 1 and 16, or 0 layers for "
                "the potential"
            )
        self.features, self.hidden, self.states, self.selective = features, hidden, states, selective
        self.layers, self.gain = layers, gain
        small = patch in (1, "rows") or len(self.input_shape) < 3
        self.patch, self.vocabulary = patch, vocabulary
        self.window = (4 if small and not vocabulary else 1) if window is None else window
        self.positions, self.pool = positions, pool
        self.attention, self.heads, self.encoding = attention, heads, encoding
        self.timescale, self.chunk = timescale, chunk
        self.coupling_scale, self.norm_bound = coupling_scale, norm_bound
        self.mask = None if padding is None else Real(padding)
        self.elastic = not positions and pool != "none"
        dynamics, head = self.parts()
        self.assemble(dynamics, Anderson(length=3) if solver is None else solver, estimator, head)

    def parts(self) -> tuple[Dynamics, Reader]:
        """Freshly drawn dynamics and read-out."""
        stream = Stream(
            self.input_shape, self.features, self.patch, self.vocabulary, self.positions, self.mask, self.window
        )
        dynamics = self.dynamics_of(stream)
        dynamics.elastic, dynamics.encoding = self.elastic, self.encoding
        width = self.hidden if self.layers else self.features
        return dynamics, Reader(stream.count, width, self.num_classes, self.pool)

    def dynamics_of(self, stream: Stream) -> TokenEnergy | CausalField:
        """The dynamics of the tokens that the stream drives."""
        kinds = 1 + (self.attention != "none")
        share = None if self.norm_bound is None else self.norm_bound / kinds
        nodes = [self.node(stream)]
        terms: list[Coupling] = [Drive("tokens", stream)]
        if self.attention != "none":
            terms.append(self._attention(share))
        if not self.layers:
            op = self.state_space(stream, None if share is None else math.sqrt(share))
            terms.append(Potential(op, "tokens", drive=Carried(op, 0, stream, constant=False)))
        joint, _ = chain_bounds(share, self.layers + 1, lateral=False)
        below, width, slope = "tokens", self.features, 1.0
        for i in range(self.layers):
            name, steeper = f"layer{i + 1}", slope * self.gain
            bound = None if joint is None else joint / math.sqrt(slope * steeper)
            op = self.state_space(stream, bound, width)
            nodes.append(Node(name, (stream.count, self.hidden), Tanh(steeper)))
            terms += [Bilinear(op, below, name), Drive(name, Carried(op, i, stream, constant=True))]
            below, width, slope = name, self.hidden, steeper
        return TokenEnergy(nodes, terms)

    def node(self, stream: Stream) -> Node:
        """The tokens."""
        norm = LayerNorm(self.features)
        # learned, it grows, and the relaxation's Jacobian with it beyond what the norms bound
        norm.log_gain.requires_grad_(False)
        return Node("tokens", (stream.count, self.features), norm)

    def state_space(self, stream: Stream, bound: float | None, width: int | None = None) -> SSM:
        """A state-space map of norm at most ``bound``, whose gates read what drives the tokens."""
        width = self.features if width is None else width
        longest = max(2.0, stream.count / 2) if self.timescale is None else self.timescale
        if not longest >= 1:
            raise ConfigError(
                f"{type(self).__name__}: expected timescale None or >= 1 token, got {longest}; try the length over 2"
            )
        op = SSM(
            width,
            self.hidden,
            self.states,
            self._gates(stream) if self.selective else None,
            self.mask,
            self._chunk(stream.count),
            (1.0, longest),
            scale=self.coupling_scale / math.sqrt(width),
        )
        if bound is not None:
            control_norm(op.project, bound)
        return op

    def _chunk(self, count: int) -> int:
        if self.chunk is not None:
            return self.chunk
        # learned step sizes make decays steeper, and long chunks of steep decays overflow
        return chunk_for(count, 32 if self.selective else 64)

    def _gates(self, stream: Stream) -> nn.Module:
        linear = nn.Linear(self.features, 3 * self.hidden)
        with torch.no_grad():
            linear.bias.zero_()
            linear.bias[self.hidden :] = 2.0  # gates start almost open
        return nn.Sequential(stream, linear)

    def _attention(self, share: float | None) -> Attention | LinearAttention:
        options = {"heads": self.heads, "scale": self.coupling_scale / math.sqrt(self.features)}
        soft = self.attention == "softmax"
        attend: Attention | LinearAttention
        if self.mask is None:
            attend = (Attention if soft else LinearAttention)("tokens", self.features, **options)
        else:
            attend = (MaskedAttention if soft else MaskedLinearAttention)(
                self.mask, "tokens", self.features, **options
            )  # fmt: skip
        if share is not None:
            # its field has two parts, through queries and keys, each |W_q||W_k| times the norm of the mixing matrix,
            # which for softmax is 1 only where attention is even
            for name in ("query", "key"):
                control_norm(attend, math.sqrt(share / 2), name)
        return attend

    def forward(self, x: Tensor) -> Tensor:
        """Logits at equilibrium.

        Args:
            x: ``(B, *input_shape)``, floating point or symbols; any N where the system is elastic.

        Raises:
            ConfigError: for a wrong shape, dtype or device, or an empty batch.
        """
        self.check_input(x)
        return self.head(self.equilibrium(x), None if self.mask is None else self.mask(x))

    def check_input(self, x: Tensor) -> None:
        if isinstance(x, Tensor) and self._other_length(x):
            # all but the number of tokens is as it should be: what is left to check are the numbers
            self.check_dtype(x)
            x = x[:, :1].expand(-1, self.input_shape[0], *x.shape[2:])
        super().check_input(x)

    def _other_length(self, x: Tensor) -> bool:
        count, *rest = self.input_shape
        if not self.elastic or len(rest) > 1 or x.dim() != 2 + len(rest) or x.numel() == 0:
            return False
        return x.shape[1] != count and list(x.shape[2:]) == rest

    def check_dtype(self, x: Tensor) -> None:
        """Symbols are integer indices; images and numbers are floating point."""
        where = type(self).__name__
        if not self.vocabulary:
            super().check_dtype(x)
        elif x.is_floating_point():
            raise ConfigError(f"{where}: expected integer symbols, got {x.dtype}; use x.long()")
        elif x.device.type == "cpu" and not 0 <= int(x.min()) <= int(x.max()) < self.vocabulary:
            raise ConfigError(
                f"{where}: expected symbols in [0, {self.vocabulary}), got {int(x.min())} to {int(x.max())}; "
                "create the system with a larger vocabulary"
            )

    def maps(self) -> list[SSM]:
        """The state-space maps, from the tokens upwards."""
        return [m for m in self.equilibrium.modules() if isinstance(m, SSM)]

    def eigenvalues(self) -> list[Tensor]:
        r"""The decays of each state-space map at :math:`\Delta = 1`, complex ``(M, S)``, inside the unit disk."""
        return [op.eigenvalues() for op in self.maps()]

    def feedforward(self) -> nn.Module:
        """The same drive and one pass of the same block, freshly drawn."""
        return OnePass(*self.parts(), self.mask)

    @abstractmethod
    def criterion(self, logits: Tensor, y: Tensor) -> Tensor: ...


def chunk_for(count: int, most: int = 64) -> int:
    """The largest divisor of ``count`` from a quarter of ``most`` to ``most``, which leaves no chunk half empty; half
    of ``most`` where there is none."""
    return next((c for c in range(min(most, count), most // 4 - 1, -1) if count % c == 0), most // 2)
