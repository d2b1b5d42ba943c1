"""Training: configurations, the loop, checkpoints, run folders and evaluation."""

from toreq.training.build import build, trained_module
from toreq.training.config import TrainConfig
from toreq.training.data import Prepared, hold_out, prepare
from toreq.training.evaluation import Evaluation, evaluate, radius
from toreq.training.interrupt import Interrupted
from toreq.training.loop import resume, train
from toreq.training.recipes import config_for
from toreq.training.run import Run, RunError, RunFolder, load_run

__all__ = [
    "Evaluation",
    "Interrupted",
    "Prepared",
    "Run",
    "RunError",
    "RunFolder",
    "TrainConfig",
    "build",
    "config_for",
    "evaluate",
    "hold_out",
    "load_run",
    "prepare",
    "radius",
    "resume",
    "train",
    "trained_module",
]
