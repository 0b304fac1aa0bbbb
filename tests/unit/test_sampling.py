"""Samplers against diffusers' schedulers, with a prediction that is not linear."""

import diffusers
import pytest
import torch
from lcm_lookahead.lookahead.method.sampling import ddim_timesteps, sample_ddim, sample_lcm
from lcm_lookahead.lookahead.method.schedule import alphas_cumprod

ALPHA_BAR = alphas_cumprod().float()
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def predict(x, t):
    return torch.tanh(x) * (0.5 + t.view(-1, 1, 1, 1) / 2000)


@pytest.fixture
def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_ddim_draws_what_diffusers_draws(noise, steps):
    theirs = diffusers.DDIMScheduler(**SDXL, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    theirs.set_timesteps(steps)
    assert ddim_timesteps(steps) == theirs.timesteps.tolist()
    x = noise
    for t in theirs.timesteps:
        x = theirs.step(predict(x, t.expand(2)), t, x).prev_sample
    assert torch.allclose(sample_ddim(predict, noise, ddim_timesteps(steps), ALPHA_BAR), x, atol=1e-4)


def test_few_steps_draw_what_the_consistency_sampler_of_diffusers_draws(noise):
    theirs = diffusers.LCMScheduler(**SDXL, clip_sample=False, set_alpha_to_one=False)
    theirs.set_timesteps(4)
    x, numbers = noise, torch.Generator().manual_seed(2)
    for t in theirs.timesteps:
        x = theirs.step(predict(x, t.expand(2)), t, x, generator=numbers).prev_sample
    numbers = torch.Generator().manual_seed(2)
    found = sample_lcm(
        predict, noise, theirs.timesteps.tolist(), ALPHA_BAR, lambda z: torch.randn(z.shape, generator=numbers)
    )
    assert torch.allclose(found, x, atol=1e-4)


@pytest.mark.parametrize("sampler", [sample_ddim, sample_lcm])
def test_a_callback_sees_every_step_and_changes_nothing(noise, sampler):
    seen = []
    numbers = [torch.Generator().manual_seed(3) for _ in range(2)]
    options = [
        {"noise": lambda z, g=g: torch.randn(z.shape, generator=g)} if sampler is sample_lcm else {} for g in numbers
    ]
    steps = [900, 500, 100]
    plain = sampler(predict, noise, steps, ALPHA_BAR, **options[0])
    assert torch.equal(sampler(predict, noise, steps, ALPHA_BAR, **options[1], callback=seen.append), plain)
    assert [(now["i"], now["t"].tolist()) for now in seen] == [(i, [t, t]) for i, t in enumerate(steps)]
    assert torch.equal(seen[0]["x"], noise) and all(torch.equal(s["e"], predict(s["x"], s["t"])) for s in seen)
