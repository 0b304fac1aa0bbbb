"""Where a guided step begins in every sampler of the host, and in those of other packs."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.contract

LATENT = (1, 4, 8, 8)
REFUSED = {"uni_pc", "uni_pc_bh2", "sa_solver", "sa_solver_pece", "dpm_adaptive"}


class StandIn:
    """A guider whose model is known: the best denoiser of latents that are noise themselves."""

    cfg = 1.0

    def __init__(self, world):
        self.inner_model, self.model_patcher = world.model.model, world.model
        self.seen = []

    def __call__(self, x, sigma, model_options=None, seed=None):
        self.seen.append(x.clone())
        out = x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)
        for function in (model_options or {}).get("sampler_post_cfg_function", ()):
            function({"denoised": out, "cond_denoised": out, "uncond_denoised": out})
        return out


def all_samplers():
    import comfy.samplers

    return [*comfy.samplers.SAMPLER_NAMES]


def test_what_is_written_at_a_guided_step_is_found_in_the_result_of_every_sampler(mini, pack):
    import comfy.samplers

    module = pack.module("nodes.guidance.guidance_sampler")
    sigmas = comfy.samplers.calculate_sigmas(mini.model.get_model_object("model_sampling"), "normal", 6)
    refused = set()
    for name in all_samplers():
        sampler = comfy.samplers.sampler_object(name)
        results, guided_at = [], []
        for offset in (0.0, 0.5):

            def guide(x, call, step, offset=offset, guided_at=guided_at):
                guided_at.append((float(call.sigma[0]), step))
                x += offset

            settings, model = SimpleNamespace(steps=1), StandIn(mini)
            start = float(sigmas[2])
            guidance = SimpleNamespace(settings=settings, acts=True, live=0)
            run = SimpleNamespace(guidance=guidance, start_sigma=start, guide=guide)
            plain = comfy.samplers.KSAMPLER(
                module._guided_function(sampler.sampler_function, run), sampler.extra_options, sampler.inpaint_options
            )
            noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(1))
            extra = {"model_options": {}, "seed": 5}
            torch.manual_seed(5)
            try:
                results.append(plain.sample(model, sigmas, extra, None, noise, torch.zeros(LATENT), disable_pbar=True))
            except ValueError as error:
                assert f"The sampler {name.replace('uni_pc', 'unipc')}" in str(error) or name.startswith("uni_pc")
                refused.add(name)
                break
        if name in refused:
            continue
        # Once, at the noise level at which the step begins (solvers with steps of their own have their own levels).
        assert len(guided_at) == 2 and guided_at[0] == guided_at[1], name
        assert guided_at[0][0] <= start * 1.001 and (name == "dpm_fast" or guided_at[0][0] > float(sigmas[3])), name
        # An offset of 0.5 in noise of this strength moves the result by this much, times what samplers add.
        moved = (results[1] - results[0]).mean() / (0.5 / (1 + start**2) ** 0.5)
        assert 0.05 < abs(float(moved)) < 20, (name, float(moved))
    assert refused == REFUSED


def test_a_sampler_function_of_another_pack_is_understood_or_refused(mini, pack, tools):
    """One with a corrector whose noise level is that of the next step, and one that works on a copy."""
    steps = pack.module("nodes.guidance.sampler_steps").guided_steps
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])

    def sample_heun_like(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * x.new_ones([len(x)]), **extra_args)
            callback({"x": x, "i": i, "denoised": denoised})
            there = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
            model(there, sigmas[i + 1] * x.new_ones([len(x)]), **extra_args)
            x = there
        return x

    (step,) = steps(sample_heun_like, {}, StandIn(mini), sigmas, 2.0, 1)
    assert (step.number, step.call, step.sigma, step.sigma_next) == (2, 4, 2.0, 1.0)

    def sample_on_a_copy(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def call(x, *args, **kwargs):
            return model(x.clone(), *args, **kwargs)

        return sample_heun_like(call, x, sigmas, extra_args, callback, disable)

    with pytest.raises(ValueError, match="on_a_copy does not go on") as error:
        steps(sample_on_a_copy, {}, StandIn(mini), sigmas, 2.0, 1)
    tools.one_sentence(error)


def test_a_rehearsal_leaves_the_random_numbers_as_they_are(mini, pack):
    import comfy.samplers

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    function = comfy.samplers.sampler_object("euler_ancestral").sampler_function
    model = SimpleNamespace(inner_model=StandIn(mini))
    pack.module("nodes.guidance.sampler_steps").guided_steps(function, {}, model, torch.tensor([4.0, 2.0, 0.0]), 9.0, 1)
    assert torch.equal(torch.rand(3), expected)
