"""The noise schedule, equation 3 of the paper and the choice of steps."""

import pytest
import torch
from lcm_lookahead.lookahead.method import schedule

ALPHAS = schedule.alphas_cumprod()
SIGMAS = ((1 - ALPHAS) / ALPHAS).sqrt()


def test_it_is_the_schedule_of_sdxl():
    """Figures of SDXL's scheduler as diffusers has it."""
    assert ALPHAS.shape == (1000,)
    assert float(SIGMAS[0]) == pytest.approx(0.0292, abs=1e-4)
    assert float(SIGMAS[-1]) == pytest.approx(14.6146, abs=1e-3)
    assert float(SIGMAS[861]) == pytest.approx(6.84, abs=0.01)  # the paper's step
    assert float(ALPHAS[861].rsqrt()) == pytest.approx(6.91, abs=0.01)  # how much the preview amplifies


def test_a_noise_level_a_share_of_signal_and_their_ratio_say_the_same():
    assert torch.allclose(schedule.alpha_bar_of(SIGMAS), ALPHAS)
    assert torch.allclose(schedule.signal_to_noise(ALPHAS), SIGMAS**-2)


def test_the_two_scales_of_a_latent_are_inverse_and_hold_the_same_noise():
    """x = z_0 + sigma e and z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) e are one latent."""
    z_0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t = torch.tensor([0, 500, 999])
    x, z_t = z_0 + SIGMAS[t].reshape(-1, 1, 1, 1) * noise, schedule.add_noise(z_0, noise, ALPHAS[t])
    assert torch.allclose(schedule.to_vp(x, SIGMAS[t]), z_t)
    assert torch.allclose(schedule.to_ve(z_t, SIGMAS[t]), x)
    assert torch.equal(schedule.to_vp(x[1:2], SIGMAS[500]), schedule.to_vp(x, SIGMAS[t])[1:2])


def test_with_the_true_noise_a_step_of_ddim_lands_on_the_cleaner_latent():
    z_0, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    t, prev = torch.tensor([500, 999]), torch.tensor([480, 500])
    z_t = schedule.add_noise(z_0, noise, ALPHAS[t])
    stepped = schedule.ddim_step(z_t, noise, ALPHAS[t], ALPHAS[prev])
    assert torch.allclose(stepped, schedule.add_noise(z_0, noise, ALPHAS[prev]))
    assert torch.allclose(schedule.ddim_step(z_t, noise, ALPHAS[t], torch.ones(())), z_0)


@pytest.mark.parametrize(("alpha", "mean", "late"), [(0.2, 540, 0.564), (0.5, 601, 0.659), (0.0, 499.5, 0.5)])
def test_timesteps_follow_the_paper_s_density(alpha, mean, late):
    p = schedule.timestep_density(alpha)
    t = torch.arange(1000)
    assert (p * t).sum().item() == pytest.approx(mean, abs=1) and p[500:].sum().item() == pytest.approx(late, abs=1e-3)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    drawn = schedule.sample_timestep(u, alpha)
    assert drawn.min() == 0 and drawn.max() == 999 and drawn.float().mean().item() == pytest.approx(mean, abs=1)


def test_the_lora_s_scale_runs_from_the_first_end_to_the_last_and_is_1_where_full():
    u = torch.tensor([0.0, 0.5, 1.0])
    assert schedule.lora_scale(u, 0.1, 1.0).tolist() == pytest.approx([0.1, 0.55, 1.0])
    assert schedule.lora_scale(u, 1.0, 0.1).tolist() == pytest.approx([1.0, 0.55, 0.1])
    full = torch.tensor([True, False, False])
    assert schedule.lora_scale(u, 0.1, 0.4, full).tolist() == pytest.approx([1.0, 0.25, 0.4])


@pytest.mark.parametrize("kind", [schedule.EPSILON, schedule.V_PREDICTION])
def test_a_perfect_prediction_gives_the_original(kind):
    g = torch.Generator().manual_seed(1)
    z, noise = (torch.randn(3, 4, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([20, 500, 999])
    a = ALPHAS[t].reshape(-1, 1, 1, 1)
    z_t = a.sqrt() * z + (1 - a).sqrt() * noise
    prediction = noise if kind == schedule.EPSILON else a.sqrt() * noise - (1 - a).sqrt() * z
    assert torch.allclose(schedule.pred_original_sample(z_t, prediction, ALPHAS[t], kind), z)
    assert torch.allclose(schedule.preview_latent(z_t, prediction, t, ALPHAS[t], kind), z, atol=1e-5)


def test_at_the_end_the_preview_is_the_latent_itself():
    """The boundary condition of consistency models; from t = 1 on hardly anything of the latent is added."""
    z_t, prediction = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    t = torch.zeros(2, dtype=torch.long)
    assert torch.equal(schedule.preview_latent(z_t, prediction, t, ALPHAS[t]), z_t)
    c_skip, c_out = schedule.boundary_scaling(torch.tensor([1, 20]))
    assert torch.allclose(c_out, torch.tensor([0.99875, 1.0]), atol=1e-5)
    assert torch.allclose(c_skip, torch.tensor([0.0025, 6e-6]), atol=1e-4)


def test_an_unknown_kind_of_prediction_is_refused():
    with pytest.raises(ValueError, match="'flow'"):
        schedule.pred_original_sample(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), ALPHAS[:1], "flow")


def test_the_paper_s_step_is_the_seventh_of_fifty():
    """At 0.12 of the schedule 44 of 50 steps remain."""
    steps = [float(SIGMAS[round(t)]) for t in torch.linspace(999, 0, 50, dtype=torch.float64).tolist()]
    start = float(SIGMAS[round(999 * (1 - 0.12))])
    assert schedule.chosen_steps(steps, start, 1) == [6]
    assert schedule.chosen_steps(steps, start, 3) == [6, 7, 8]
    assert schedule.chosen_steps(steps[20:], start, 2) == [0, 1]  # img2img begins later
    assert schedule.chosen_steps(steps[:5], start, 1) == []
    assert schedule.chosen_steps(steps, 1e9, 1) == [0]
    assert schedule.chosen_steps([14.6], 7.5, 3, 0.0) == [0] and schedule.chosen_steps([14.6, 9.0], 7.5, 1, 0.0) == [1]
    assert schedule.chosen_steps([14.6, 9.0], 7.5, 1, 8.0) == [] == schedule.chosen_steps([], 7.5, 1, 0.0)


def test_going_back_keeps_the_noise_level():
    g = torch.Generator().manual_seed(2)
    original, noise, fresh = (torch.randn(1, 4, 64, 64, generator=g) for _ in range(3))
    sigma, sigma_next = torch.tensor(5.0), torch.tensor(4.0)
    x = schedule.time_travel(original + sigma * noise, original, sigma, sigma_next, fresh)
    assert float((x - original).std()) == pytest.approx(5.0, rel=0.02)
    assert not torch.allclose(x, original + sigma * noise)


def test_time_travel_of_a_flow_model_keeps_its_noise_level():
    g = torch.Generator().manual_seed(3)
    original, noise, fresh = (torch.randn(64, 4, 16, 16, generator=g) for _ in range(3))
    sigma, sigma_next = torch.tensor(0.8), torch.tensor(0.6)
    x = schedule.time_travel(0.2 * original + 0.8 * noise, original, sigma, sigma_next, fresh, flow=True)
    rest = x - 0.2 * original  # of which 0.3 is the noise of before: 0.6 * 0.2 / 0.4
    assert float(rest.std()) == pytest.approx(0.8, rel=0.01) and float((rest * noise).mean()) == pytest.approx(
        0.3, abs=0.01
    )


def test_between_two_time_steps_the_noise_level_is_that_between_theirs():
    alphas = schedule.alphas_cumprod()
    at = schedule.alpha_bar_at(alphas, torch.tensor([0.0, 500.0, 500.5, 999.0]))
    assert torch.equal(at[[0, 1, 3]], alphas[[0, 500, 999]]) and alphas[501] < at[2] < alphas[500]
    assert torch.allclose(schedule.alpha_bar_of(sigma_between(alphas[500], alphas[501])), at[2])


def sigma_between(*alphas):
    return torch.stack([((1 - a) / a).sqrt().log() for a in alphas]).mean().exp()


def test_what_a_latent_has_of_its_picture_is_its_scale_by_either_rule():
    z_0, noise = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (4, 5)
    )
    sigma = torch.tensor([0.3, 0.8], dtype=torch.float64)
    s = sigma.view(-1, 1, 1, 1)
    for flow, x in ((False, z_0 + s * noise), (True, (1 - s) * z_0 + s * noise)):
        signal = schedule.signal_scale(schedule.alpha_bar_of(sigma, flow), z_0) * z_0
        assert torch.allclose(schedule.to_vp(x, sigma) - schedule.to_vp(s * noise, sigma), signal)
