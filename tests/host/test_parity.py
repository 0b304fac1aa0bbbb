"""The image prompt in the host against diffusers' own IP-Adapter Plus: same weights, latents, text and tokens."""

import copy
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stock_files import halves
from tensors import relative

SIGMA_STEP = 601


def load_ip_adapter(unet, weights):
    """diffusers' own loader of IP-Adapter weights."""
    unet._load_ip_adapter_weights([halves(weights)], low_cpu_mem_usage=False)


@pytest.fixture(params=["mini", "sdxl"])
def world(request, worlds):
    return worlds(request.param)


@pytest.fixture(scope="module")
def unets(worlds, tools):
    """`unets(kind, prompted)`: diffusers' UNet with a world's weights, and with its image prompt where `prompted`."""

    @functools.cache
    def of(kind: str, prompted: bool):
        if not prompted:
            return tools.diffusers_unet(worlds(kind))
        unet = copy.deepcopy(of(kind, False))
        with torch.inference_mode(False):
            load_ip_adapter(unet, worlds(kind).encoder)
        return unet

    return of


@pytest.fixture
def case(world, unets, tools):
    """The same question put to both: (noise prediction of the host, of diffusers) as functions."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 16, 16, generator=g)
    image = tools.picture(1)
    text = world.text(11, width=128, height=128)
    sampling = world.model.get_model_object("model_sampling")
    sigma = float(sampling.sigmas[SIGMA_STEP])

    def in_host(model):
        return (x * sigma - tools.denoised(model, text, text, x * sigma, sigma)) / sigma

    def in_diffusers(weight=None):
        """With the world's image prompt at a weight, or without any."""
        from comfy.clip_model import clip_preprocess

        unet = unets("sdxl" if world.middle == 10 else "mini", weight is not None)
        added = {"text_embeds": text[0][1]["pooled_output"].expand(2, -1)}
        added["time_ids"] = torch.tensor([[128.0, 128, 0, 0, 128, 128]]).expand(2, -1)
        if weight is not None:
            for processor in unet.attn_processors.values():
                if hasattr(processor, "scale"):
                    processor.scale = [weight]
            clip = world.clip_vision
            pixels = clip_preprocess(image, size=clip.image_size, mean=clip.image_mean, std=clip.image_std)
            features = clip.model(pixel_values=pixels, intermediate_output=-2)[1]
            added["image_embeds"] = [features.unsqueeze(1).expand(2, -1, -1, -1)]
        scaled = x * sigma / (sigma**2 + 1) ** 0.5
        context = text[0][0].expand(2, -1, -1)
        return unet(scaled, SIGMA_STEP, encoder_hidden_states=context, added_cond_kwargs=added).sample

    return in_host, in_diffusers, image


@pytest.mark.contract
def test_plain_model_agrees_with_diffusers(case, world):
    in_host, in_diffusers, _ = case
    assert relative(in_host(world.model), in_diffusers()) < 1e-4


@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_image_prompt_agrees_with_diffusers_ip_adapter_plus(case, world, tools, weight):
    in_host, in_diffusers, image = case
    reference = tools.reference(world, image)
    with_prompt = in_host(tools.apply(world.model, reference, weight=weight))
    expected = in_diffusers(weight)
    print("relative rms difference", relative(with_prompt, expected))
    assert relative(with_prompt, expected) < 1e-4
    assert relative(with_prompt, in_host(world.model)) > 1e-2  # the image prompt does something here


def test_parity_notices_swapped_keys_and_values_and_a_skipped_block(case, world, tools):
    """The comparison above is sharp enough: each of these mistakes fails it."""
    in_host, in_diffusers, image = case
    expected = in_diffusers(1.0)
    count = world.count()

    def mistaken(weights):
        world_with = type(world)(**{**vars(world), "encoder": weights})
        return in_host(tools.apply(world.model, tools.reference(world_with, image)))

    swapped = {
        k.replace("to_k_ip", "*").replace("to_v_ip", "to_k_ip").replace("*", "to_v_ip"): v
        for k, v in world.encoder.items()
    }
    assert relative(mistaken(swapped), expected) > 1e-3
    last = f"ip_adapter.{2 * count - 1}.to_v_ip.weight"  # the last block of the middle
    assert relative(mistaken({**world.encoder, last: torch.zeros_like(world.encoder[last])}), expected) > 1e-3


@pytest.mark.contract
def test_the_public_files_fit_the_real_sdxl(tools, pack):
    """Full-size shapes on the meta device: the host's SDXL and its CLIP ViT-H against the public Plus files."""
    import comfy.clip_vision
    import comfy.model_base
    import comfy.supported_models

    config = comfy.supported_models.SDXL({**tools.unet_config([320, 640, 1280], [0, 2, 10], 10, 2048, 1280, 64)})
    model = SimpleNamespace(model=comfy.model_base.SDXL(config, device="meta"))
    model.get_model_object = lambda name: getattr(model.model, name)
    found = pack.module("nodes.conditioning.unet_blocks").cross_attentions(model)
    assert [a.width for a in found] == [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10
    assert {a.context_width for a in found} == {2048}
    names = pack.module("lookahead.files.block_names").block_names()
    assert [a.key for a in found] == [n.host for n in names]
    vision = json.loads((Path(comfy.clip_vision.__file__).parent / "clip_vision_config_h.json").read_text())
    assert vision["hidden_size"] == pack.module("lookahead.method.resampler").ResamplerSizes().image_width


@pytest.mark.contract
def test_every_cross_attention_is_called(world, tools, pack, monkeypatch):
    patch = pack.module("nodes.conditioning.cross_attention")
    called = []
    attend = patch.PromptRows.attend

    def counting(self, q, key, extra, attention):
        assert key == (*extra["block"], extra["block_index"])
        called.append(key)
        return attend(self, q, key, extra, attention)

    monkeypatch.setattr(patch.PromptRows, "attend", counting)
    model = tools.apply(world.model, tools.reference(world, tools.picture(1)))
    tools.denoised(model, world.text(1), world.text(2), torch.randn(1, 4, 16, 16), 5.0, cfg=1.0)
    assert len(called) == len(set(called)) == (70 if world.middle == 10 else 17)
