"""Every tool of transfer attacks against a slow reference written with loops from its formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from attacks.errors import AttackError
from attacks.seeds import SeedBank
from attacks.transfer import borders, templates, transformations, updates

B, SIZE = 3, (12, 10)
SEEDS = [5, 6, 7]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(B, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def loss_gradient(offset: float) -> Callable[[Tensor], Tensor]:
    """Gradient of a loss that is not quadratic, so that where it is taken matters."""

    def at(point: Tensor) -> Tensor:
        live = point.detach().requires_grad_()
        loss = (torch.sin(3 * live + offset) * live).sum()
        (found,) = torch.autograd.grad(loss, live)
        return found

    return at


def test_mi_divides_by_the_mean_magnitude_and_adds_up(images: Tensor) -> None:
    velocity = torch.zeros_like(images)
    wanted = torch.zeros_like(images)
    for step in range(3):
        gradient = loss_gradient(step)(images) * 10**step
        velocity = updates.accumulate(velocity, gradient, 0.7)
        for row in range(B):
            size = sum(abs(v) for v in gradient[row].flatten().tolist()) / gradient[row].numel()
            wanted[row] = 0.7 * wanted[row] + gradient[row] / size
    torch.testing.assert_close(velocity, wanted)


def test_ni_looks_ahead_along_the_velocity(images: Tensor) -> None:
    velocity = loss_gradient(0)(images)
    ahead = updates.look_ahead(images, velocity, 0.1, 0.9)
    torch.testing.assert_close(ahead, images - 0.1 * 0.9 * velocity)


def test_vmi_is_the_mean_gradient_of_its_neighbours(images: Tensor) -> None:
    gradient_at, rng = loss_gradient(0.3), SeedBank(SEEDS)
    found = updates.variance(gradient_at, images, gradient_at(images), rng, 0.05, 4)
    for row, seed in enumerate(SEEDS):
        total = torch.zeros(3, *SIZE)
        for number in range(4):
            one = SeedBank([seed]).child(f"neighbour {number}")
            noise = one.uniform((3, *SIZE), -0.05, 0.05)[0]
            assert noise.abs().max() <= 0.05
            total += gradient_at(images[row] + noise)
        torch.testing.assert_close(found[row], total / 4 - gradient_at(images[row]))


def test_the_mean_over_surrogates_forgets_their_scale(images: Tensor) -> None:
    gradients = [loss_gradient(i)(images) for i in range(3)]
    scaled = [gradient * 10.0**i for i, gradient in enumerate(gradients)]
    torch.testing.assert_close(updates.mean_of(scaled), updates.mean_of(gradients))
    wanted = sum(g[0] / g[0].abs().mean() for g in gradients) / 3
    torch.testing.assert_close(updates.mean_of(scaled)[0], wanted)


def test_cwa_goes_uphill_then_down_through_every_model_and_signs_the_way(images: Tensor) -> None:
    members = [loss_gradient(i) for i in range(3)]
    start = (images - 0.5) * 0.04
    rule = updates.CommonWeakness(alpha=0.01, reverse=0.003, inner=0.02, momentum=0.9)

    def feasible(point: Tensor) -> Tensor:
        return point.clamp(-0.03, 0.03)

    inner = outer = torch.zeros_like(start)
    point = start
    for _ in range(2):
        point, inner, outer, _ = rule.step(members, point, inner, outer, feasible)
    for row in range(B):
        z, m, big = start[row].clone(), torch.zeros(3, *SIZE), torch.zeros(3, *SIZE)
        for _ in range(2):
            mean = sum(member(z) for member in members) / 3
            now = feasible(z + 0.003 * mean.sign())
            for member in members:
                gradient = member(now)
                length = math.sqrt(sum(v * v for v in gradient.flatten().tolist()))
                m = 0.9 * m - gradient / length
                now = feasible(now + 0.02 * m)
            big = 0.9 * big + (now - z) / (now - z).abs().mean()
            z = feasible(z + 0.01 * big.sign())
        torch.testing.assert_close(point[row], z, atol=1e-6, rtol=1e-5)


def test_ti_is_a_correlation_with_a_gaussian(images: Tensor) -> None:
    smoothed = transformations.smooth(images, 5, 1.5)
    weights = [
        [math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-2, 3)] for i in range(-2, 3)
    ]
    total = sum(map(sum, weights))
    for row, channel, y, x in ((0, 0, 0, 0), (1, 2, 6, 5), (2, 1, 11, 9)):
        wanted = 0.0
        for i in range(-2, 3):
            for j in range(-2, 3):
                if 0 <= y + i < SIZE[0] and 0 <= x + j < SIZE[1]:
                    wanted += (
                        weights[i + 2][j + 2] / total * float(images[row, channel, y + i, x + j])
                    )
        assert float(smoothed[row, channel, y, x]) == pytest.approx(wanted, abs=1e-6)
    assert torch.equal(transformations.smooth(images, 1, 1.5), images)


def slow_dct(picture: Tensor) -> Tensor:
    """Orthonormal DCT-II by its definition, ``[H, W]``."""
    height, width = picture.shape
    found = torch.zeros(height, width, dtype=torch.float64)
    for u in range(height):
        for v in range(width):
            total = 0.0
            for y in range(height):
                for x in range(width):
                    total += (
                        float(picture[y, x])
                        * math.cos(math.pi * (2 * y + 1) * u / (2 * height))
                        * math.cos(math.pi * (2 * x + 1) * v / (2 * width))
                    )
            scale = math.sqrt((1 if u == 0 else 2) / height) * math.sqrt(
                (1 if v == 0 else 2) / width
            )
            found[u, v] = scale * total
    return found


def test_the_cosine_transform_is_the_definition_and_its_inverse_undoes_it(images: Tensor) -> None:
    spectra = transformations.dct(images)
    torch.testing.assert_close(spectra[1, 2], slow_dct(images[1, 2]).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(transformations.idct(spectra), images, atol=1e-5, rtol=1e-5)


def test_ssa_masks_the_spectrum_of_the_noisy_picture(images: Tensor) -> None:
    rng = SeedBank(SEEDS)
    found = transformations.spectrum(images, rng, 0.06, 0.5)
    noise = rng.child("noise").normal((3, *SIZE))
    mask = rng.child("mask").uniform((3, *SIZE), 0.5, 1.5)
    noisy = images + 0.06 * noise
    wanted = transformations.idct(slow_dct(noisy[2, 0]).float() * mask[2, 0])
    torch.testing.assert_close(found[2, 0], wanted, atol=1e-5, rtol=1e-5)
    assert 0.5 <= float(mask.min()) < 0.55 < 1.45 < float(mask.max()) <= 1.5
    untouched = transformations.spectrum(images, rng, 0.0, 0.0)
    torch.testing.assert_close(untouched, images, atol=1e-5, rtol=1e-5)


def test_si_halves_again_and_again(images: Tensor) -> None:
    for number in range(5):
        found = transformations.scale_copy(images, number)
        assert torch.equal(found, images / 2 / 2**number * 2)


def test_place_is_a_crop_resized_and_padded_with_zeros(images: Tensor) -> None:
    source = torch.tensor([[0, 0, 12, 10], [3, 2, 11, 9], [5, 5, 6, 7]])
    target = torch.tensor([[1, 2, 10, 9], [0, 0, 12, 10], [4, 1, 9, 10]])
    found = transformations.place(images, source, target)
    for row in range(B):
        top, left, bottom, right = source[row].tolist()
        to = target[row].tolist()
        cut = images[row : row + 1, :, top:bottom, left:right]
        sized = interpolate(cut, (to[2] - to[0], to[3] - to[1]), mode="bilinear")
        wanted = pad(sized, (to[1], SIZE[1] - to[3], to[0], SIZE[0] - to[2]))
        torch.testing.assert_close(found[row : row + 1], wanted, atol=1e-5, rtol=1e-5)


def test_di_keeps_the_picture_whole_on_a_larger_canvas() -> None:
    rng, size = SeedBank(range(400)), (96, 80)
    boxes = transformations.diverse_box(rng, size, 1.25, 0.5)
    top, left, bottom, right = boxes.unbind(1)
    assert bool((top >= 0).all() & (left >= 0).all())
    assert bool((bottom <= 96).all() & (right <= 80).all())
    moved = (boxes != torch.tensor([0, 0, 96, 80])).any(1)
    assert 0.4 < float(moved.float().mean()) < 0.6
    side = (bottom - top)[moved].float() / 96
    assert 0.79 <= float(side.min()) < 0.83 < 0.96 < float(side.max()) <= 1
    assert int((boxes[moved][:, 0] > 0).sum()) > 100
    assert torch.equal(
        transformations.diverse_box(rng, size, 1.25, 0.0), transformations.whole(400, size)
    )


def test_crops_stay_in_their_region_and_reach_down_to_the_scale() -> None:
    boxes = transformations.crop_box(SeedBank(range(400)), (12, 12, 84, 84), 0.1)
    assert int(boxes.min()) >= 12
    assert int(boxes.max()) <= 84
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).float() / 72**2
    assert 0.09 < float(area.min()) < 0.15 < 0.95 < float(area.max()) <= 1
    assert torch.equal(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])


@pytest.mark.parametrize("phase", [(0, 0), (3, 1), (4, 4)])
def test_tiling_repeats_the_template_from_its_phase(phase: tuple[int, int]) -> None:
    template = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    delta = templates.tile(template, SIZE, torch.tensor([phase, phase]))
    for row in range(2):
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                wanted = template[row, :, (y + phase[0]) % 5, (x + phase[1]) % 5]
                assert torch.equal(delta[row, :, y, x], wanted)


def test_tiling_is_phase_invariant() -> None:
    """A rolled template at the opposite phase is the same pattern; so is a phase of one period."""
    template = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    base = templates.tile(template, SIZE)
    for shift in ((1, 0), (2, 3), (4, 4)):
        phase = torch.tensor([shift, shift])
        rolled = template.roll(shift, (2, 3))
        assert torch.equal(templates.tile(rolled, SIZE, phase), base)
        assert torch.equal(
            templates.tile(template, SIZE, phase + 5), templates.tile(template, SIZE, phase)
        )


def test_folding_is_the_gradient_of_tiling() -> None:
    generator = torch.Generator().manual_seed(2)
    template = torch.randn(2, 3, 5, 5, generator=generator, requires_grad=True)
    weight = torch.randn(2, 3, *SIZE, generator=generator)
    phase = torch.tensor([[1, 4], [3, 0]])
    (wanted,) = torch.autograd.grad(
        (templates.tile(template, SIZE, phase) * weight).sum(), template
    )
    torch.testing.assert_close(templates.fold(weight, 5, phase), wanted)
    slow = torch.zeros(2, 3, 5, 5)
    for row in range(2):
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                a, b = (y + int(phase[row, 0])) % 5, (x + int(phase[row, 1])) % 5
                slow[row, :, a, b] += weight[row, :, y, x]
    torch.testing.assert_close(templates.fold(weight, 5, phase), slow)


@pytest.mark.parametrize("size", [(96, 96), (33, 48), (8, 100)])
@pytest.mark.parametrize("width", [1 / 16, 1 / 8, 3 / 16])
def test_the_frame_is_exact(size: tuple[int, int], width: float) -> None:
    mask = borders.frame(torch.zeros(2, 3, *size), width)
    thick = max(1, round(width * min(size)))
    for y in range(size[0]):
        for x in range(size[1]):
            edge = min(y, x, size[0] - 1 - y, size[1] - 1 - x)
            assert float(mask[0, 0, y, x]) == float(edge < thick)
    top, left, bottom, right = borders.inside_of(size, width)
    assert float(mask[0].sum()) == size[0] * size[1] - (bottom - top) * (right - left)


def test_an_added_frame_is_grey_around_the_shrunken_picture() -> None:
    picture = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(3))
    canvas = borders.framed(picture, 1 / 8)
    mask = borders.frame(picture, 1 / 8).expand(-1, 3, -1, -1) > 0
    torch.testing.assert_close(canvas[mask], torch.full_like(canvas[mask], 128 / 255))
    inner = interpolate(picture, (72, 72), mode="bilinear", antialias=True).clamp(0, 1)
    assert torch.equal(canvas[:, :, 12:84, 12:84], inner)
    alone = borders.framed(picture[1:], 1 / 8)
    assert torch.equal(alone[0], canvas[1])
    with pytest.raises(AttackError, match=r"0\.499 of the shorter side.*96×96"):
        borders.framed(picture, 0.499)


def test_coverage_is_the_mean_of_the_mask_over_a_box() -> None:
    mask = torch.rand(2, 1, *SIZE, generator=torch.Generator().manual_seed(4))
    boxes = torch.tensor([[0, 0, 4, 4], [3, 2, 12, 10], [11, 9, 12, 10], [2, 2, 2, 2]])
    found = borders.covered(mask, boxes)
    for row in range(2):
        for token, (top, left, bottom, right) in enumerate(boxes.tolist()[:3]):
            wanted = mask[row, 0, top:bottom, left:right].mean()
            torch.testing.assert_close(found[row, token], wanted)
        assert float(found[row, 3]) == 0
