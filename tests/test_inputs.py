"""Standardised inputs: in the network, not in the data, and saved with the weights."""

from __future__ import annotations

import pytest
import torch

from toreq import systems, training
from toreq.core import Standardize
from toreq.errors import ConfigError


def images(count: int = 40) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return (
        torch.rand(count, 3, 8, 8, generator=g, dtype=torch.float64) * torch.tensor([1.0, 0.2, 5.0])[:, None, None]
        + torch.tensor([0.0, 3.0, -2.0])[:, None, None].double()
    )


def test_each_channel_has_mean_0_and_deviation_1() -> None:
    x = images()
    z = Standardize.of(x).double()(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3).double(), atol=1e-5, rtol=0)


def test_other_shapes_are_standardised_as_a_whole() -> None:
    x = images().flatten(1)
    how = Standardize.of(x)
    assert how.mean.numel() == 1
    assert float(how.double()(x).std()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("system", ["toreqprop", "mstep"])
def test_the_network_sees_standardised_inputs_in_both_phases(system: str) -> None:
    x = images(6)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    torch.manual_seed(0)
    plain = systems.create(
        system, input_shape=(3, 8, 8), num_classes=3, arch="conv", channels=[4, 4], kernel=3
    ).double()
    torch.manual_seed(0)
    inside = systems.create(
        system, input_shape=(3, 8, 8), num_classes=3, arch="conv", channels=[4, 4], kernel=3
    ).double()
    how = Standardize.of(x)
    inside.standardize(how)
    outputs = []
    for net, seen in ((plain, how.double()(x)), (inside, x)):
        logits = net(seen)
        net.criterion(logits, y).backward()
        outputs.append(logits.detach())
    torch.testing.assert_close(outputs[0], outputs[1])
    grads = [{k: p.grad for k, p in net.named_parameters() if p.grad is not None} for net in (plain, inside)]
    assert grads[0].keys() == grads[1].keys()
    for k, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][k])


def test_a_run_keeps_its_numbers_and_the_twin_has_them_too(tmp_path) -> None:
    for side in ("eqprop", "bp-ff"):
        config = training.config_for(
            "toreqprop", {"hidden": [16]}, data="mnist", side=side, normalize=True, epochs=1, limit_train=64,
            limit_test=20, batch_size=32, out=str(tmp_path / side),
        )  # fmt: skip
        training.train(config)
        run = training.load_run(tmp_path / side)
        how = run.net.equilibrium.dynamics.prepare
        assert isinstance(how, Standardize)
        data = training.prepare(config, "cpu")
        torch.testing.assert_close(how.mean, data.train_x.mean().reshape(1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(how.deviation, data.train_x.std().reshape(1), atol=1e-5, rtol=1e-4)
        # the data stay as they are, so that corruptions and attacks keep their scale
        assert float(data.train_x.min()) == 0.0
        assert float(data.train_x.max()) == 1.0
        if side == "bp-ff":
            bare = run.model[1](data.test_x)
            assert not torch.allclose(bare, run.model(data.test_x))


@pytest.mark.parametrize(
    ("mean", "deviation"), [([0.0], [0.0]), ([0.0, 1.0], [1.0]), ([float("nan")], [1.0]), ([], []), ([0.0], [-1.0])]
)
def test_numbers_that_do_not_fit_are_refused(mean, deviation) -> None:
    with pytest.raises(ConfigError, match="Standardize: expected as many finite means"):
        Standardize(mean, deviation)


def test_symbols_and_other_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match="symbols have no mean"):
        Standardize.of(torch.arange(10))
    how = Standardize([0.0, 0.0], [1.0, 1.0])
    with pytest.raises(ConfigError, match="expected 2 channels"):
        how(torch.rand(4, 3, 8, 8))
    with pytest.raises(ConfigError, match="expected a floating-point tensor"):
        how(torch.arange(4))
