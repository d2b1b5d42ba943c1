"""M2 and M3: accuracy on MNIST within 20 minutes, and on CIFAR-10 against backprop in equal time."""

from __future__ import annotations

import json
import time
from itertools import islice
from typing import Any

import torch

from toreq import training
from toreq.data import Batches
from toreq.evidence import counting
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.layer import equilibria
from toreq.training import RunFolder, TrainConfig
from toreq.training.build import build, make_optimizer, trained_module
from toreq.training.data import prepare
from toreq.training.process import process_settings
from toreq.tuning.systems import trained

SEED_FILE = "003_fb4cff0aa26f658d.txt"
TRAINERS = {
    "ms-tep": "the pyramid trained by Equilibrium Propagation",
    "bp-eq": "the implicit gradient of the same pyramid, its adjoint settled as loosely as a nudged phase (0.05)",
    "bp-ff": "backprop of the feed-forward twin: the same layers on the same levels",
    "one level": "Equilibrium Propagation without the coarser levels (the ablation)",
}
MNIST: dict[str, Any] = {"channels": [32, 64, 128], "levels": 2, "nonlinearity": "relu"}
MNIST_EPOCHS, MNIST_SHIFT, MNIST_BATCH = 12, 2, 64
CIFAR: dict[str, Any] = {"channels": [64, 128, 256], "kernel": 3, "levels": 3, "nonlinearity": "relu"}
CIFAR_SECONDS, CIFAR_SHIFT, CIFAR_BATCH = 3600.0, 2, 64
RATE = 1e-3
MINUTES = 20.0
"""Of training on two cores, counted as twice as many minutes of processor time."""
SMALL = {"channels": [4, 6], "levels": 2}
COUNTED, WARMED = 30, 5
"""Steps that are timed, and steps before them."""


def mnist(trial: Trial) -> Outcome:
    """Train one side on MNIST; an interrupted run goes on at its last checkpoint."""
    config = _config(trial, "mnist", MNIST, MNIST_EPOCHS, MNIST_SHIFT, MNIST_BATCH)
    return _trained(trial, config, _seconds_per_step(trial, config))


def cifar(trial: Trial) -> Outcome:
    """Train one side on CIFAR-10 for as many epochs as an hour holds; an interrupted run goes on."""
    # a smoke run shows that the protocol runs, with data that are always there
    data = trial.budget.pick("mnist", "cifar10", "cifar10")
    config = _config(trial, data, CIFAR, 1, CIFAR_SHIFT, CIFAR_BATCH, flip=True, normalize=True)
    step = _seconds_per_step(trial, config)
    if trial.budget.name != "smoke":
        hour = trial.budget.pick(0.0, CIFAR_SECONDS / 60, CIFAR_SECONDS)
        epoch = step * -(-(config.limit_train or 50_000) // config.batch_size)
        config = TrainConfig.from_json({**config.to_json(), "epochs": max(1, round(hour / epoch))})
    return _trained(trial, config, step)


def _config(
    trial: Trial, data: str, options: dict[str, Any], epochs: int, shift: int, batch: int, **more: Any
) -> TrainConfig:
    options = {"arch": "conv", **options}
    sizes: dict[str, Any] = {"epochs": epochs}
    if trial.budget.name == "smoke":
        options |= SMALL
        sizes = {"limit_train": 32, "limit_test": 20, "epochs": 1}
        batch = 16
    elif trial.budget.name == "quick":
        sizes = {"limit_train": 4000, "limit_test": 2000, "epochs": 2}
    if trial.side == "one level":
        options["levels"] = 1
    side = trial.side if trial.side.startswith("bp") else "eqprop"
    if side != "bp-ff":
        options["settings"] = "fast"
    if side == "bp-eq":
        options["estimator.tolerance"] = 0.05
    return training.config_for(
        "mstep",
        options,
        data=data,
        seed=trial.seed,
        side=side,
        device=trial.device,
        out=str(trial.scratch / "run"),
        learning_rate=RATE,
        batch_size=batch,
        shift=shift,
        warmup=0.02,
        threads=1,
        **sizes,
        **more,
    )


def _seconds_per_step(trial: Trial, config: TrainConfig) -> float:
    """Processor seconds of a training step on one thread, measured once and kept for when the trial goes on."""
    kept = trial.scratch / "seconds.json"
    if kept.exists():
        return float(json.loads(kept.read_text())["seconds per step"])
    trial.scratch.mkdir(parents=True, exist_ok=True)
    count = (1, 1) if trial.budget.name == "smoke" else (WARMED, COUNTED)
    with process_settings(config):
        source = prepare(config, "cpu")
        torch.manual_seed(config.seed)
        net = build(config, source.input_shape, source.num_classes, source.train_x)
        model = trained_module(net, config).to(config.device if config.device != "auto" else "cpu")
        for layer in equilibria(model):
            layer.warn = False
        optimizer = make_optimizer(model, config)
        device = next(model.parameters()).device
        batches = Batches(source.train_x, source.train_y, config.batch_size, seed=config.seed, device=device)
        model.train()
        started = time.process_time()
        for i, (x, y) in enumerate(islice(batches.epoch(0), sum(count))):
            if i == count[0]:
                started = time.process_time()
            net.criterion(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = (time.process_time() - started) / count[1]
    kept.write_text(json.dumps({"seconds per step": seconds}))
    return seconds


def _trained(trial: Trial, config: TrainConfig, step: float) -> Outcome:
    summary, earlier = trained(config)
    samples = summary["train_examples"] * summary["epochs"]
    steps = summary["epochs"] * -(-summary["train_examples"] // config.batch_size)
    off, radius = summary["couplings_off_accuracy"], summary["radius"]
    metrics = {
        "accuracy": Quantity(100 * summary["test_accuracy"], "%"),
        "accuracy, couplings off": Quantity(None if off is None else 100 * off, "%"),
        "radius": Quantity(radius, ""),
        "minutes on two cores": Quantity(step * steps / 120, "min"),
        "processor hours": Quantity(step * steps / 3600, "h"),
        "epochs": Quantity(float(summary["epochs"]), ""),
    }
    lines = [line for line in RunFolder(trial.scratch / "run").metrics() if line["kind"] == "epoch"]
    curve = [(float(line["epoch"]), 100 * line["test_accuracy"]) for line in lines]
    cost = Cost(summary["parameters"], _flops(config) * samples, samples)
    return Outcome(metrics, {"accuracy": curve}, cost, ("continued from a checkpoint",) if earlier else ())


def _flops(config: TrainConfig) -> float:
    """Operations of a training step of the trained network, per example."""
    found = training.load_run(str(config.out))
    model, count = found.model.cpu(), 8
    source = prepare(config, "cpu")
    x, y = source.train_x[:count], source.train_y[:count]

    def step() -> None:
        with torch.enable_grad():
            found.net.criterion(model(x), y).backward()

    return counting.flops(step) / count


def _words(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


M2 = Claim(
    id="M2",
    system="mstep",
    seed_file=SEED_FILE,
    sentence="MNIST accuracy above 99.",
    criteria=(
        Criterion(
            "accuracy", "accuracy", "%", "at_least", "ms-tep", target=99.0, words="> 99", aim=99.5,
            beside=("bp-eq", "bp-ff", "one level"), seeds=1,
        ),
        Criterion(
            "minutes of training on two cores", "minutes on two cores", "min", "at_most", "ms-tep", aim=MINUTES,
            beside=("bp-eq", "bp-ff", "one level"), seeds=1,
        ),
    ),
    protocol=f"""
    MNIST test accuracy of a convolutional pyramid ({_words(MNIST)}) after {MNIST_EPOCHS} epochs of Adam at
    {RATE:g} with a cosine to zero, batches of {MNIST_BATCH}, images moved by up to {MNIST_SHIFT} pixels; a quick run
    trains on 4,000 images for two epochs. The same settings for all sides, untuned. Sides that settle do so with the
    fast settings. One seed, since the network is dear: judged on its value. Twenty minutes on two cores are counted as
    forty minutes of processor time on one thread: {COUNTED} steps are timed before training, and multiplied by the
    number of steps. The accuracy with the couplings set to zero after training and the radius of the trained relaxation
    are printed.
    """,
    sides=TRAINERS,
    run=mnist,
    picture=Picture("MNIST test accuracy", x_label="epoch", y_label="test accuracy (%)", curves=("accuracy",)),
    printed=("accuracy, couplings off", "radius"),
)  # fmt: skip

M3 = Claim(
    id="M3",
    system="mstep",
    seed_file=SEED_FILE,
    sentence="CIFAR-10 (images JPEG-recompressed) at a matched budget of time: competitive with backprop.",
    criteria=(
        Criterion(
            "accuracy", "accuracy", "%", "at_least", "ms-tep", words="competitive with BP", aim=80.0,
            beside=("bp-eq",), seeds=1,
        ),
        Criterion(
            "above BP-eq by", "accuracy", "points", "at_least", "ms-tep", words="competitive with BP", aim=-0.5,
            versus=("bp-eq",), seeds=1,
        ),
    ),
    protocol=f"""
    Test accuracy on CIFAR-10, whose images are JPEG-recompressed here, of a convolutional pyramid ({_words(CIFAR)})
    after as many epochs as an hour of processor time on one thread holds (a quick run: a minute, 4,000 images), so
    that a side with cheaper steps trains for more epochs: {COUNTED} steps are timed before training. Adam at {RATE:g}
    with a cosine to zero, batches of {CIFAR_BATCH}, inputs standardised by channel, images moved by up to {CIFAR_SHIFT}
    pixels and half of them mirrored. The same settings for both sides, untuned; both settle with the fast settings. One
    seed, since the network is dear: judged on its value. The accuracy with the couplings set to zero after training and
    the radius of the trained relaxation are printed.
    """,
    sides={name: TRAINERS[name] for name in ("ms-tep", "bp-eq")},
    run=cifar,
    picture=Picture(
        "CIFAR-10 (JPEG-recompressed) test accuracy", x_label="epoch", y_label="test accuracy (%)",
        curves=("accuracy",),
    ),
    printed=("accuracy, couplings off", "radius"),
)  # fmt: skip
