"""Lookahead Shortcut: the few-step LoRA beside the base, plain x0 and a second model, and what the preview is."""

import logging

import guided_cases
import pytest
import torch
from guided_cases import LATENT
from tensors import relative

shortcut, vae = guided_cases.shortcut, guided_cases.vae  # fixtures


def with_all_kinds_of_lora(tools, world, strength=0.7):
    """A LoRA of linear layers, convolutions (also with a middle), time and label embeddings, by the host's loader."""
    import comfy.lora
    import comfy.sd

    names, weights = comfy.lora.model_lora_keys_unet(world.model.model, {}), world.model.model.state_dict()
    g, lora = torch.Generator().manual_seed(9), {}
    for n, (name, key) in enumerate(
        (k, v) for k, v in names.items() if k.startswith("lora_unet") and v in weights and weights[v].ndim > 1
    ):
        if n % 3:
            continue
        shape = weights[key].shape
        inner = (2, *shape[1:])
        if len(shape) == 4 and shape[-1] == 3 and n % 2:
            lora[f"{name}.lora_mid.weight"] = torch.randn(2, 2, 3, 3, generator=g) * 0.3
            inner = (2, shape[1], 1, 1)
        lora[f"{name}.lora_down.weight"] = torch.randn(inner, generator=g) * 0.2
        lora[f"{name}.lora_up.weight"] = torch.randn(shape[0], 2, *[1] * (len(shape) - 2), generator=g) * 0.2
        lora[f"{name}.alpha"] = torch.tensor(1.5)
    return comfy.sd.load_lora_for_models(world.model, None, lora, strength, 0.0)[0]


def inside(pack, tools, model, texts, shortcut, x, sigma, take, **options):
    """Calls take(previewer, call, conditions) from inside a run of the host."""
    import comfy.samplers

    preview = pack.module("nodes.guidance.preview")

    def call_once(model_k, noise, sigmas, extra_args=None, callback=None, disable=None):
        run = preview.Previewer(shortcut, guider, **options)
        run.load([], x, 1.0)
        call = preview.Call(model_k, sigmas[:1].expand(len(x)), extra_args)
        take(run, call, run.conds(noise, None, call))
        run.close()
        return noise

    guider = tools.guider(model, *texts, 3.0)
    sampler = comfy.samplers.KSAMPLER(call_once)
    guider.sample(torch.zeros_like(x), torch.zeros_like(x), sampler, torch.tensor([sigma, 0.0]), seed=1)


def look(pack, tools, world, texts, shortcut, x, sigma, strength, base=None, **options):
    """The preview latent at (x, sigma)."""
    found = []

    def take(run, call, conds):
        with torch.no_grad(), run.installed():
            found.append(run.latent(x, call, conds, strength, grad=False))

    inside(pack, tools, base or world.model, texts, shortcut, x, sigma, take, **options)
    return found[0]


@pytest.mark.contract
def test_the_lora_beside_the_base_is_the_lora_merged_by_the_host(mini, pack, tools, texts, shortcut):
    """For each picture by its own strength; a patch that the base has as well acts once."""
    x = 4 * torch.randn(2, *LATENT[1:])
    merged = with_all_kinds_of_lora(tools, mini)
    expected = tools.denoised(merged, *texts, x, 4.0)
    plain = tools.denoised(mini.model, *texts, x, 4.0)
    assert relative(expected, plain) > 0.05
    one = look(pack, tools, mini, texts, shortcut(merged), x, 4.0, torch.ones(2))
    assert relative(one, expected) < 1e-4
    mixed = look(pack, tools, mini, texts, shortcut(merged), x, 4.0, torch.tensor([1.0, 0.0]))
    assert relative(mixed[:1], expected[:1]) < 1e-4 and relative(mixed[1:], plain[1:]) < 1e-4
    both = tools.with_lora(merged, seed=11)
    again = look(
        pack, tools, mini, texts, shortcut(both), x, 4.0, torch.ones(2), base=tools.with_lora(mini.model, seed=11)
    )
    assert relative(again, tools.denoised(both, *texts, x, 4.0)) < 1e-4


def test_plain_x0_is_what_the_sampled_model_itself_predicts(mini, pack, tools, texts, shortcut):
    x = 4 * torch.randn(LATENT)
    baseline = look(pack, tools, mini, texts, shortcut(kind="plain x0"), x, 4.0, torch.ones(1))
    assert relative(baseline, tools.denoised(mini.model, *texts, x, 4.0)) < 1e-5


@pytest.mark.parametrize(
    ("strengths", "kept"),
    [((1.0, 0.3), 2**28), ((0.6, 0.6), 2**28), ((0.6, 0.6), 0)],
    ids=["each its own", "one for all", "one for all, folded again"],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_gradient_beside_the_base_is_that_of_the_lora_merged_by_the_host(
    mini, pack, tools, texts, shortcut, monkeypatch, checkpointed, strengths, kept
):
    """Through a LoRA of all kinds of layers, beside them for each picture by its own strength, or folded into the
    weights where all have one; also where blocks are computed twice, and where no folded weight is kept."""
    gradients, bypass = (pack.module(f"nodes.guidance.{name}") for name in ("autograd", "lora_bypass"))
    folds, fold = [], bypass.Bypass.add_to
    monkeypatch.setattr(bypass, "KEPT_BYTES", kept)
    monkeypatch.setattr(bypass.Bypass, "add_to", lambda *given: folds.append(1) or fold(*given))
    x = 4 * torch.randn(2, *LATENT[1:], generator=torch.Generator().manual_seed(3))

    def slope(latent, leaf):
        return torch.autograd.grad(latent.square().sum(), leaf)[0]

    def found(x, sigma, shortcut, strength, base, what):
        out = []

        def take(run, call, conds):
            checkpointing = gradients.Checkpointing(enabled=checkpointed)
            with torch.inference_mode(False), torch.enable_grad(), run.installed(checkpointing):
                leaf = x.clone().requires_grad_()
                call.sigma = call.sigma.clone()
                latent = what(run.latent(leaf, call, conds, strength.clone(), grad=True), leaf, call)
                out.append(slope(latent, leaf))

        inside(pack, tools, base, texts, shortcut, x, sigma, take)
        return out[0]

    merged = with_all_kinds_of_lora(tools, mini)
    ours = found(x, 4.0, shortcut(merged), torch.tensor(strengths), mini.model, lambda latent, *_: latent)
    layers = len(folds) / (1 + (not kept) + checkpointed)  # in forward; again in backward; and where it is run again
    assert layers == 0 if strengths[0] != strengths[1] else layers > 3
    for row, strength in enumerate(strengths):
        of_host = with_all_kinds_of_lora(tools, mini, 0.7 * strength)

        def preview(original, leaf, call, model=of_host):
            z = leaf / (call.sigma.reshape(-1, 1, 1, 1) ** 2 + 1).sqrt()
            t = model.get_model_object("model_sampling").timestep(call.sigma)
            return pack.module("lookahead.method.schedule").consistency_output(original, z, t)

        x0 = shortcut(of_host, kind="plain x0")
        expected = found(x[row : row + 1], 4.0, x0, torch.ones(1), of_host, preview)
        assert relative(ours[row : row + 1], expected) < 1e-4
    other = found(x, 4.0, shortcut(merged), torch.full((2,), 0.9), mini.model, lambda latent, *_: latent)
    assert relative(other[1:], ours[1:]) > 0.01  # the strength matters


def test_guidance_of_the_preview_and_its_own_positive(mini, pack, tools, texts, shortcut):
    x, of = 4 * torch.randn(LATENT), shortcut(kind="plain x0")
    guided = look(pack, tools, mini, texts, of, x, 4.0, torch.ones(1), cfg=3.0)
    assert relative(guided, tools.denoised(mini.model, *texts, x, 4.0, cfg=3.0)) < 1e-5
    own = look(pack, tools, mini, texts, of, x, 4.0, torch.ones(1), positive=mini.text(5))
    assert relative(own, tools.denoised(mini.model, mini.text(5), texts[1], x, 4.0)) < 1e-5


@pytest.mark.contract
def test_a_distilled_checkpoint_is_a_second_model(mini, pack, tools, texts, shortcut, caplog):
    other = tools.make_model(mini)
    with torch.no_grad():
        for parameter in other.model.diffusion_model.parameters():
            parameter *= 1.01
    x = 4 * torch.randn(LATENT)
    with caplog.at_level(logging.INFO):
        found = look(pack, tools, mini, texts, shortcut(other), x, 4.0, torch.ones(1))
    assert relative(found, tools.denoised(other, *texts, x, 4.0)) < 1e-5 and "second model" in caplog.text


@pytest.mark.contract
def test_other_patches_than_lora_are_refused(mini, pack, tools, texts, shortcut):
    key = next(k for k in mini.model.model.state_dict() if k.endswith("attn1.to_v.weight"))
    model = mini.model.clone()
    model.add_patches({key: ("diff", (torch.zeros_like(mini.model.model.state_dict()[key]),))}, 1.0)
    with pytest.raises(ValueError, match="of the kind diff") as error:
        look(pack, tools, mini, texts, shortcut(model), torch.randn(LATENT), 4.0, torch.ones(1))
    tools.one_sentence(error)
