"""One set of weights on every level of a pyramid: couplings whose weights are another level's, with small adapters.

A level's operator of the same kernel on a smaller grid is a compression of the finest level's (zero padding included),
an adapter's scales are at most 1, and a matrix between pooled units is :math:`D W U` with :math:`\\|D\\|\\|U\\| = 1`:
none has a larger norm than the operator it is derived from, so that one bound on the weights holds on every level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from toreq.core import Attention, Bilinear, Conv, Coupling, Dense, Drive, Lateral, LinearAttention, Operator, Potential
from toreq.core.operators import Tensors
from toreq.core.state import Bound
from toreq.errors import ConfigError
from toreq.systems.deep_hopfield import Bias

_ENDS = ("node", "pre", "post", "a", "b")


def renamed(coupling: Coupling, names: Mapping[str, str]) -> Coupling:
    """The coupling itself, with its nodes called by their new names."""
    coupling.nodes = tuple(names[n] for n in coupling.nodes)
    for end in _ENDS:
        if isinstance(getattr(coupling, end, None), str):
            setattr(coupling, end, names[getattr(coupling, end)])
    return coupling


class ChannelScale(nn.Module):
    """One number in (-1, 1) per output channel, the tanh of a learned one; 0.9 at first.

    A bound that is reached by none keeps the scales differentiable everywhere.

    Args:
        channels: how many.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), 1.5))

    def forward(self) -> Tensor:
        return self.scale.tanh()


class _Derived(Operator):
    """An operator whose weight is another one's, as seen from a coarser level; it owns an adapter at most."""

    def derive(self, base: Operator, adapt: bool) -> None:
        self._base = (base,)  # in a tuple: the weight belongs to the finest level
        del self.weight
        self.adapter = ChannelScale(base.out_shape[0]) if adapt else None

    def tensors(self) -> Tensors:
        weight = self.coarsened(self._base[0].tensors()["weight"])
        if self.adapter is not None:
            scale = self.adapter().view(-1, *[1] * (weight.dim() - 1))
            weight = weight * scale * scale.transpose(0, 1) if self.symmetric else weight * scale
        return {"weight": weight}

    def coarsened(self, weight: Tensor) -> Tensor:
        return weight


class SharedConv(_Derived, Conv):
    """The convolution ``base`` on a grid of another size.

    Args:
        base: the finest level's.
        in_shape: ``(C, H, W)`` on this level.
        adapt: learn a scale per output channel.
    """

    def __init__(self, base: Conv, in_shape: Sequence[int], adapt: bool = True) -> None:
        kernel = _shape(base)[-1]
        own = (base.out_shape[0], kernel, base.stride, base.padding, base.pool, base.symmetric)
        super().__init__(in_shape, *own, generator=torch.Generator())
        self.derive(base, adapt)


class SharedDense(_Derived, Dense):
    """The matrix ``base``, averaged over windows of outputs and summed over windows of inputs.

    Args:
        base: the finest level's.
        factor: units in a window; 1 for the matrix as it is.
        adapt: learn a scale per output unit.
    """

    def __init__(self, base: Dense, factor: int = 1, adapt: bool = True) -> None:
        rows, columns = _shape(base)
        super().__init__(columns // factor, rows // factor, base.symmetric, generator=torch.Generator())
        self.factor = factor
        self.derive(base, False)
        self.adapter = ChannelScale(rows // factor) if adapt else None

    def coarsened(self, weight: Tensor) -> Tensor:
        if self.factor == 1:
            return weight
        return weight.unflatten(1, (-1, self.factor)).sum(2).unflatten(0, (-1, self.factor)).mean(1)


def _shape(op: Operator) -> torch.Size:
    # of a parametrized weight the stored one: asking for the effective one would run its norm control
    parametrizations = getattr(op, "parametrizations", None)
    return (op.weight if parametrizations is None else parametrizations["weight"].original).shape  # type: ignore[union-attr,return-value]


class _SharedHeads(Coupling):
    """Attention with the queries and keys of another level, each head's features scaled."""

    def borrow(self, base: Attention | LinearAttention, adapt: bool) -> None:
        self._base = (base,)
        del self.query, self.key
        self.adapter = ChannelScale(2 * base.heads * base.head_features) if adapt else None

    def bind(self, x: Tensor) -> Bound:
        qk = self._base[0].bind(x)["qk"]
        return Bound(shared={"qk": qk if self.adapter is None else qk * self.adapter()[:, None]})


class SharedAttention(_SharedHeads, Attention):
    """:class:`~toreq.core.Attention` with the weights of ``base`` on another level's tokens.

    Args:
        base: the finest level's.
        node: this level's tokens.
        adapt: learn a scale per feature of the queries and keys.
    """

    def __init__(self, base: Attention, node: str, adapt: bool = True) -> None:
        super().__init__(node, *_heads(base), generator=torch.Generator())
        self.borrow(base, adapt)


class SharedLinearAttention(_SharedHeads, LinearAttention):
    """:class:`~toreq.core.LinearAttention` with the weights of ``base``; arguments as for
    :class:`SharedAttention`."""

    def __init__(self, base: LinearAttention, node: str, adapt: bool = True) -> None:
        super().__init__(node, *_heads(base), generator=torch.Generator())
        self.borrow(base, adapt)


def _heads(base: Attention | LinearAttention) -> tuple[int, int, int, float]:
    features = base.bind(torch.zeros(1))["qk"].shape[1]
    return features, base.heads, base.head_features, base.inverse_temperature


class SharedDrive(nn.Module):
    """The finest level's drive on a coarser level's input: ``scale * pooled(module(prepare(x))) + bias``.

    Args:
        module: of the finest level.
        prepare: from the network's input to what ``module`` is given here.
        pool: from what ``module`` gives to this level's shape.
        shape: of scale and bias, e.g. ``(C, 1, 1)``; None for neither (a gate must stay in (0, 1)).
    """

    def __init__(self, module: nn.Module, prepare: nn.Module, pool: nn.Module, shape: Sequence[int] | None) -> None:
        super().__init__()
        self._module = (module,)
        self.prepare, self.pool = prepare, pool
        self.scale = None if shape is None else nn.Parameter(torch.ones(*shape))
        self.bias = None if shape is None else nn.Parameter(torch.zeros(*shape))

    def forward(self, x: Tensor) -> Tensor:
        d = self.pool(self._module[0](self.prepare(x)))
        return d if self.scale is None or self.bias is None else d * self.scale + self.bias


class Derive:
    """Makes a coarser level's couplings from the finest one's.

    Args:
        prepare, pool: as in :class:`SharedDrive`.
        factor: units of the finest level to one of this level, for dense layers.
        adapt: give the operators adapters.
        per_channel: axes behind the channel axis in a drive's scale and bias (2 for images).
        gate_pool: as ``pool``, for gates, which must stay in (0, 1); ``pool`` when None.
    """

    def __init__(
        self,
        prepare: nn.Module,
        pool: nn.Module,
        factor: int,
        adapt: bool,
        per_channel: int = 0,
        gate_pool: nn.Module | None = None,
    ) -> None:
        self.prepare, self.pool, self.factor, self.adapt = prepare, pool, factor, adapt
        self.per_channel, self.gate_pool = per_channel, pool if gate_pool is None else gate_pool

    def __call__(self, fine: Coupling, node_shape: Sequence[int], in_shape: Sequence[int]) -> Coupling:
        """The coupling on this level, its nodes still called as on the finest.

        Args:
            fine: the finest level's.
            node_shape: this level's shape of the coupling's last node.
            in_shape: this level's shape of its first node.
        """
        if isinstance(fine, Drive):
            if isinstance(fine.module, Bias):
                return Drive(fine.node, Bias(fine.module.value.shape, node_shape))
            channels = node_shape[0] if self.per_channel else node_shape[-1]
            shape = (channels, *[1] * self.per_channel)
            return Drive(fine.node, SharedDrive(fine.module, self.prepare, self.pool, shape))
        if isinstance(fine, Bilinear):
            return Bilinear(self.operator(fine.op, in_shape), fine.pre, fine.post)
        if isinstance(fine, Lateral):
            gate = None if fine.gate is None else SharedDrive(fine.gate, self.prepare, self.gate_pool, None)
            return Lateral(self.operator(fine.op, in_shape), fine.node, gate)
        if isinstance(fine, Attention):
            return SharedAttention(fine, fine.node, self.adapt)
        if isinstance(fine, LinearAttention):
            return SharedLinearAttention(fine, fine.node, self.adapt)
        if isinstance(fine, Potential) and fine.drive is None:
            return Potential(self.operator(fine.op, in_shape), fine.node, fine.phi, fine.bias is not None)
        raise ConfigError(
            f"mstep: expected couplings that can be shared between levels, got {type(fine).__name__}; use shared=False"
        )

    def operator(self, op: Operator, in_shape: Sequence[int]) -> Operator:
        """``op`` on this level."""
        if isinstance(op, Conv):
            return SharedConv(op, in_shape, self.adapt)
        if isinstance(op, Dense):
            return SharedDense(op, self.factor, self.adapt)
        raise ConfigError(f"mstep: expected a Conv or Dense operator, got {type(op).__name__}; use shared=False")
