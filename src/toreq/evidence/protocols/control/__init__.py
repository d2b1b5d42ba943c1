"""Reinforcement learning with equilibrium policies: tasks with pushes and delays, and their backprop twins.

Needs the extra ``rl`` (Gymnasium with MuJoCo, Stable-Baselines3), which is imported when a protocol runs.
"""

from toreq.evidence.protocols.control.protocol import REACHED, SPACE, SPENT, objective, run, side, with_steps
from toreq.evidence.protocols.control.tasks import TASKS, Push, Sizes, Task, find
from toreq.evidence.protocols.control.trunks import SIDES, Forward, Settled, Settling, Trunk, settled, trunk

__all__ = [
    "REACHED",
    "SIDES",
    "SPACE",
    "SPENT",
    "TASKS",
    "Forward",
    "Push",
    "Settled",
    "Settling",
    "Sizes",
    "Task",
    "Trunk",
    "find",
    "objective",
    "run",
    "settled",
    "side",
    "trunk",
    "with_steps",
]
