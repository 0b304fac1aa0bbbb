"""The latent optimisation of lookahead guidance, on functions whose answers are known."""

import pytest
import torch
from lcm_lookahead.lookahead.method.latent_optimisation import (
    RAW,
    RELATIVE,
    UNIT_RMS,
    Optimisation,
    best_start,
    carried,
    evaluate_preview,
    optimise_latent,
)

SHAPE = (3, 4, 8, 8)


@pytest.fixture
def z():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def decode(latent):
    return latent[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2)


def to(target, valid=(True, True, True)):
    """A loss: the mean square of the distance to a colour of its own for each picture."""

    def loss(picture, rows):
        mine = target if rows is None else target[rows]
        known = torch.tensor(valid) if rows is None else torch.tensor(valid)[rows]
        return (picture - mine.reshape(-1, 1, 1, 1)).square().mean(dim=(1, 2, 3)), known

    return loss


TARGET = torch.tensor([0.0, 0.5, -0.5])


def double(z):
    return 2 * z


def evaluate(z, gradient=True, loss=None, predict=double, **options):
    return evaluate_preview(predict, decode, loss or to(TARGET), z, gradient, **options)


def optimise(z, settings, loss=None, **options):
    return optimise_latent(double, decode, loss or to(TARGET), z, settings, **options)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_the_gradient_is_that_of_the_whole_chain(z, chunk_size):
    e = evaluate(z, chunk_size=chunk_size)
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
        values, valid = to(TARGET)(picture, rows)
        return 1e-9 * values, valid

    found = evaluate(z, loss=tiny, predict=lambda z: Half.apply(2 * z)).gradient
    expected = 1e-9 * evaluate(z).gradient
    assert torch.allclose(found, expected, rtol=2e-3, atol=1e-14)


def test_the_loss_falls_for_each_picture_and_the_best_iterate_is_kept(z):
    seen = []
    best = optimise(z, Optimisation(30, 0.05), on_iterate=lambda n, e: seen.append(e.values))
    assert len(seen) == 31
    lowest = torch.stack(seen).amin(0)
    assert torch.allclose(evaluate(best, gradient=False).values, lowest) and (lowest < 0.6 * seen[0]).all()
    assert torch.allclose(best.flatten(1).norm(dim=1), z.flatten(1).norm(dim=1), rtol=1e-4)


def test_the_last_iterate_can_be_kept_instead(z):
    settings = Optimisation(5, 5.0, keep_best=False, momentum=0.0)  # far too large a step
    last = optimise(z, settings)
    assert (evaluate(last, gradient=False).values > evaluate(z, gradient=False).values).any()
    kept = optimise(z, Optimisation(5, 5.0, momentum=0.0))
    assert (evaluate(kept, gradient=False).values <= evaluate(z, gradient=False).values).all()


@pytest.mark.parametrize("kind, size", [(RAW, None), (UNIT_RMS, 0.1), (RELATIVE, 0.3)])
def test_what_the_step_size_is_measured_in(kind, size):
    z = 3 * torch.randn(SHAPE)
    settings = Optimisation(1, 0.1, kind, momentum=0.0, keep_norm=False, keep_best=False)
    moved = optimise(z, settings) - z
    if size is None:
        assert torch.allclose(moved, -0.1 * evaluate(z).gradient, atol=1e-6)
    else:
        assert torch.allclose(moved.flatten(1).square().mean(1).sqrt(), torch.tensor(size), rtol=0.15)


def test_the_clamp_bounds_every_number(z):
    settings = Optimisation(1, 1.0, clamp=0.01, keep_norm=False, keep_best=False)
    moved = (optimise(z, settings) - z).abs()
    assert 0.0099 < float(moved.max()) < 0.0101


def test_a_picture_that_is_not_valid_stays_where_it_is(z):
    loss = to(TARGET, valid=(True, False, True))
    out = optimise(z, Optimisation(3), loss)
    assert torch.equal(out[1], z[1]) and not torch.equal(out[0], z[0])
    nothing = to(TARGET, valid=(False, False, False))
    assert torch.equal(optimise(z, Optimisation(3), nothing), z)


def test_a_gradient_that_is_not_finite_moves_nothing(z):
    def broken(picture, rows):
        values, valid = to(TARGET)(picture, rows)
        return values * torch.tensor([1.0, torch.nan, 1.0]), valid

    out = optimise(z, Optimisation(3), broken)
    assert torch.equal(out[1], z[1]) and out.isfinite().all() and not torch.equal(out[2], z[2])


def test_outside_of_the_mask_every_bit_stays(z):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:5, 3:] = 1
    out = optimise(z, Optimisation(5), mask=mask)
    outside = (mask == 0).expand_as(z)
    assert torch.equal(out[outside], z[outside]) and not torch.equal(out, z)


def test_each_picture_is_optimised_as_if_alone(z):
    together = optimise(z, Optimisation(5))
    for n in range(3):
        alone = optimise(z[n : n + 1], Optimisation(5), to(TARGET[n : n + 1], (True,)))
        assert torch.allclose(together[n : n + 1], alone, atol=1e-5)


def test_without_iterations_nothing_is_evaluated(z):
    def never(*_):
        raise AssertionError

    assert optimise_latent(never, never, never, z, Optimisation(0)) is z


def test_an_evaluation_can_be_wrapped(z):
    """As a run does that tries again with less memory."""
    calls = []

    def one_by_one(predict, decode, loss, z, gradient):
        calls.append(gradient)
        return evaluate_preview(predict, decode, loss, z, gradient, chunk_size=1)

    assert torch.allclose(optimise(z, Optimisation(2), evaluate=one_by_one), optimise(z, Optimisation(2)), atol=1e-6)
    assert calls == [True, True, False]


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="'max'"):
        Optimisation(normalisation="max")


def test_on_the_sphere_the_noise_keeps_its_strength_and_the_signal_its_place(z):
    """The centre is the signal in the latent by its first preview; the old way keeps the norm of both together."""
    alpha_bar = torch.tensor(0.3)
    centre = alpha_bar.sqrt() * 2 * z
    moved = optimise(z, Optimisation(5, 0.1, sphere=True, keep_best=False), alpha_bar=alpha_bar)
    radii = [(x - centre).flatten(1).norm(dim=1) for x in (z, moved)]
    assert torch.allclose(*radii, rtol=1e-5) and (moved - z).abs().max() > 0.05
    together = optimise(z, Optimisation(5, 0.1, keep_best=False))
    assert torch.allclose(together.flatten(1).norm(dim=1), z.flatten(1).norm(dim=1), rtol=1e-5)
    assert not torch.allclose((together - centre).flatten(1).norm(dim=1), radii[0], rtol=1e-4)


def test_on_the_sphere_a_gradient_along_the_noise_moves_nothing(z):
    def along(predict, decode, loss, at, gradient):
        e = evaluate_preview(predict, decode, loss, at, gradient)
        return e._replace(gradient=at - e.preview)

    def itself(z):
        return 0 * z

    still = optimise_latent(
        itself,
        decode,
        to(TARGET),
        z,
        Optimisation(3, 0.1, RAW, sphere=True, keep_best=False),
        evaluate=along,
        alpha_bar=torch.tensor(0.3),
    )
    assert torch.allclose(still, z, atol=1e-5)


def test_the_sphere_needs_the_noise_level(z):
    with pytest.raises(ValueError, match="alpha_bar"):
        optimise(z, Optimisation(sphere=True))


def test_the_step_size_falls_as_a_cosine():
    rates = [Optimisation(4, 0.1, decay=True).rate(i) for i in range(4)]
    assert rates == pytest.approx([0.1, 0.0854, 0.05, 0.0146], abs=1e-4)
    assert {Optimisation(4, 0.1).rate(i) for i in range(4)} == {0.1}


def test_nesterov_looks_where_the_momentum_leads(z):
    seen = []

    def evaluate(predict, decode, loss, at, gradient):
        seen.append(at)
        return evaluate_preview(predict, decode, loss, at, gradient)

    settings = Optimisation(2, 0.1, RAW, 0.5, keep_norm=False, keep_best=False, nesterov=True)
    last = optimise(z, settings, evaluate=evaluate)
    slopes = [evaluate_preview(double, decode, to(TARGET), at, True).gradient for at in seen[:2]]
    first = z - 0.1 * slopes[0]
    assert torch.allclose(seen[0], z) and torch.allclose(seen[1], first - 0.1 * 0.5 * slopes[0])
    assert torch.allclose(last, first - 0.1 * (0.5 * slopes[0] + slopes[1])) and seen[2] is last


def test_a_lucky_draw_is_found_out_when_the_best_are_judged_again(z):
    """One early iterate is measured far too low; judged without chance it is not the best."""
    numbers = iter(range(100))

    def lucky(predict, decode, loss, at, gradient):
        e = evaluate_preview(predict, decode, loss, at, gradient)
        return e._replace(values=e.values - 100) if next(numbers) == 1 else e

    def result(judged):
        at = optimise(z, Optimisation(10, 0.1, judged=judged), evaluate=lucky, judge=evaluate_preview)
        return evaluate(at, gradient=False).values

    believed, plain = result(0), result(3)
    numbers = iter(range(100, 200))
    assert (plain < 0.9 * believed).all()
    assert torch.allclose(plain, evaluate(optimise(z, Optimisation(10, 0.1)), gradient=False).values)


# -- without backward


def refusing(z):
    """A model that looks ahead, of which nobody may ask a gradient."""
    assert not torch.is_grad_enabled()
    return 2 * z.sin() + 0.3 * z.roll(1, -1)


ALPHA_BAR = torch.tensor([0.04, 0.3, 0.8])


def test_without_backward_the_gradient_of_the_preview_is_carried_by_the_share_of_z_0(z):
    with torch.no_grad():
        preview = refusing(z)
    leaf = preview.clone().requires_grad_()
    values, _ = to(TARGET)(decode(leaf), None)
    (of_preview,) = torch.autograd.grad(values.sum(), leaf)
    e = evaluate(z, predict=carried(refusing, ALPHA_BAR))
    assert torch.equal(e.preview, preview) and torch.allclose(e.values, values)
    assert torch.allclose(e.gradient, ALPHA_BAR.sqrt().reshape(-1, 1, 1, 1) * of_preview, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("more", [{}, {"sphere": True, "nesterov": True, "decay": True, "judged": 2}])
def test_without_backward_the_loss_falls_too(z, more):
    settings = Optimisation(30, 0.05, backward=False, **more)
    best = optimise_latent(refusing, decode, to(TARGET), z, settings, alpha_bar=ALPHA_BAR)
    values = [evaluate(at, predict=carried(refusing, ALPHA_BAR), gradient=False).values for at in (z, best)]
    assert (values[1] < 0.8 * values[0]).all()


def test_without_backward_the_noise_level_is_needed(z):
    with pytest.raises(ValueError, match="alpha_bar"):
        optimise(z, Optimisation(backward=False))


# -- best of several noises


def draws(seed, shape=SHAPE):
    """Noises in which each picture has a generator of its own."""
    generators = [torch.Generator().manual_seed(seed + row) for row in range(shape[0])]
    return lambda: torch.stack([torch.randn(shape[1:], generator=g) for g in generators])


def look(z):
    return evaluate_preview(double, decode, to(TARGET[: len(z)], (True,) * len(z)), z, False)


def test_the_best_start_is_each_picture_s_best_of_all_that_are_seen_and_never_worse_than_its_own(z):
    seen = []
    best = best_start(look, z, [draws(5)] * 6, ALPHA_BAR, on_look=lambda n, e: seen.append(e.values))
    found = look(best).values
    assert len(seen) == 7 and torch.allclose(found, torch.stack(seen).amin(0)) and (found <= look(z).values).all()
    assert (found < look(z).values).any()
    assert torch.equal(best_start(look, z, [draws(5)] * 6, ALPHA_BAR), best)  # the same each time
    assert torch.equal(best_start(look, z, [], ALPHA_BAR), z)


@pytest.mark.parametrize("known", [False, True])
def test_another_start_has_the_same_signal_under_noise_of_the_same_strength(z, known):
    """By the preview, or by what is known: at the first step of a run from nothing, noise alone."""
    seen = []

    def watched(at):
        seen.append(at)
        return look(at)

    signal = torch.zeros(SHAPE) if known else None
    best_start(watched, z, [draws(5)] * 2, ALPHA_BAR, signal=signal)
    centre = 0 if known else ALPHA_BAR.sqrt().reshape(-1, 1, 1, 1) * 2 * z
    radii = [(at - centre).flatten(1).norm(dim=1) for at in seen]
    assert torch.allclose(radii[0], radii[1], rtol=1e-5) and torch.allclose(radii[0], radii[2], rtol=1e-5)
    noises = [(at - centre).flatten(1) for at in seen]
    cosines = torch.nn.functional.cosine_similarity(noises[1], noises[2])
    assert cosines.abs().max() < 0.3 and not torch.equal(seen[1], seen[2])


def test_a_start_stays_where_nothing_may_move_and_each_picture_is_as_if_alone(z):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:5, 3:] = 1
    best = best_start(look, z, [draws(5)] * 8, ALPHA_BAR, mask)
    outside = (mask == 0).expand_as(z)
    assert torch.equal(best[outside], z[outside]) and not torch.equal(best, z)
    alone = best_start(look, z[:1], [draws(5, (1, *SHAPE[1:]))] * 8, ALPHA_BAR[:1], mask)
    assert torch.allclose(alone, best[:1])


def test_where_nothing_is_valid_the_start_is_the_latent_itself(z):
    best = best_start(lambda at: look(at)._replace(valid=torch.zeros(3, dtype=torch.bool)), z, [draws(5)], ALPHA_BAR)
    assert torch.equal(best, z)


# -- the mean of several draws


def test_an_iteration_can_average_several_draws(z):
    """Of a loss that is off by chance, the mean of all is the plain one; a draw that is not valid does not count."""
    offsets = iter([0.3, -0.3, torch.nan, 0.0])

    def by_chance(predict, decode, loss, at, gradient):
        e = evaluate_preview(predict, decode, loss, at, gradient)
        if not gradient:
            return e
        off = next(offsets)
        if off != off:
            none = torch.zeros(3, dtype=torch.bool)
            return e._replace(values=e.values * off, valid=none, gradient=torch.zeros_like(z))
        return e._replace(values=e.values + off, gradient=e.gradient * (1 + off))

    seen = []
    settings = Optimisation(1, 0.1, RAW, keep_norm=False, keep_best=False, smoothing=4)
    out = optimise(z, settings, evaluate=by_chance, on_iterate=lambda n, e: seen.append(e))
    plain = evaluate(z)
    assert torch.allclose(seen[0].values, plain.values, atol=1e-6) and seen[0].valid.all()
    assert torch.allclose(out, z - 0.1 * plain.gradient, atol=1e-6)


def test_no_draws_are_refused():
    with pytest.raises(ValueError, match="smoothing is 0"):
        Optimisation(smoothing=0)
