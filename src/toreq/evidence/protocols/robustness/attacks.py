"""Attacks on a classifier, by foolbox: which examples survive each of them at every size of the perturbation."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from toreq.data import seeded
from toreq.diagnostics.relaxation import predictions
from toreq.errors import ConfigError
from toreq.estimators import Estimator, Implicit
from toreq.layer import equilibria

Norm = Literal["linf", "l2"]
Kind = Literal["fgsm", "pgd", "margin", "hopskipjump"]


@dataclass(frozen=True)
class Attack:
    """An attack with its settings.

    Attributes:
        kind: ``fgsm`` (one step), ``pgd`` (projected gradient ascent on the cross entropy; Madry et al. 2018),
            ``margin`` (the same on the best wrong logit less the right one, whose gradient does not vanish where the
            network is sure; Carlini and Wagner 2017), or ``hopskipjump`` (labels alone; Chen et al. 2020).
        norm: of the perturbation, in pixels of [0, 1].
        eps: sizes of the perturbation, above 0 and growing.
        steps: gradient steps, or rounds of HopSkipJump.
        restarts: random starts of a gradient attack; an example survives only if it survives all.
        queries: labels asked for in the first round of HopSkipJump, to estimate a direction.
    """

    kind: Kind
    norm: Norm
    eps: tuple[float, ...]
    steps: int = 40
    restarts: int = 1
    queries: int = 100

    def __post_init__(self) -> None:
        if not self.eps or self.eps[0] <= 0 or list(self.eps) != sorted(set(self.eps)):
            raise ConfigError(f"Attack: expected growing eps above 0, got {self.eps}; sort them, and leave 0 out")
        if min(self.steps, self.restarts, self.queries) < 1:
            raise ConfigError(f"Attack: expected steps, restarts and queries >= 1, got {self}; use 1 or more")

    @property
    def name(self) -> str:
        """What tables call it, as in ``pgd-40 linf``."""
        return f"{self.kind}-{self.steps} {self.norm}" if self.kind != "fgsm" else f"fgsm {self.norm}"


def foolbox() -> Any:
    """The library of attacks.

    Raises:
        ConfigError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module("foolbox")
    except ImportError as error:
        raise ConfigError(
            'robustness: expected foolbox for attacks, got none installed; pip install "toreq[attacks]"'
        ) from error


def attackable(net: nn.Module, estimator: Estimator | None = None) -> nn.Module:
    r"""A copy to attack: in evaluation mode, its parameters fixed, its input gradient by ``estimator``.

    The input reaches an equilibrium network through its drives :math:`d(x)`, which are inputs of the layer's backward
    like any weight: every estimator returns :math:`\partial C/\partial d`, and autograd takes it on to x.

    Args:
        net: maps ``(B, ...)`` to logits.
        estimator: for all equilibrium layers; ``Implicit(tolerance=1e-4)``, the reference, when None.
    """
    copied = copy.deepcopy(net).eval().requires_grad_(False)
    for layer in equilibria(copied):
        layer.estimator = Implicit(tolerance=1e-4) if estimator is None else estimator
        # what does not settle is counted by the protocol instead
        layer.warn = False
    return copied


def survivors(
    net: nn.Module, attack: Attack, x: Tensor, y: Tensor, seed: int = 0, among: Tensor | None = None
) -> Tensor:
    """Which examples are still classified rightly after the attack, bool ``(len(attack.eps), N)``.

    Every eps is attacked for itself, so that a curve which falls with eps is a finding and not a construction. An
    example that is wrong without an attack has not survived.

    Args:
        net: what :func:`attackable` returned.
        attack: the attack.
        x: ``(N, ...)`` in [0, 1].
        y: labels ``(N,)``.
        seed: of random starts and directions.
        among: survivors of another gradient attack of the same eps: the others are given up and not attacked again.
    """
    if attack.kind == "hopskipjump":
        smallest = boundary_distance(net, attack, x, y, seed)
        return torch.stack([smallest > eps for eps in attack.eps])
    alive = _right(net, x, y).repeat(len(attack.eps), 1) if among is None else among.clone()
    for row, eps in enumerate(attack.eps):
        for start in range(attack.restarts):
            left = alive[row].nonzero().flatten()
            if len(left) == 0:
                break
            found = perturbed(net, attack, x[left], y[left], eps, seed=seed + 1000 * start)
            alive[row, left] = _right(net, found, y[left])
    return alive


def perturbed(net: nn.Module, attack: Attack, x: Tensor, y: Tensor, eps: float, seed: int = 0) -> Tensor:
    """The inputs that a gradient attack makes of x at one eps, from one random start; same shape, in [0, 1]."""
    fb = foolbox()
    model = fb.PyTorchModel(net, bounds=(0, 1), device=x.device)
    with _library_seed(seed):
        return _gradient_attack(fb, attack).run(model, x, fb.criteria.Misclassification(y), epsilon=eps)


def transferred(net: nn.Module, surrogate: nn.Module, attack: Attack, x: Tensor, y: Tensor, seed: int = 0) -> Tensor:
    """Which examples survive inputs that were made to fool ``surrogate``, bool ``(len(attack.eps), N)``."""
    right = _right(net, x, y)
    rows = [_right(net, perturbed(surrogate, attack, x, y, eps, seed), y) for eps in attack.eps]
    return torch.stack(rows) & right


@torch.no_grad()
def boundary_distance(net: nn.Module, attack: Attack, x: Tensor, y: Tensor, seed: int = 0) -> Tensor:
    """The size of the smallest adversarial perturbation that HopSkipJump finds from labels alone, ``(N,)``.

    It starts at the nearest of the other images that is classified otherwise. 0 where x is wrong already, infinite
    where no image is classified otherwise.
    """
    fb = foolbox()
    labels = Decisions(net)
    said = predictions(labels, x)
    distance = torch.where(said == y, torch.inf, 0.0)
    far = torch.cdist(x.flatten(1), x.flatten(1), p=torch.inf if attack.norm == "linf" else 2.0)
    # a start must not have the attacked image's own label
    far = far.masked_fill(said[None, :] == y[:, None], torch.inf)
    todo = ((said == y) & torch.isfinite(far.amin(1))).nonzero().flatten()
    if len(todo) == 0:
        return distance
    method = fb.attacks.HopSkipJumpAttack(
        steps=attack.steps, initial_gradient_eval_steps=attack.queries, constraint=attack.norm
    )
    model = fb.PyTorchModel(labels, bounds=(0, 1), device=x.device)
    with _library_seed(seed):
        found = method.run(
            model, x[todo], fb.criteria.Misclassification(y[todo]), starting_points=x[far[todo].argmin(1)]
        )
    size = (found - x[todo]).flatten(1)
    distance[todo] = size.abs().amax(1) if attack.norm == "linf" else size.norm(dim=1)
    return distance


class Decisions(nn.Module):
    """A classifier that tells labels only (as one-hot logits), and the same label whenever an image comes again.

    The second part matters at the decision boundary, where decision-based attacks work: a relaxation that stops at a
    tolerance may there answer differently in another batch, and an attack that returns to a point it knows to be
    adversarial would search forever.

    Args:
        net: the classifier.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.known: dict[bytes, int] = {}
        self.queries = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """One-hot logits ``(B, classes)``."""
        logits = self.net(x)
        said = logits.argmax(1).tolist()
        self.queries += len(x)
        keys = [row.tobytes() for row in x.detach().cpu().numpy()]
        kept = [self.known.setdefault(key, label) for key, label in zip(keys, said, strict=True)]
        return nn.functional.one_hot(torch.tensor(kept, device=x.device), logits.shape[1]).to(logits.dtype)


def vanishing(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the examples whose cross entropy has an input gradient of exactly 0: there an ascent stands still."""
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        nn.functional.cross_entropy(net(leaf), y, reduction="sum").backward()
    assert leaf.grad is not None
    return float((leaf.grad.flatten(1).abs().amax(1) == 0).double().mean())


def stronger(attack: Attack, steps: int) -> Attack:
    """The same attack with another number of steps."""
    return replace(attack, steps=steps)


@torch.no_grad()
def _right(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return predictions(net, x) == y


@contextlib.contextmanager
def _library_seed(seed: int) -> Iterator[None]:
    """foolbox draws from torch's global generator: seeded inside, and put back after."""
    with torch.random.fork_rng():
        torch.manual_seed(seeded(seed, 77).initial_seed())
        yield


def _gradient_attack(fb: Any, attack: Attack) -> Any:
    names: dict[Norm, Sequence[str]] = {
        "linf": ("LinfFastGradientAttack", "LinfProjectedGradientDescentAttack"),
        "l2": ("L2FastGradientAttack", "L2ProjectedGradientDescentAttack"),
    }
    single, several = (getattr(fb.attacks, name) for name in names[attack.norm])
    if attack.kind == "fgsm":
        return single(random_start=False)
    kind = _by_margin(several) if attack.kind == "margin" else several
    # 2.5 eps in all (Madry et al. 2018): enough to cross the ball from any start, whatever the number of steps
    return kind(rel_stepsize=min(1.0, 2.5 / attack.steps), steps=attack.steps, random_start=True)


def _by_margin(kind: Any) -> Any:
    eagerpy: Any = importlib.import_module("eagerpy")

    class ByMargin(kind):
        def get_loss_fn(self, model: Any, labels: Any) -> Any:
            def loss(inputs: Any) -> Any:
                logits = model(inputs).raw
                right = logits.gather(1, labels.raw[:, None]).squeeze(1)
                own = nn.functional.one_hot(labels.raw, logits.shape[1]).bool()
                return eagerpy.astensor((logits.masked_fill(own, -torch.inf).amax(1) - right).sum())

            return loss

    return ByMargin
