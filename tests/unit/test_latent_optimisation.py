"""The latent optimisation of lookahead guidance, on functions whose answers are known."""

import pytest
import torch
from lcm_lookahead.lookahead.method import guidance

SHAPE = (3, 4, 8, 8)


@pytest.fixture
def z():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def decode(latent):
    return latent[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2)


def to(target, counts=(True, True, True)):
    """A loss: the mean square of the distance to a colour of its own for each picture."""

    def loss(picture, rows):
        mine = target if rows is None else target[rows]
        known = torch.tensor(counts) if rows is None else torch.tensor(counts)[rows]
        return (picture - mine.reshape(-1, 1, 1, 1)).square().mean(dim=(1, 2, 3)), known

    return loss


TARGET = torch.tensor([0.0, 0.5, -0.5])


def evaluation(loss=None, predict=lambda z: 2 * z, **options):
    def run(z, gradient):
        return guidance.evaluate_preview(z, predict, decode, loss or to(TARGET), gradient, **options)

    return run


@pytest.mark.parametrize("together", [None, 1, 2])
def test_the_gradient_is_that_of_the_whole_chain(z, together):
    e = evaluation(together=together)(z, True)
    leaf = z.clone().requires_grad_()
    values, _ = to(TARGET)(decode(2 * leaf), None)
    (expected,) = torch.autograd.grad(values.sum(), leaf)
    assert torch.allclose(e.gradient, expected, rtol=1e-4, atol=1e-9) and torch.allclose(e.values, values)
    assert e.picture.shape == (3, 3, 16, 16) and e.gradient[:, 3].abs().max() == 0


def test_small_gradients_survive_networks_in_16_bit(z):
    """A loss of 1e-6 times the usual would vanish in fp16."""

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.half().float()

    def tiny(picture, rows):
        values, counts = to(TARGET)(picture, rows)
        return 1e-9 * values, counts

    found = evaluation(tiny, lambda z: Half.apply(2 * z))(z, True).gradient
    expected = 1e-9 * evaluation()(z, True).gradient
    assert torch.allclose(found, expected, rtol=2e-3, atol=1e-14)


def test_the_loss_falls_for_each_picture_and_the_best_iterate_is_kept(z):
    seen = []
    best = guidance.optimise_latent(
        z, evaluation(), guidance.Optimisation(30, 0.05), on_iterate=lambda n, e: seen.append(e.values)
    )
    assert len(seen) == 31
    lowest = torch.stack(seen).amin(0)
    assert torch.allclose(evaluation()(best, False).values, lowest) and (lowest < 0.6 * seen[0]).all()
    assert torch.allclose(best.flatten(1).norm(dim=1), z.flatten(1).norm(dim=1), rtol=1e-4)


def test_the_last_iterate_can_be_kept_instead(z):
    settings = guidance.Optimisation(5, 5.0, keep_best=False, momentum=0.0)  # far too large a step
    last = guidance.optimise_latent(z, evaluation(), settings)
    assert (evaluation()(last, False).values > evaluation()(z, False).values).any()
    kept = guidance.optimise_latent(z, evaluation(), guidance.Optimisation(5, 5.0, momentum=0.0))
    assert (evaluation()(kept, False).values <= evaluation()(z, False).values).all()


@pytest.mark.parametrize("kind, size", [(guidance.RAW, None), (guidance.UNIT_RMS, 0.1), (guidance.RELATIVE, 0.3)])
def test_what_the_step_size_is_measured_in(kind, size):
    z = 3 * torch.randn(SHAPE)
    settings = guidance.Optimisation(1, 0.1, kind, momentum=0.0, keep_norm=False, keep_best=False)
    moved = guidance.optimise_latent(z, evaluation(), settings) - z
    if size is None:
        assert torch.allclose(moved, -0.1 * evaluation()(z, True).gradient, atol=1e-6)
    else:
        assert torch.allclose(moved.flatten(1).square().mean(1).sqrt(), torch.tensor(size), rtol=0.15)


def test_the_clamp_bounds_every_number(z):
    settings = guidance.Optimisation(1, 1.0, clamp=0.01, keep_norm=False, keep_best=False)
    moved = (guidance.optimise_latent(z, evaluation(), settings) - z).abs()
    assert 0.0099 < float(moved.max()) < 0.0101


def test_a_picture_that_does_not_count_stays_where_it_is(z):
    loss = to(TARGET, counts=(True, False, True))
    out = guidance.optimise_latent(z, evaluation(loss), guidance.Optimisation(3))
    assert torch.equal(out[1], z[1]) and not torch.equal(out[0], z[0])
    nothing = to(TARGET, counts=(False, False, False))
    assert torch.equal(guidance.optimise_latent(z, evaluation(nothing), guidance.Optimisation(3)), z)


def test_a_gradient_that_is_not_finite_moves_nothing(z):
    def broken(picture, rows):
        values, counts = to(TARGET)(picture, rows)
        return values * torch.tensor([1.0, torch.nan, 1.0]), counts

    out = guidance.optimise_latent(z, evaluation(broken), guidance.Optimisation(3))
    assert torch.equal(out[1], z[1]) and out.isfinite().all() and not torch.equal(out[2], z[2])


def test_outside_of_the_mask_every_bit_stays(z):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:5, 3:] = 1
    out = guidance.optimise_latent(z, evaluation(), guidance.Optimisation(5), mask)
    outside = (mask == 0).expand_as(z)
    assert torch.equal(out[outside], z[outside]) and not torch.equal(out, z)


def test_each_picture_is_optimised_as_if_alone(z):
    together = guidance.optimise_latent(z, evaluation(), guidance.Optimisation(5))
    for n in range(3):
        alone = guidance.optimise_latent(
            z[n : n + 1], evaluation(to(TARGET[n : n + 1], (True,))), guidance.Optimisation(5)
        )
        assert torch.allclose(together[n : n + 1], alone, atol=1e-5)


def test_without_iterations_nothing_is_evaluated(z):
    def never(*_):
        raise AssertionError

    assert guidance.optimise_latent(z, never, guidance.Optimisation(0)) is z


def test_going_back_keeps_the_noise_level():
    g = torch.Generator().manual_seed(2)
    original, noise, fresh = (torch.randn(1, 4, 64, 64, generator=g) for _ in range(3))
    sigma, sigma_next = torch.tensor(5.0), torch.tensor(4.0)
    x = guidance.travel_back(original + sigma * noise, original, sigma, sigma_next, fresh)
    assert float((x - original).std()) == pytest.approx(5.0, rel=0.02)
    assert not torch.allclose(x, original + sigma * noise)


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="'max'"):
        guidance.Optimisation(normalisation="max")
