"""Policies of Stable-Baselines3 whose actor and critic are any trunks, equilibrium networks among them.

The algorithms stay as they are: their ``loss.backward()`` reaches an equilibrium trunk's own estimator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from toreq.evidence.protocols.control.extra import require
from toreq.evidence.protocols.control.trunks import Trunk

require()

from gymnasium import spaces  # noqa: E402
from stable_baselines3.common.policies import ActorCriticPolicy, ContinuousCritic  # noqa: E402
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor  # noqa: E402
from stable_baselines3.sac.policies import Actor, SACPolicy  # noqa: E402


class Trunks(nn.Module):
    """An actor's and a critic's trunk, as ``ActorCriticPolicy`` expects them.

    Args:
        inputs: observation features.
        trunk: makes either of them.
    """

    def __init__(self, inputs: int, trunk: Trunk) -> None:
        super().__init__()
        self.actor, self.critic = trunk(inputs), trunk(inputs)
        self.latent_dim_pi, self.latent_dim_vf = width(self.actor, inputs), width(self.critic, inputs)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the actor and of the critic."""
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        """Features ``(B, F)`` from which the action's distribution is read."""
        return self.actor(features)

    def forward_critic(self, features: Tensor) -> Tensor:
        """Features ``(B, F)`` from which the value is read."""
        return self.critic(features)


def width(trunk: nn.Module, inputs: int) -> int:
    """How many features a trunk gives."""
    like = next(trunk.parameters())
    training = trunk.training
    trunk.eval()
    with torch.no_grad():
        found = trunk(like.new_zeros(1, inputs)).shape[1]
    trunk.train(training)
    return found


class TrunkPolicy(ActorCriticPolicy):
    """The policy of PPO and A2C with two trunks of one kind.

    Linear layers of the trunks start orthogonal, as in Stable-Baselines3's own policy; couplings start as their system
    draws them.

    Args:
        trunk: makes the actor's and the critic's trunk; pass it in ``policy_kwargs``.
        args, kwargs: of ``ActorCriticPolicy``; ``net_arch`` and ``activation_fn`` are not used.
    """

    def __init__(self, *args: Any, trunk: Trunk, **kwargs: Any) -> None:
        self.trunk = trunk
        super().__init__(*args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = Trunks(self.features_dim, self.trunk)  # type: ignore[assignment]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "trunk": self.trunk}


class _TrunkCritic(ContinuousCritic):
    def __init__(self, trunk: Trunk, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        inputs = kwargs["features_dim"] + spaces.flatdim(self.action_space)
        self.q_networks = []
        for index in range(self.n_critics):
            made = trunk(inputs)
            net = nn.Sequential(made, nn.Linear(width(made, inputs), 1))
            setattr(self, f"qf{index}", net)
            self.q_networks.append(net)


class TrunkSACPolicy(SACPolicy):
    """The policy of SAC with trunks of one kind for the actor and each critic.

    Args:
        trunk: makes every trunk; pass it in ``policy_kwargs``.
        args, kwargs: of ``SACPolicy``; ``net_arch`` and ``activation_fn`` are not used.
    """

    def __init__(self, *args: Any, trunk: Trunk, **kwargs: Any) -> None:
        self.trunk = trunk
        super().__init__(*args, **kwargs)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        """An actor whose latent network is a trunk."""
        actor = Actor(**self._update_features_extractor(self.actor_kwargs, features_extractor))
        made = self.trunk(actor.features_dim)
        features, actions = width(made, actor.features_dim), spaces.flatdim(self.action_space)
        actor.latent_pi = made  # type: ignore[assignment]
        actor.mu, actor.log_std = nn.Linear(features, actions), nn.Linear(features, actions)  # type: ignore[assignment]
        return actor.to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        """Critics whose networks are trunks with a linear read-out."""
        chosen = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return _TrunkCritic(self.trunk, **chosen).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "trunk": self.trunk}
