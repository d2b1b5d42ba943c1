"""Equilibrium policies in Stable-Baselines3: their gradients against references, inside its own training too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from toreq import estimators, solvers
from toreq.core import Dense, Drive, Energy, Lateral, Node, activation
from toreq.errors import ConfigError
from toreq.estimators import Centered, Estimator, Implicit
from toreq.evidence.protocols.control.trunks import SIDES, Forward, Settled, Settling, settled, trunk
from toreq.layer import Equilibrium, equilibria

sb3 = pytest.importorskip("stable_baselines3")
gym = pytest.importorskip("gymnasium")

from gymnasium import spaces  # noqa: E402

from toreq.evidence.protocols.control.envs import CueCorridor  # noqa: E402
from toreq.evidence.protocols.control.policies import TrunkPolicy, TrunkSACPolicy, width  # noqa: E402

INPUTS, ACTIONS, HIDDEN = 5, 2, (12, 8)


def policy(made: Callable[[int], nn.Module], discrete: bool = False) -> TrunkPolicy:
    torch.manual_seed(0)
    actions = spaces.Discrete(3) if discrete else spaces.Box(-1.0, 1.0, (ACTIONS,))
    return TrunkPolicy(spaces.Box(-np.inf, np.inf, (INPUTS,)), actions, lambda _: 1e-3, trunk=made)


def ppo_loss(net: TrunkPolicy, dtype: torch.dtype, discrete: bool) -> Tensor:
    """The loss of PPO, some of whose examples are clipped and so have no cotangent at the actor."""
    generator = torch.Generator().manual_seed(1)
    x, actions = (torch.randn(24, n, generator=generator, dtype=torch.float64).to(dtype) for n in (INPUTS, ACTIONS))
    if discrete:
        actions = torch.randint(3, (24,), generator=generator)
    advantages, returns, shift = torch.randn(3, 24, generator=generator, dtype=torch.float64).to(dtype)
    # Stable-Baselines3 casts observations to float32
    net.extract_features = lambda obs, *_: obs  # type: ignore[method-assign]
    values, likelihood, entropy = net.evaluate_actions(x, actions)
    ratio = torch.exp(likelihood - (likelihood + 0.3 * shift).detach())
    surrogate = torch.min(advantages * ratio, advantages * ratio.clamp(0.8, 1.2))
    assert 0 < float((ratio - 1).abs().gt(0.2).double().mean()) < 1
    assert entropy is not None
    return -surrogate.mean() + 0.5 * (returns - values.flatten()).square().mean() - 0.01 * entropy.mean()


def gradients(net: TrunkPolicy, estimator: Estimator, dtype: torch.dtype, discrete: bool) -> dict[str, Tensor]:
    for layer in equilibria(net):
        layer.estimator = estimator
    net.zero_grad()
    ppo_loss(net, dtype, discrete).backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("discrete", [False, True])
def test_the_policy_loss_has_the_implicit_gradient(discrete: bool) -> None:
    exact = solvers.FixedPoint(order="gauss_seidel", tolerance=1e-12, max_steps=500)
    options = {"arch": "hopfield", "hidden": HIDDEN, "gain": 1.0}
    net = policy(Settled("toreqprop", options, None, exact), discrete).double()
    reference = gradients(net, Implicit(tolerance=1e-12, max_steps=500), torch.float64, discrete)
    assert set(reference) == {n for n, _ in net.named_parameters()}
    own = gradients(net, Centered(beta=1e-4, tolerance=1e-9, max_steps=500), torch.float64, discrete)
    for name, g in reference.items():
        assert float((own[name] - g).norm() / g.norm()) < 1e-5, name


def test_the_implicit_gradient_is_that_of_finite_differences() -> None:
    exact = solvers.FixedPoint(order="gauss_seidel", tolerance=1e-13, max_steps=1000)
    options = {"arch": "hopfield", "hidden": HIDDEN, "gain": 1.0}
    net = policy(Settled("toreqprop", options, "implicit", exact)).double().eval()
    reference = gradients(net, Implicit(tolerance=1e-12, max_steps=500), torch.float64, False)
    generator = torch.Generator().manual_seed(2)
    step = 1e-5
    for name, p in net.named_parameters():
        if "extractor" not in name:
            continue
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        # the old likelihood follows the weights here, and the loss's value is not that of a fixed one: compare the
        # value head's part alone
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * step * direction
                ends.append(float(_value_loss(net)))
                p -= sign * step * direction
        net.zero_grad()
        _value_loss(net).backward()
        assert p.grad is not None or "actor" in name
        own = 0.0 if p.grad is None else float((p.grad * direction).sum())
        assert own == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-8), name
        assert name in reference


def _value_loss(net: TrunkPolicy) -> Tensor:
    x = torch.randn(8, INPUTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return net.value_net(net.mlp_extractor.forward_critic(x)).square().mean()


@pytest.mark.parametrize("side", ["eqprop", "bp-eq"])
def test_the_shipped_settings_have_the_implicit_gradient_in_float32(side: str) -> None:
    net = policy(trunk(side, HIDDEN))
    own = gradients(net, equilibria(net)[0].estimator, torch.float32, False)
    for layer in equilibria(net):
        layer.solver = solvers.FixedPoint(order="gauss_seidel", tolerance=1e-12, max_steps=500)
    net.double()
    reference = gradients(net, Implicit(tolerance=1e-12, max_steps=500), torch.float64, False)
    for name, g in reference.items():
        assert float(nn.functional.cosine_similarity(own[name].double().flatten(), g.flatten(), dim=0)) > 0.999, name


def test_the_algorithm_trains_with_the_networks_own_estimator() -> None:
    def last(side: str) -> dict[str, Tensor]:
        model = sb3.PPO(
            TrunkPolicy,
            CueCorridor(3),
            n_steps=64,
            batch_size=64,
            n_epochs=1,
            seed=3,
            policy_kwargs={"trunk": trunk(side, HIDDEN)},
        )
        before = {n: p.detach().clone() for n, p in model.policy.named_parameters()}
        model.learn(64)
        moved = [n for n, p in model.policy.named_parameters() if not torch.equal(p, before[n])]
        assert len(moved) == len(before)
        return {n: p.grad.flatten() for n, p in model.policy.named_parameters() if p.grad is not None}

    own, reference = last("eqprop"), last("bp-eq")
    assert own.keys() == reference.keys()
    for name, g in reference.items():
        assert float(nn.functional.cosine_similarity(own[name], g, dim=0)) > 0.999, name
    assert any(not torch.equal(own[name], g) for name, g in reference.items())  # it is another estimator


@pytest.mark.parametrize("hidden", [(16, 16), (64, 32), (7, 5, 3)])
def test_sides_have_the_same_number_of_parameters(hidden: tuple[int, ...]) -> None:
    counts = {side: sum(p.numel() for p in trunk(side, hidden)(INPUTS).parameters()) for side in SIDES}
    assert len(set(counts.values())) == 1


def test_sides_start_from_the_same_first_layer_as_the_librarys_policy() -> None:
    for side in SIDES:
        first = next(m for m in policy(trunk(side, HIDDEN)).mlp_extractor.modules() if isinstance(m, nn.Linear))
        gram = first.weight.T @ first.weight
        assert torch.allclose(gram, 2 * torch.eye(INPUTS), atol=1e-5)  # orthogonal, gain sqrt 2


def test_the_forward_trunk_is_the_librarys_own_network() -> None:
    torch.manual_seed(0)
    theirs = sb3.common.policies.ActorCriticPolicy(
        spaces.Box(-1.0, 1.0, (INPUTS,)), spaces.Box(-1.0, 1.0, (1,)), lambda _: 1e-3, net_arch=list(HIDDEN)
    )
    torch.manual_seed(0)
    ours = TrunkPolicy(
        spaces.Box(-1.0, 1.0, (INPUTS,)), spaces.Box(-1.0, 1.0, (1,)), lambda _: 1e-3, trunk=Forward(HIDDEN)
    )
    layers = [[m.weight.shape for m in p.mlp_extractor.modules() if isinstance(m, nn.Linear)] for p in (theirs, ours)]
    assert layers[0] == layers[1]
    own = [m for m in ours.mlp_extractor.modules() if isinstance(m, nn.Linear)]
    for a, b in zip([m for m in theirs.mlp_extractor.modules() if isinstance(m, nn.Linear)], own, strict=True):
        b.load_state_dict(a.state_dict())
    x = torch.randn(4, INPUTS)
    assert torch.equal(theirs.mlp_extractor.forward_critic(x), ours.mlp_extractor.forward_critic(x))


def test_a_trunk_reads_several_nodes_of_any_shape() -> None:
    nodes = [Node("a", (2, 3), activation("tanh")), Node("b", 4, activation("tanh"))]
    drives = [Drive(n.name, nn.Sequential(nn.Linear(INPUTS, 6 if n.name == "a" else 4))) for n in nodes]
    drives[0] = Drive("a", nn.Sequential(nn.Linear(INPUTS, 6), nn.Unflatten(1, (2, 3))))
    layer = Equilibrium(
        Energy(nodes, [*drives, Lateral(Dense(4, 4, symmetric=True, scale=0.1), "b")]), readout=["a", "b"]
    )
    made = Settling(layer)
    x = torch.randn(7, INPUTS)
    found = layer(x)
    assert torch.equal(made(x), torch.cat([found["a"].flatten(1), found["b"]], 1))
    assert width(made, INPUTS) == 10


@pytest.mark.parametrize("arch", ["mlp", "hopfield"])
def test_any_system_on_vectors_is_a_trunk(arch: str) -> None:
    net = policy(Settled("toreqprop", {"arch": arch}), True)
    assert net(torch.randn(2, INPUTS))[0].shape == (2,)


def test_relaxations_are_counted_once_each() -> None:
    made = trunk("eqprop", HIDDEN)(INPUTS)
    assert settled(made) is None or settled(made) == {}
    x = torch.randn(6, INPUTS)
    made(x).sum().backward()
    with torch.no_grad():
        made(x[:2])
    made(x[:1])
    assert isinstance(made, Settling)
    assert made.tally[:, 0].tolist() == [9, 6]
    assert made.tally[:, 1].tolist() == [9, 6]
    found = settled(nn.ModuleList([made, Forward(HIDDEN)(INPUTS)]))
    assert found is not None
    assert found["free settled"] == found["nudged settled"] == 100.0
    assert settled(Forward(HIDDEN)(INPUTS)) is None
    # what does not settle is counted as such
    tight = trunk("eqprop", HIDDEN)(INPUTS)
    assert isinstance(tight, Settling)
    tight.equilibrium.solver = solvers.FixedPoint(tolerance=1e-7, max_steps=2)
    tight(x)
    assert tight.tally[0].tolist() == [6, 0, 12]


def test_an_agent_is_saved_and_loaded_by_the_library(tmp_path: Path) -> None:
    model = sb3.PPO(
        TrunkPolicy, CueCorridor(3), n_steps=32, batch_size=32, seed=0, policy_kwargs={"trunk": trunk("eqprop", HIDDEN)}
    )
    model.learn(32)
    model.save(tmp_path / "agent.zip")
    again = sb3.PPO.load(tmp_path / "agent.zip")
    x = torch.randn(5, 3)
    model.policy.set_training_mode(False)
    again.policy.set_training_mode(False)
    assert torch.equal(
        model.policy.get_distribution(x).distribution.logits, again.policy.get_distribution(x).distribution.logits
    )
    model.policy.save(tmp_path / "policy.zip")
    alone = TrunkPolicy.load(str(tmp_path / "policy.zip"))
    alone.set_training_mode(False)
    assert torch.equal(model.policy.predict_values(x), alone.predict_values(x))


def test_sac_trains_every_trunk() -> None:
    model = sb3.SAC(
        TrunkSACPolicy,
        gym.make("Pendulum-v1"),
        learning_starts=8,
        batch_size=16,
        seed=0,
        policy_kwargs={"trunk": trunk("eqprop", HIDDEN)},
    )
    assert len(equilibria(model.policy)) == 5  # an actor, two critics and their targets
    before = {n: p.detach().clone() for n, p in model.policy.named_parameters()}
    model.learn(16)
    still = [n for n, p in model.policy.named_parameters() if torch.equal(p, before[n])]
    assert still == []
    target = model.policy.critic_target
    assert not any(p.requires_grad and p.grad is not None for p in target.parameters())


def test_sac_has_the_implicit_gradient_through_the_critic() -> None:
    torch.manual_seed(0)
    box = spaces.Box(-1.0, 1.0, (INPUTS,))
    net = TrunkSACPolicy(box, spaces.Box(-1.0, 1.0, (ACTIONS,)), lambda _: 1e-3, trunk=trunk("eqprop", HIDDEN))
    x = torch.randn(16, INPUTS)

    def actor_gradients(estimator: Estimator) -> list[Tensor]:
        for layer in equilibria(net):
            layer.estimator = estimator
        net.zero_grad()
        torch.manual_seed(1)
        actions, likelihood = net.actor.action_log_prob(x)
        (0.1 * likelihood - torch.cat(net.critic(x, actions), 1).min(1).values).mean().backward()
        return [p.grad.flatten() for p in net.actor.parameters() if p.grad is not None]

    own, reference = actor_gradients(Centered()), actor_gradients(Implicit())
    assert len(own) == len(list(net.actor.parameters()))
    for a, b in zip(own, reference, strict=True):
        assert float(nn.functional.cosine_similarity(a, b, dim=0)) > 0.999


def test_an_unknown_side_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'bp-ff'"):
        trunk("bp-f", HIDDEN)
    assert "implicit" in estimators.names()
