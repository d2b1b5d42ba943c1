"""A policy that settles: Stable-Baselines3's PPO with equilibrium actor and critic learns to remember a cue.

pip install "toreq[rl]"
python examples/control.py [--steps 8192] [--side eqprop]

A cue at the start of a corridor says which way to turn at its end, and only the turn is paid. PPO is the library's own:
its `loss.backward()` reaches the two equilibrium networks, whose estimator nudges them. `--side bp-ff` is the
feed-forward policy of the same widths and number of parameters.
"""

from __future__ import annotations

import argparse

import numpy as np
from gymnasium.wrappers import FlattenObservation, FrameStackObservation
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from toreq.evidence.protocols.control import settled, trunk
from toreq.evidence.protocols.control.envs import CueCorridor
from toreq.evidence.protocols.control.policies import TrunkPolicy


def corridor() -> FlattenObservation:
    """Two steps to the junction; the last three observations stacked, so that the first one can be seen there."""
    return FlattenObservation(FrameStackObservation(CueCorridor(length=2), 3))


def main(steps: int = 8192, side: str = "eqprop", seed: int = 0) -> tuple[float, float]:
    """Train; return the mean return before and after, in [0, 1]; without the cue it is 0.5 at most."""
    model = PPO(
        TrunkPolicy,
        make_vec_env(corridor, 8, seed=seed),
        learning_rate=3e-3,
        n_steps=32,
        batch_size=128,
        seed=seed,
        device="cpu",
        policy_kwargs={"trunk": trunk(side, (16, 16))},
    )
    unseen = make_vec_env(corridor, 10, seed=1000 + seed)
    before, _ = evaluate_policy(model, unseen, 100)
    model.learn(steps)
    after, _ = evaluate_policy(model, unseen, 100)
    counts = settled(model.policy)
    if counts is not None:
        print(f"settled: {counts['free settled']:.2f}% of the free and {counts['nudged settled']:.2f}% of the nudged")
    print(f"return {float(np.mean(before)):.2f} before, {float(np.mean(after)):.2f} after {steps} steps")
    return float(np.mean(before)), float(np.mean(after))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8192)
    parser.add_argument("--side", default="eqprop")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
