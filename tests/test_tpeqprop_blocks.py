"""Blocks with closed-form adjoints, against autograd and finite differences in float64."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from toreq.core.blocks import (
    INPUT,
    Branch,
    Convolution,
    Given,
    Linear,
    Map,
    Norm,
    Pointwise,
    SelfAttention,
    Stack,
    alignment,
)
from toreq.core.norm_control import control_norm
from toreq.core.state import Bound
from toreq.errors import ConfigError


def _transformer(feedback: str = "exact") -> Map:
    attention = Branch(Stack(Norm(8), SelfAttention(8, 2, feedback=feedback)), 0.7, skip=False, inject=True)
    perceptron = Stack(Norm(8), Linear(8, 12, feedback=feedback), Pointwise("gelu"), Linear(12, 8, feedback=feedback))
    return Stack(attention, Branch(perceptron, 0.5))


BLOCKS = {
    "linear": (lambda f: Linear(5, 7, feedback=f), (5,)),
    "linear_tokens": (lambda f: Linear(5, 7, feedback=f), (3, 5)),
    "convolution": (lambda f: Convolution(2, 3, 3, 1, 1, feedback=f), (2, 6, 6)),
    "strided": (lambda f: Convolution(2, 3, 3, 2, 1, feedback=f), (2, 7, 7)),
    "norm": (lambda f: Norm(6), (4, 6)),
    "tanh": (lambda f: Pointwise("tanh"), (5,)),
    "relu": (lambda f: Pointwise("relu"), (5,)),
    "gelu": (lambda f: Pointwise("gelu"), (5,)),
    "attention": (lambda f: SelfAttention(8, 2, feedback=f), (5, 8)),
    "dense_branch": (lambda f: Branch(Stack(Pointwise("tanh"), Linear(6, 6, feedback=f)), 0.3), (6,)),
    "injected": (lambda f: Branch(Stack(Pointwise("tanh"), Linear(6, 6, feedback=f)), skip=False, inject=True), (6,)),
    "transformer": (_transformer, (5, 8)),
    "given": (lambda f: Given(), (4,)),
}


def _drawn(name: str, feedback: str = "exact") -> tuple[Map, Tensor, Bound]:
    """A block with no parameter at a special value, a state, and the bound tensors as leaves of a graph."""
    g = torch.Generator().manual_seed(3)
    build, shape = BLOCKS[name]
    block = build(feedback).double()
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    h = torch.randn(4, *shape, generator=g, dtype=torch.float64)
    x = torch.randn(4, *shape, generator=g, dtype=torch.float64).requires_grad_()
    shared = {k: t.detach().requires_grad_() for k, t in block.tensors().items()}
    return block, h, Bound(shared, {INPUT: x})


@pytest.mark.parametrize("name", BLOCKS)
def test_the_adjoint_is_autograds(name: str) -> None:
    block, h, bound = _drawn(name)
    leaf = h.clone().requires_grad_()
    out, _ = block.run(leaf, bound)
    c = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    wanted = torch.autograd.grad(out, [leaf, *bound.shared.values(), bound[INPUT]], c, allow_unused=True)
    grads: dict[str, Tensor] = {}
    with torch.no_grad():
        again, saved = block.run(h, bound)
        message = block.pull(c, saved, bound, grads)
    torch.testing.assert_close(again, out.detach(), rtol=0, atol=0)
    assert wanted[0] is not None
    torch.testing.assert_close(message, wanted[0], rtol=1e-12, atol=1e-13)
    names = [*bound.shared, INPUT]
    used = {n: g for n, g in zip(names, wanted[1:], strict=True) if g is not None}
    assert set(grads) == set(used)
    for n, g in used.items():
        torch.testing.assert_close(grads[n], g, rtol=1e-12, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", BLOCKS)
def test_without_gradients_the_message_is_the_same(name: str) -> None:
    block, h, bound = _drawn(name)
    with torch.no_grad():
        out, saved = block.run(h, bound)
        c = torch.ones_like(out)
        both, alone = block.pull(c, saved, bound, {}), block.pull(c, saved, bound, None)
    assert torch.equal(both, alone)


@pytest.mark.parametrize("name", ["linear", "strided", "attention", "transformer"])
def test_the_plain_module_runs_the_same_function(name: str) -> None:
    block, h, bound = _drawn(name)
    x = bound[INPUT]
    with torch.no_grad():
        assert torch.equal(block(h, x), block.run(h, Bound(block.tensors(), {INPUT: x}))[0])


def test_layer_norm_is_torchs() -> None:
    block, h, _ = _drawn("norm")
    assert isinstance(block, Norm)
    wanted = nn.functional.layer_norm(h, (6,), block.weight, block.bias, block.eps)
    torch.testing.assert_close(block(h), wanted, rtol=1e-13, atol=1e-13)


def test_attention_is_torchs() -> None:
    block, h, _ = _drawn("attention")
    assert isinstance(block, SelfAttention)
    other = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        other.in_proj_weight.copy_(block.inner)
        other.in_proj_bias.copy_(block.inner_bias)
        other.out_proj.weight.copy_(block.outer)
        other.out_proj.bias.copy_(block.outer_bias)
        wanted, _ = other(h, h, h)
        torch.testing.assert_close(block(h), wanted, rtol=1e-12, atol=1e-12)


def test_a_learned_way_back_uses_its_own_matrix_and_gets_the_weights_update() -> None:
    block, h, bound = _drawn("linear", "learned")
    c = torch.randn(4, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    grads: dict[str, Tensor] = {}
    with torch.no_grad():
        _, saved = block.run(h, bound)
        message = block.pull(c, saved, bound, grads)
    torch.testing.assert_close(message, c @ bound["weight_back"].detach())
    assert not torch.allclose(message, c @ bound["weight"].detach())
    torch.testing.assert_close(grads["weight"], c.T @ h)
    torch.testing.assert_close(grads["weight_back"], grads["weight"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["linear", "strided", "attention", "transformer"])
def test_a_way_back_equal_to_the_weights_is_the_exact_adjoint(name: str) -> None:
    block, h, bound = _drawn(name, "learned")
    exact, _, _ = _drawn(name)
    with torch.no_grad():
        state = block.state_dict()
        exact.load_state_dict({k: v for k, v in state.items() if not k.endswith("_back")})
        for m in block.maps():
            for weight, back in m.learned.items():
                getattr(m, back).copy_(getattr(m, weight))
        messages = []
        for b in (block, exact):
            own = Bound(b.tensors(), bound.batched)
            out, saved = b.run(h, own)
            messages.append(b.pull(torch.ones_like(out), saved, own, None))
    torch.testing.assert_close(messages[0], messages[1], rtol=1e-12, atol=1e-12)
    angles = alignment(nn.ModuleDict({"block": block}))
    assert angles
    assert all(float(a) < 1e-4 for a in angles.values())


def test_decay_and_shared_updates_align_both_ways() -> None:
    """Kolen and Pollack: same updates and the same decoupled decay shrink W - B by 1 - rate * decay a step."""
    torch.manual_seed(0)
    block = Linear(20, 10, feedback="learned").double()
    rate, decay, steps = 0.05, 0.4, 40
    optimizer = torch.optim.AdamW(block.parameters(), lr=rate, weight_decay=decay)
    assert isinstance(block.weight_back, nn.Parameter)
    first = (block.weight - block.weight_back).detach().clone()
    before = float(alignment(block)[".weight"])
    for _ in range(steps):
        h, c = torch.randn(16, 20, dtype=torch.float64), torch.randn(16, 10, dtype=torch.float64)
        grads: dict[str, Tensor] = {}
        with torch.no_grad():
            bound = Bound(block.tensors())
            _, saved = block.run(h, bound)
            block.pull(c, saved, bound, grads)
        for n, p in block.named_parameters():
            p.grad = grads[n]
        optimizer.step()
    left = (block.weight - block.weight_back).detach()
    torch.testing.assert_close(left, first * (1 - rate * decay) ** steps, rtol=1e-9, atol=1e-12)
    assert 70 < before < 110
    assert float(alignment(block)[".weight"]) < before - 20


def test_random_matrices_are_at_right_angles_and_exact_feedback_has_none() -> None:
    torch.manual_seed(0)
    angle = alignment(Linear(200, 100, feedback="learned"))[".weight"]
    assert abs(float(angle) - 90) < 3
    assert alignment(Linear(5, 5)) == {}


def test_gains_set_the_size_of_the_output() -> None:
    torch.manual_seed(0)
    h = torch.randn(256, 400)
    assert float(Linear(400, 300, gain=2.0)(h).std().detach()) == pytest.approx(2.0, rel=0.05)
    relu = Stack(Pointwise("relu"), Linear(400, 300, gain=math.sqrt(2)))
    assert float(relu(h).square().mean().detach()) == pytest.approx(1.0, rel=0.05)


def test_a_block_under_norm_control_pickles_and_keeps_its_function() -> None:
    torch.manual_seed(0)
    block = Branch(Stack(Pointwise("tanh"), Linear(6, 6)), 0.5)
    control_norm(block.inner.parts[1], 0.4)  # type: ignore[union-attr, index]
    block.eval()
    h = torch.randn(3, 6)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(h), block(h))
        assert set(other.tensors()) == set(block.tensors())


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="heads that divide 6"):
        SelfAttention(6, 4)
    with pytest.raises(ConfigError, match="did you mean 'tanh'"):
        Pointwise("tan")
    with pytest.raises(ConfigError, match="features >= 2"):
        Norm(1)
    with pytest.raises(ConfigError, match="'exact' or 'learned'"):
        Linear(3, 3, feedback="random")
