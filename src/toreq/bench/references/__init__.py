"""What toreq is compared with: published ways of training the same networks, written from the papers' equations."""

from toreq.bench.references.autograd import AutogradEP
from toreq.bench.references.base import ModuleTrainer, Trainer
from toreq.bench.references.deq import DEQTrainer
from toreq.bench.references.layered import LayeredNet, conv, mlp
from toreq.bench.references.red_black import RedBlackEP

__all__ = ["AutogradEP", "DEQTrainer", "LayeredNet", "ModuleTrainer", "RedBlackEP", "Trainer", "conv", "mlp"]
