"""The noise schedule, equation 3 of the paper and the choice of steps."""

import pytest
import torch
from lcm_lookahead.lookahead.method import schedule

ALPHAS = schedule.alphas_cumprod()
SIGMAS = schedule.sigma_of(ALPHAS)


def test_it_is_the_schedule_of_sdxl():
    """Figures of SDXL's scheduler as diffusers has it."""
    assert ALPHAS.shape == (1000,)
    assert float(SIGMAS[0]) == pytest.approx(0.0292, abs=1e-4)
    assert float(SIGMAS[-1]) == pytest.approx(14.6146, abs=1e-3)
    assert float(SIGMAS[861]) == pytest.approx(6.84, abs=0.01)  # the paper's step
    assert float(ALPHAS[861].rsqrt()) == pytest.approx(6.91, abs=0.01)  # how much the preview amplifies


def test_timesteps_and_noise_levels_are_inverse():
    t = torch.tensor([0.0, 0.25, 17.5, 861.0, 998.9, 999.0], dtype=torch.float64)
    assert torch.allclose(schedule.timestep_of(schedule.sigma_at(t, SIGMAS), SIGMAS), t, atol=1e-6)
    assert torch.allclose(schedule.sigma_at(torch.tensor(861.0), SIGMAS), SIGMAS[861])
    assert torch.allclose(schedule.alpha_bar_of(SIGMAS), ALPHAS)
    ends = schedule.timestep_of(torch.tensor([1e-3, 100.0], dtype=torch.float64), SIGMAS)
    assert ends.tolist() == [0.0, 999.0]


@pytest.mark.parametrize("kind", [schedule.EPSILON, schedule.V_PREDICTION])
def test_a_perfect_prediction_gives_the_original(kind):
    g = torch.Generator().manual_seed(1)
    z, noise = (torch.randn(3, 4, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([20, 500, 999])
    a = ALPHAS[t].reshape(-1, 1, 1, 1)
    z_t = a.sqrt() * z + (1 - a).sqrt() * noise
    prediction = noise if kind == schedule.EPSILON else a.sqrt() * noise - (1 - a).sqrt() * z
    assert torch.allclose(schedule.predicted_original(z_t, prediction, ALPHAS[t], kind), z)
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
        schedule.predicted_original(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), ALPHAS[:1], "flow")


def test_the_paper_s_step_is_the_seventh_of_fifty():
    """At 0.12 of the schedule 44 of 50 steps remain."""
    steps = [float(schedule.sigma_at(t, SIGMAS)) for t in torch.linspace(999, 0, 50, dtype=torch.float64)]
    start = float(schedule.sigma_at(torch.tensor(999 * (1 - 0.12)), SIGMAS))
    assert schedule.chosen_steps(steps, start, 1) == [6]
    assert schedule.chosen_steps(steps, start, 3) == [6, 7, 8]
    assert schedule.chosen_steps(steps[20:], start, 2) == [0, 1]  # img2img begins later
    assert schedule.chosen_steps(steps[:5], start, 1) == []
    assert schedule.chosen_steps(steps, 1e9, 1) == [0]
