"""One UNet in three roles: the same numbers and gradients as three UNets, also where checkpointing repeats a pass."""

import copy

import kv_oracle as oracle
import pytest
import torch
from lcm_lookahead.lookahead.method.resampler import ResamplerSizes
from lcm_lookahead.mini.plan import CONTEXT, SIZES
from lcm_lookahead.mini.stages import base
from lcm_lookahead.sdxl import lora
from lcm_lookahead.sdxl.encoder import Encoder
from lcm_lookahead.sdxl.shared_unet import CHECKPOINTING, Condition, SharedUNet

RESAMPLER = ResamplerSizes(4, 64, 1, 1, 32, CONTEXT, 64)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return base.build_unet().eval().requires_grad_(False)


@pytest.fixture
def encoder(unet):
    """With random weights everywhere: a new KV encoder has zeros, which would hide what is not connected."""
    torch.manual_seed(1)
    made = Encoder(unet, RESAMPLER, kv_rank=2, export_rank=3)
    made.kv.copy_from({k: torch.randn_like(v) * 0.05 for k, v in made.kv.tensors().items()})
    return made


@pytest.fixture
def shortcut(unet):
    torch.manual_seed(2)
    made = lora.build(unet, 3, conv_rank=2).requires_grad_(False)
    for branch in made.branches:
        branch.lora_up.weight.normal_(std=0.05)
    return made


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(3)
    x, z_c = torch.randn(2, 3, 4, 16, 16, generator=g)
    time_ids = torch.tensor([128.0, 128, 0, 0, 128, 128]).expand(3, 6)
    width = SIZES["text"]["width_g"]
    texts = [
        Condition(torch.randn(3, 77, CONTEXT, generator=g), torch.randn(3, width, generator=g), time_ids)
        for _ in range(2)
    ]
    return {
        "x": x,
        "z_c": z_c,
        "t": torch.tensor([20, 500, 930]),
        "text": texts[0],
        "own_text": texts[1],
        "features": torch.randn(3, 5, 32, generator=g),
        "absent": torch.tensor([False, True, False]),
        "alpha": torch.tensor([1.0, 0.3, 0.0]),
    }


def all_roles(encoding, decoding, short, encoder, i):
    """Every role once, entangled as in training: (gradients of all that is trained, previews)."""
    encoder.zero_grad(set_to_none=True)
    kv = encoding.export(i["z_c"], i["t"], i["own_text"])
    prompt = encoder.image_prompt(encoder.image_proj(i["features"]))
    common = (i["x"], i["t"], i["text"], prompt, kv, i["absent"])
    decoded, fast = decoding.predict(*common), short.predict(*common, shortcut=i["alpha"])
    (decoded.square().mean() + (fast * decoded).mean()).backward()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in encoder.named_parameters()}
    return gradients, decoded.detach(), fast.detach()


def three_unets(unet, encoder, shortcut):
    return [
        SharedUNet(copied, encoder, lora.load(lora.public_tensors(shortcut), copied)).inject()
        for copied in (copy.deepcopy(unet) for _ in range(3))
    ]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_one_unet_in_three_roles_is_bitwise_three_unets(unet, encoder, shortcut, inputs, checkpointing):
    expected = all_roles(*three_unets(unet, encoder, shortcut), encoder, inputs)
    one = SharedUNet(unet, encoder, shortcut).inject(checkpointing)
    found = all_roles(one, one, one, encoder, inputs)
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])
    for name, gradient in expected[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        assert torch.equal(found[0][name], gradient), name


def test_the_public_switching_calls_lose_gradients_where_ours_keep_them(inputs):
    """peft's set_adapter before backward: no error, and nothing reaches the encoder. Why roles are ours."""
    from peft import LoraConfig

    torch.manual_seed(0)
    unet = base.build_unet().eval().requires_grad_(False)
    for name in ("encoder", "shortcut"):
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), adapter_name=name)

    def predict(name, x):
        unet.set_adapter(name)
        text = inputs["text"]
        added = {"text_embeds": text.pooled, "time_ids": text.time_ids}
        return unet(x, inputs["t"], text.context, added_cond_kwargs=added).sample

    trained = [p for n, p in unet.named_parameters() if ".encoder." in n]
    predict("shortcut", predict("encoder", inputs["x"])).square().mean().backward()
    assert trained and all(p.grad is None for p in trained)


def test_keys_and_values_and_predictions_are_those_of_the_plain_reference(unet, encoder, shortcut, inputs):
    i, plain = inputs, copy.deepcopy(unet)
    roles = SharedUNet(unet, encoder, shortcut).inject("blocks")
    kv = roles.export(i["z_c"], i["t"], i["own_text"])
    stored = {k: v.detach() for k, v in encoder.kv.tensors().items()}
    own, text = ((c.context, c.pooled, c.time_ids) for c in (i["own_text"], i["text"]))
    expected = oracle.export(plain, i["z_c"], i["t"], *own, stored)
    assert kv.keys() == expected.keys() and len(kv) == len(encoder.paths)
    for path, pair in expected.items():
        for a, b in zip(kv[path], pair, strict=True):
            assert torch.allclose(a, b, atol=1e-4), path
    tokens = encoder.image_proj(i["features"])
    prompt = encoder.all_keys_values(tokens)
    for scale in (1.0, 0.4):
        predicted = oracle.predict(plain, i["x"], i["t"], *text, kv, prompt, scale)
        for read in (encoder.image_prompt(tokens), prompt.__getitem__):
            found = roles.predict(i["x"], i["t"], i["text"], read, kv, image_prompt_scale=scale)
            assert torch.allclose(found, predicted, atol=1e-4)


def test_samples_without_reference_are_plain_and_strength_0_is_the_decoder(unet, encoder, shortcut, inputs):
    i = inputs
    roles = SharedUNet(unet, encoder, shortcut).inject()
    with torch.no_grad():
        kv = roles.export(i["z_c"], i["t"], i["own_text"])
        plain = roles.predict(i["x"], i["t"], i["text"])
        mixed = roles.predict(i["x"], i["t"], i["text"], kv=kv, absent=i["absent"])
        fast = roles.predict(i["x"], i["t"], i["text"], shortcut=i["alpha"])
    changed = (mixed - plain).abs().amax((1, 2, 3))
    assert changed[1] < 1e-5 and changed[0] > 1e-3 and changed[2] > 1e-3
    changed = (fast - plain).abs().amax((1, 2, 3))
    assert changed[2] < 1e-5 and changed[0] > changed[1] > 1e-3


def test_a_new_kv_encoder_exports_the_base_s_own_keys_and_values(unet, inputs):
    plain, i = copy.deepcopy(unet), inputs
    with torch.no_grad():
        kv = SharedUNet(unet, Encoder(unet, RESAMPLER)).inject().export(i["z_c"], i["t"], i["own_text"])
        text = i["own_text"]
        expected = oracle.export(plain, i["z_c"], i["t"], text.context, text.pooled, text.time_ids, {})
    assert all(torch.allclose(a, b, atol=1e-4) for p in kv for a, b in zip(kv[p], expected[p], strict=True))


def test_the_export_stops_after_the_last_attention(unet, encoder, inputs):
    roles = SharedUNet(unet, encoder).inject()
    for late in (unet.conv_out, unet.up_blocks[-1].resnets[0].conv1):
        late.register_forward_hook(lambda *_: pytest.fail("the tail of the UNet ran"))
    with torch.no_grad():
        roles.export(inputs["z_c"], inputs["t"], inputs["own_text"])


def test_ejecting_restores_the_model_bit_for_bit(unet, encoder, shortcut, inputs):
    i, text = inputs, inputs["text"]

    def predict():
        added = {"text_embeds": text.pooled, "time_ids": text.time_ids}
        return unet(i["x"], i["t"], text.context, added_cond_kwargs=added).sample

    def hooks():
        return {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in unet.named_modules()}

    def attributes():
        return {n: {k: v for k, v in vars(m).items() if "checkpointing" in k} for n, m in unet.named_modules()}

    before = ({k: v.clone() for k, v in unet.state_dict().items()}, unet.attn_processors, hooks(), attributes())
    with torch.no_grad():
        picture = predict()
    roles = SharedUNet(unet, encoder, shortcut).inject("all")
    all_roles(roles, roles, roles, encoder, i)
    assert roles.eject() is unet
    assert unet.attn_processors == before[1] and hooks() == before[2] and attributes() == before[3]
    assert unet.state_dict().keys() == before[0].keys()
    assert all(torch.equal(v, before[0][k]) for k, v in unet.state_dict().items())
    assert all(p.grad is None for p in unet.parameters())
    with torch.no_grad():
        assert torch.equal(predict(), picture)
