"""The claims of HTSEP: every one runs small and judges what it says, and the pieces that can be wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from toreq.core import Dense
from toreq.errors import ConfigError
from toreq.evidence import BUDGETS, Claim, Trial
from toreq.evidence.htsep import (
    CLAIMS,
    control,
    descent,
    energy,
    growth,
    hardware,
    modalities,
    navigation,
    nets,
    recall,
    retention,
    sampling,
    sequential,
    steps,
    streaming,
)
from toreq.evidence.protocols.continual import PermutedMNIST
from toreq.layer import equilibria
from toreq.memory import TorusMemory
from toreq.solvers import Spiking
from toreq.systems import Seen
from toreq.systems.htsep import HTSEP
from toreq.systems.htsep_growth import wanted

SMOKE = BUDGETS["smoke"]
EVERY = pytest.mark.parametrize("one", CLAIMS, ids=lambda c: c.id)


@EVERY
def test_a_claim_is_complete(one: Claim) -> None:
    assert one.system == "htsep"
    assert one.sentence.endswith(".")
    assert len(one.protocol.split()) > 60
    assert one.seeds >= 3
    assert len({c.name for c in one.criteria}) == len(one.criteria)


# the others are of the same form, and take longer
QUICKLY_TUNED = [c for c in CLAIMS if c.tuning is not None and c.id in ("H6", "H9", "H13")]


@pytest.mark.parametrize("one", QUICKLY_TUNED, ids=lambda c: c.id)
def test_an_objective_of_tuning_gives_a_number(one: Claim, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert one.tuning is not None
    side, start = next(iter(one.tuning.start.items()))
    trial = Trial(SMOKE, side, 1, "cpu", tmp_path_factory.mktemp("tuning"))
    assert math.isfinite(one.tuning.objective(trial, start))


def _trial(side: str, scratch: Path | None = None) -> Trial:
    return Trial(SMOKE, side, 0, "cpu", Path("unused") if scratch is None else scratch)


# -- H1


def test_gates_keep_what_was_learned_where_open_units_forget() -> None:
    """Three permutations one after the other: with gates the first task is as good at the end as it was."""
    stream = PermutedMNIST(3, 0, train=800, test=100, batch_size=16)
    changes = {}
    for side in (retention.OWN, retention.GATES_OFF):
        learner = retention.learner(
            replace(_trial(f"permuted: {side}"), tuned={"open_share": 0.2, "learning_rate": 3e-3}), stream
        )
        net = learner.module
        assert isinstance(net, HTSEP)
        learner._count = lambda x, y: None  # type: ignore[method-assign]
        x, y = stream.test(0)
        per, outputs, right = len(stream) // 3, [], []
        for i in range(len(stream)):
            batch = stream.batch(i)
            learner.observe(batch.x, batch.y)
            if i + 1 in (per, len(stream)):
                outputs.append(net.eval()(x).detach())
                right.append(float((outputs[-1].argmax(1) == y).double().mean()))
        changes[side] = (*right, float((outputs[1] - outputs[0]).norm()))
        if side == retention.OWN:
            assert net.context.contexts == 3
    assert changes[retention.OWN][0] > 0.3
    assert changes[retention.OWN][1] > changes[retention.OWN][0] - 0.1
    # units at the edges of two bumps, which both open, have moved what the gates keep
    assert changes[retention.OWN][2] < 0.5 * changes[retention.GATES_OFF][2]


# -- H2


def test_a_trunk_learns_contexts_from_updates_alone() -> None:
    made = control.Contexts(8, "hard")(4)
    x = torch.rand(6, 4)
    made.train()
    with torch.no_grad():
        made(x)
    assert isinstance(made, control.ContextTrunk)
    assert made.context.contexts == 0
    assert made(x).shape == (6, 8)
    assert made.context.contexts == 1


# -- H3


def test_one_pass_counts_the_products_of_the_second_convolution() -> None:
    net = nets.build("conv", 0, channels=(3, 4)).feedforward()
    work = energy._once(net, torch.rand(2, 1, 28, 28))
    assert work.multiply_adds.tolist() == [4 * 4 * 4 * 3 * 25] * 2
    assert work.adds.tolist() == [2 * (3 * 12 * 12 + 4 * 4 * 4)] * 2


# -- H4


@pytest.mark.parametrize("radius", [0.5, 1.2])
def test_networks_of_h4_have_the_radius_they_are_asked_for(radius: float) -> None:
    (op,) = [m for m in steps.network(16, 0, radius, bounded=False).modules() if isinstance(m, Dense)]
    assert op.norm(200) == pytest.approx(radius, rel=1e-3)
    (op,) = [m for m in steps.network(16, 0, radius, bounded=True).modules() if isinstance(m, Dense)]
    assert op.norm(200) == pytest.approx(min(radius, steps.BOUND), rel=2e-2)


# -- H5, H6


def test_a_torus_holds_a_stream_and_a_ring_holds_its_sum() -> None:
    g = torch.Generator().manual_seed(0)
    seen, heard = torch.rand(3, 5, 2, generator=g), torch.rand(3, 5, 2, generator=g)
    both = streaming.held([seen, heard], TorusMemory((5, 2), 2, 0.9)).reshape(3, 5, 2, 2)
    # newest first
    assert torch.equal(both[:, :, 0], seen.flip(1))
    assert torch.equal(both[:, :, 1], heard.flip(1))
    ring = streaming.held([seen, heard], TorusMemory((5,), 2, 0.9)).reshape(3, 5, 2)
    torch.testing.assert_close(ring, (seen + heard).flip(1))
    faded = streaming.faded([seen], TorusMemory((5,), 2, 0.9))
    weights = 0.9 ** torch.arange(4, -1, -1.0)
    torch.testing.assert_close(faded, (weights[:, None] * seen).sum(1))


def test_a_ring_reads_the_stream_that_the_shared_protocol_gives() -> None:
    side = f"rows {sequential.OWN}"
    task = sequential._task(_trial(side), 48)
    net = sequential.build(_trial(side), task)
    x = task.batch(task.train, slice(0, 3)).x
    assert x.shape == (3, 28, 28)
    inner = net.inner.eval()  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(net(x), inner(x.flip(1).flatten(1)))


def test_pairs_are_corrupted_alike_for_all_sides_and_in_part_lost() -> None:
    one = modalities.pairs(_trial(modalities.TWO), "train", 40)
    two = modalities.pairs(_trial(modalities.GRU), "train", 40)
    assert torch.equal(one.seen, two.seen)
    assert torch.equal(one.heard, two.heard)
    assert not torch.equal(one.seen[:20], modalities.pairs(_trial(modalities.TWO), "test", 20).seen)
    assert modalities.inputs(modalities.TWO, one).shape[1] == 2 * modalities.inputs(modalities.ONE, one).shape[1]


# -- H9


def test_a_bump_follows_the_path_around_the_torus() -> None:
    measured, position = navigation.walks(20, 60, 3)
    found = navigation.bumps(measured)
    torch.testing.assert_close(found.sum(-1), torch.ones(20, 60), atol=1e-4, rtol=0)
    # its centre of mass on the circle is where the measured velocities lead
    wanted = (navigation.SPEED * measured).cumsum(1).remainder(1)
    grid = torch.arange(navigation.CELLS) / navigation.CELLS
    plane = found.unflatten(2, (navigation.CELLS, navigation.CELLS))
    angle = torch.polar(torch.ones(navigation.CELLS), 2 * math.pi * grid)
    along = torch.stack([(plane.sum(3) * angle).sum(2), (plane.sum(2) * angle).sum(2)], -1)
    centre = (along.angle() / (2 * math.pi)).remainder(1)
    assert float(navigation.distance(centre, wanted).max()) < 0.02
    assert float(navigation.distance(position, wanted).mean()) < 0.05
    torch.testing.assert_close(navigation.decoded(navigation.phases(position)), position, atol=1e-5, rtol=0)


# -- H11


def test_reads_are_kept_and_a_growing_learner_grows_when_there_is_no_room() -> None:
    assert growth.reads(0) < 1e-12
    stream = PermutedMNIST(3, 0, train=320, test=10, batch_size=32)
    net = nets.build("dense", 0, hidden=(8,), torus=(2,), open_share=0.5)
    learner = growth.GrowingLearner(net, growth.VARIANCE)
    learner._count = lambda x, y: None  # type: ignore[method-assign]
    for i in range(len(stream)):
        batch = stream.batch(i)
        learner.observe(batch.x, batch.y)
    assert net.context.contexts == 3
    assert net.context.sheets == (2,)
    assert learner.largest_change < 1e-5
    held = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}


def test_the_rule_by_curvature_grows_before_the_torus_is_full() -> None:
    stream = PermutedMNIST(7, 0, train=320, test=10, batch_size=32)
    found = {}
    for rule in (growth.VARIANCE, growth.CURVATURE):
        net = nets.build("dense", 0, hidden=(18,), torus=growth.BASE, open_share=0.5)
        learner = growth.GrowingLearner(net, rule)
        learner._count = lambda x, y: None  # type: ignore[method-assign]
        for i in range(len(stream)):
            batch = stream.batch(i)
            learner.observe(batch.x, batch.y)
        assert net.context.contexts == 7
        found[rule] = net.context.sheets
    assert found == {growth.VARIANCE: (), growth.CURVATURE: (2,)}
    with pytest.raises(ConfigError, match="a rule in"):
        wanted(net, torch.rand(4, 1, 28, 28), "taste")


# -- H12


def test_a_rise_of_the_energy_is_seen() -> None:
    net = nets.build("dense", 0, hidden=(12,)).double().eval()
    x = nets.digits(20, 10).inputs("train", slice(0, 2)).double()
    first, second = descent.energies(net, x, 40)
    assert net.context.sheets == (2,)
    torch.testing.assert_close(second[0], first[-1], atol=1e-12, rtol=0)
    falling = torch.cat([first, second[1:]])
    assert float(falling.diff(dim=0).max()) <= 1e-12
    assert float(falling[0].min() - falling[-1].max()) > 1
    (layer,) = equilibria(net)
    head = nn.utils.parameters_to_vector(layer.parameters())
    assert head.dtype == torch.float64
    # against the order of time it only rises
    assert float(falling.flip(0).diff(dim=0).min()) >= -1e-12


# -- H7


def test_a_gated_denoiser_keeps_contexts_of_noise_and_spikes_to_the_same_image() -> None:
    torch.manual_seed(0)
    net = sampling.GatedDenoiser(24, "probabilistic", 0)
    x, y = nets.digits(200, 20).inputs("train", slice(None)), nets.digits(200, 20).train_y
    net.observe(x)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    net.train()
    for i in range(30):
        part = slice(40 * (i % 5), 40 * (i % 5) + 40)
        optimizer.zero_grad()
        net.criterion(net(x[part]), y[part]).backward()
        optimizer.step()
    assert net.inner.context.contexts > 1
    net.eval()
    level = torch.full((10,), 0.5)
    seen = Seen(x[:10] + 0.5 * torch.randn(x[:10].shape, generator=torch.Generator().manual_seed(1)), level)
    with torch.no_grad():
        settled = net.denoise(seen)
        net.solver = Spiking(max_steps=4000, tolerance=1e-3)
        fired = net.denoise(seen)
    assert net.events > 0
    assert float((fired - settled).square().mean()) < 0.01 * float((settled - seen.x).square().mean())


def test_speed_is_that_of_the_dense_network_at_the_distance_that_both_reach(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times = iter([1.0, 8.0, 16.0, 40.0])  # the first one warms up
    distances = iter([90.0, 60.0, 30.0])
    monkeypatch.setattr(sampling, "trained", lambda *_: (None, None))
    monkeypatch.setattr(sampling, "drawn", lambda *_: (torch.rand(20, 1, 28, 28), next(times) * 20 / 1000))
    monkeypatch.setattr(sampling, "digit_fid", lambda *_: next(distances))
    trial = Trial(SMOKE, sampling.GATED, 0, "cpu", tmp_path)
    points = [(1.0, 80.0), (2.0, 50.0), (5.0, 40.0)]
    found = sampling._of_dense(trial, sampling.SIZES["smoke"], nets.digits(64, 20), points)
    # both reach 40: this side after 5 s, the dense one after 40
    assert found[sampling.SPEED].value == pytest.approx(8.0)


# -- H13


def test_a_cue_without_noise_recalls_its_own_value_from_a_narrow_kernel() -> None:
    g = torch.Generator().manual_seed(0)
    at = torch.tensor([[0.0, 0.0], [3.0, 3.0], [0.0, 3.0]])
    values = torch.randn(3, 16, generator=g)
    torus = replace(recall.memory(5.0), features=16)
    found = recall.Episode(at, recall.written(torus, at, values), values).scores(torus, torus.geometry())
    assert found.argmax(1).tolist() == [0, 1, 2]
    assert float(found.diagonal().min()) > 0.99


def test_the_learned_metric_is_curved_and_the_flat_one_is_not() -> None:
    torus = recall.memory(1.0)
    learned = recall.geometry(recall.LEARNED, torus, 0, 3)
    assert float(learned.ricci_scalar().abs().max()) > 1e-3
    assert recall.geometry(recall.FLAT, torus, 0, 3).phi is None


# -- H10


def test_events_of_both_sides_are_counted_alike(tmp_path: Path) -> None:
    pytest.importorskip("nir")
    pytest.importorskip("snntorch")
    found = {}
    for side in hardware.SIDES:
        scratch = tmp_path / side
        scratch.mkdir()
        found[side] = hardware.run(_trial(side, scratch)).metrics
    own, other = (found[side]["events"].value for side in (hardware.OWN, hardware.SIMULATOR))
    assert own is not None
    assert other is not None
    # one step more or less of twenty, and spikes that wait for the next one
    assert other == pytest.approx(own, rel=0.3)


def test_spiking_is_what_the_hardware_side_runs() -> None:
    net = nets.build("dense", 0, hidden=(12,)).eval()
    x = torch.rand(3, 1, 28, 28)
    _, solution = net.spike(x, Spiking(max_steps=10, tolerance=0.0))
    assert int(solution.steps.min()) == 10
