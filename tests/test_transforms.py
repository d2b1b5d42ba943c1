"""Noise and corruptions: closed forms, statistics, seeds, and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from toreq import data
from toreq.data.batches import seeded
from toreq.errors import ConfigError, DataError

GREY = torch.full((8, 2, 12, 10), 0.5)
IMAGES = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_gaussian_noise_has_its_standard_deviation(generator: torch.Generator):
    x = torch.full((50, 1, 28, 28), 0.5)
    noisy = data.gaussian_noise(x, 0.1, None, generator=generator)
    assert float((noisy - x).std()) == pytest.approx(0.1, rel=0.02)
    assert float((noisy - x).mean()) == pytest.approx(0, abs=0.002)
    clipped = data.gaussian_noise(x, 1.0, generator=generator)
    assert (float(clipped.min()), float(clipped.max())) == (0, 1)
    assert torch.equal(data.gaussian_noise(x, 0.0, generator=generator), x)


def test_salt_and_pepper_hits_its_share_in_all_channels(generator: torch.Generator):
    x = torch.full((40, 3, 28, 28), 0.5)
    noisy = data.salt_and_pepper(x, 0.2, generator=generator)
    hit = noisy != 0.5
    assert float(hit.float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(noisy[hit].mean()) == pytest.approx(0.5, abs=0.03)
    assert bool((hit.all(1) == hit.any(1)).all())
    assert torch.equal(data.salt_and_pepper(x, 0.0, generator=generator), x)
    assert set(data.salt_and_pepper(x, 1.0, generator=generator).unique().tolist()) == {0.0, 1.0}


def test_occlusion_is_one_square_inside_each_image(generator: torch.Generator):
    covered = data.occlusion(GREY.repeat(10, 1, 1, 1), 4, generator=generator) == 0
    assert bool((covered.sum((2, 3)) == 16).all())
    rows, columns = covered[:, 0].any(2), covered[:, 0].any(1)
    assert bool((rows.sum(1) == 4).all())
    assert bool((columns.sum(1) == 4).all())
    assert len(rows.unique(dim=0)) == 9  # every possible top occurs in 80 draws
    assert torch.equal(data.occlusion(GREY, 0, generator=generator), GREY)
    assert float(data.occlusion(GREY, 10, 0.25, generator=generator)[:, :, :, 0].min()) == 0.25


def test_blur_is_the_normalised_gaussian():
    flat = data.blur(GREY, 1.5)
    torch.testing.assert_close(flat, GREY)
    impulse = torch.zeros(1, 1, 15, 15, dtype=torch.float64)
    impulse[0, 0, 7, 7] = 1
    kernel = data.blur(impulse, 1.0)[0, 0]
    weights = torch.tensor([math.exp(-(k**2) / 2) for k in range(-3, 4)], dtype=torch.float64)
    weights /= weights.sum()
    torch.testing.assert_close(kernel[4:11, 4:11], torch.outer(weights, weights))
    assert float(kernel.sum()) == pytest.approx(1)
    # Channels do not mix.
    coloured = torch.zeros(1, 3, 9, 9)
    coloured[:, 1] = 1
    torch.testing.assert_close(data.blur(coloured, 2.0), coloured)


def test_contrast_moves_towards_the_mean():
    flat = data.contrast(IMAGES, 0.0)
    torch.testing.assert_close(flat, IMAGES.mean((1, 2, 3), keepdim=True).expand_as(IMAGES))
    torch.testing.assert_close(data.contrast(IMAGES, 1.0), IMAGES)
    half = data.contrast(IMAGES, 0.5)
    torch.testing.assert_close(half.std((1, 2, 3)), 0.5 * IMAGES.std((1, 2, 3)))
    strong = data.contrast(IMAGES, 5.0)
    assert (float(strong.min()), float(strong.max())) == (0, 1)


@pytest.mark.parametrize(("down", "right"), [(2, 3), (-1, 0), (0, -4), (5, -5), (0, 0), (12, 0), (0, 20)])
def test_shift_moves_and_fills_with_zeros(down: int, right: int):
    expected = torch.zeros_like(IMAGES)
    for row in range(12):
        for column in range(12):
            if 0 <= row - down < 12 and 0 <= column - right < 12:
                expected[:, :, row, column] = IMAGES[:, :, row - down, column - right]
    assert torch.equal(data.shift(IMAGES, down, right), expected)


def test_random_shift_stays_in_range_and_differs_between_images(generator: torch.Generator):
    point = torch.zeros(300, 1, 9, 9)
    point[:, :, 4, 4] = 1
    moved = data.random_shift(point, 2, generator=generator)
    assert bool((moved.sum((1, 2, 3)) == 1).all())
    places = moved.flatten(1).argmax(1)
    offsets = {(int(p) // 9 - 4, int(p) % 9 - 4) for p in places}
    assert offsets == {(row, column) for row in range(-2, 3) for column in range(-2, 3)}
    assert torch.equal(data.random_shift(IMAGES, 0, generator=generator), IMAGES)


@pytest.mark.parametrize("name", data.corruptions())
def test_corruptions_grow_with_severity_are_seeded_and_leave_the_input(name: str):
    # Smooth pictures, so that blur and shift have something to spoil at every severity.
    x = data.blur(torch.rand(64, 1, 20, 20, generator=seeded(1)), 1.0)
    before = x.clone()
    damage = []
    for severity in range(1, 6):
        spoiled = data.corrupt(x, name, severity, generator=seeded(2))
        assert torch.equal(spoiled, data.corrupt(x, name, severity, generator=seeded(2)))
        assert spoiled.shape == x.shape
        assert float(spoiled.min()) >= 0
        assert float(spoiled.max()) <= 1 + 1e-6
        damage.append(float((spoiled - x).square().mean()))
    assert torch.equal(x, before)
    assert damage[0] > 0
    assert damage == sorted(damage)


def test_the_global_state_is_not_touched(generator: torch.Generator):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name in data.corruptions():
        data.corrupt(IMAGES, name, 3, generator=generator)
    data.blob_dataset()
    list(data.Batches(IMAGES, torch.zeros(6, dtype=torch.int64), 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_arguments_are_refused(generator: torch.Generator):
    with pytest.raises(ConfigError, match="did you mean 'blur'"):
        data.corrupt(IMAGES, "blurr", 1, generator=generator)
    for severity in (0, 6):
        with pytest.raises(ConfigError, match="severity of 1 to 5"):
            data.corrupt(IMAGES, "blur", severity, generator=generator)
    for call in (
        lambda: data.gaussian_noise(IMAGES, -1.0, generator=generator),
        lambda: data.salt_and_pepper(IMAGES, 1.5, generator=generator),
        lambda: data.occlusion(IMAGES, 13, generator=generator),
        lambda: data.blur(IMAGES, 0.0),
        lambda: data.contrast(IMAGES, -0.1),
        lambda: data.random_shift(IMAGES, -1, generator=generator),
    ):
        with pytest.raises(ConfigError, match="expected"):
            call()
    with pytest.raises(DataError, match=r"images \(B, C, H, W\)"):
        data.blur(IMAGES[0], 1.0)
    with pytest.raises(DataError, match="floating-point"):
        data.shift((IMAGES * 255).to(torch.uint8), 1, 1)


def test_augmentation_without_a_warp_is_the_shift_itself():
    augment = data.Augmentation(shift=2)
    assert augment.active
    assert not augment.warps
    expected = data.random_shift(IMAGES, 2, generator=seeded(3))
    assert torch.equal(augment(IMAGES, generator=seeded(3)), expected)
    assert not data.Augmentation().active


def test_augmentation_flips_about_half_the_images_and_nothing_else():
    x = torch.rand(400, 1, 3, 5, generator=seeded(0))
    y = data.Augmentation(flip=True)(x, generator=seeded(1))
    mirrored = (y == x.flip(-1)).flatten(1).all(1)
    assert bool((mirrored | (y == x).flatten(1).all(1)).all())
    assert 150 < int(mirrored.sum()) < 250


@pytest.mark.parametrize(
    ("given", "start", "bound"),
    [({"rotate": 20.0}, (0.0, 0.5), 20.0), ({"zoom": 0.2}, (0.0, 0.5), 0.0), ({"shear": 0.3}, (0.5, 0.0), 17.0)],
)
def test_augmentation_moves_a_point_as_far_as_it_says(
    given: dict[str, float], start: tuple[float, float], bound: float
):
    # a smooth spot off the centre, in half heights: where its centre of mass goes is the inverse map, exactly known
    axis = (torch.arange(81) + 0.5) / 40.5 - 1
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    spot = torch.exp(-((rows - start[1]) ** 2 + (columns - start[0]) ** 2) / (2 * 0.08**2))
    x = spot.expand(200, 1, 81, 81).double()
    y = data.Augmentation(**given)(x, generator=seeded(5))
    mass = y.sum((1, 2, 3))
    at = torch.stack([(y[:, 0] * columns).sum((1, 2)) / mass, (y[:, 0] * rows).sum((1, 2)) / mass], 1)
    turned = torch.atan2(at[:, 1], at[:, 0]) - torch.atan2(torch.tensor(start[1]), torch.tensor(start[0]))
    radius = at.norm(dim=1)
    degrees = torch.rad2deg(turned).abs()
    if "rotate" in given:
        assert 0.8 * bound < float(degrees.max()) <= bound + 0.1
        assert torch.allclose(radius, torch.full_like(radius, 0.5), atol=2e-3)
    elif "zoom" in given:
        assert float(degrees.max()) < 0.1
        assert 0.5 / 1.2 - 2e-3 <= float(radius.min()) < 0.44
        assert 0.58 < float(radius.max()) <= 0.5 / 0.8 + 2e-3
    else:  # a shear keeps points on its own axis where they are
        assert float((at - torch.tensor(start)).abs().max()) < 2e-3


@pytest.mark.parametrize(
    "given",
    [{"rotate": 181.0}, {"zoom": 1.0}, {"zoom": -0.1}, {"shear": -1.0}, {"shift": -1}, {"rotate": float("nan")}],
)
def test_augmentation_refuses_what_is_out_of_range(given: dict[str, float]):
    with pytest.raises(ConfigError, match=f"Augmentation.{next(iter(given))}"):
        data.Augmentation(**given)


def test_augmentation_refuses_what_is_no_image():
    with pytest.raises(DataError, match="images"):
        data.Augmentation(flip=True)(torch.rand(3, 4), generator=seeded(0))
