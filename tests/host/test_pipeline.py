"""The diffusers pipeline against the oracle, the nodes in the real host, and diffusers' own IP-Adapter pipeline."""

import copy
from pathlib import Path

import kv_cases
import kv_oracle as oracle
import pytest
import torch
from kv_cases import BOUND, GUIDED_BOUND, SCALES, STEPS, flat, scheduler, worst
from tensors import randn, relative
from worlds import SIZES

encoder_of, host = kv_cases.encoder_of, kv_cases.host  # fixtures
OWN_FORMAT = {"format": "lcm-lookahead-encoder", "format_version": "1", "kv_rank": "4", "size": "96"}
SIDE = 12  # of latents, of reference and picture


@pytest.fixture(scope="module")
def cases(worlds, tools):
    """`cases("mini")` and `cases("sdxl")`, each built once; with random weights both."""
    built = {}

    def case(kind: str):
        if kind not in built:
            with torch.inference_mode():
                world = worlds(kind)
                unet, image = tools.diffusers_unet(world), tools.picture(1)
                tokens = kv_cases.image_tokens(unet, world, image)
                lora = oracle.random_lora(unet, seed=31)
                built[kind] = kv_cases.Case(world, unet, lora, *tokens, kv_cases.SIZES[kind], image)
        return built[kind]

    return case


def image_encoder_of(world):
    """transformers' model with the weights of the host's."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**SIZES["clip_vision"])
    model = CLIPVisionModelWithProjection(config)
    weights = world.clip_vision.get_sd()
    ours = {k.removeprefix("vision_model."): k for k in model.state_dict()}
    found = {ours[k.removeprefix("vision_model.")]: v.clone() for k, v in weights.items() if "position_ids" not in k}
    assert found.keys() == {k for k in model.state_dict() if "position_ids" not in k}
    model.load_state_dict(found, strict=False)
    return model.eval().requires_grad_(False)


def components(case, full=False) -> dict:
    """A pipeline's parts; full: with random text encoders and VAE, narrow."""
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    with torch.inference_mode(False):
        parts = dict.fromkeys(names)
        parts |= {"unet": copy.deepcopy(case.unet), "scheduler": scheduler()}
        parts["image_encoder"] = image_encoder_of(case.world)
        if full:
            parts |= random_parts(case.world)
    return parts


def random_parts(world) -> dict:
    import comfy.sd1_clip
    import diffusers
    import transformers

    torch.manual_seed(51)
    wide = world.context // 2
    config = transformers.CLIPTextConfig(
        hidden_size=wide, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, projection_dim=world.pooled
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8] * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.13025,
    )
    words = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(words, model_max_length=77)
    return {
        "text_encoder": transformers.CLIPTextModel(config).eval(),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(config).eval(),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "vae": vae.eval(),
    }


def file_of(pack, case):
    metadata = OWN_FORMAT | ({} if case.alpha is None else {"kv_alpha": str(case.alpha)})
    return pack.module("lookahead.files.encoder_file").from_tensors(
        case.world.encoder | case.lora, metadata, "mine.safetensors"
    )


@pytest.fixture(scope="module")
def module(pack):
    return pack.module("sdxl.pipeline")


@pytest.fixture(scope="module")
def pipelines(pack, module, cases):
    """`pipelines("mini")`: a pipeline with encoder, for questions about single steps."""
    made = {}

    def of(kind: str):
        if kind not in made:
            made[kind] = module.LookaheadPipeline(**components(cases(kind)))
            made[kind].load_encoder(file_of(pack, cases(kind)))
        return made[kind]

    return of


class Asked:
    """A case's questions put to the pipeline."""

    def __init__(self, module, pipe, case):
        self.module, self.pipe, self.case = module, pipe, case
        prompts = [oracle.image_prompt(case.unet, case.world.encoder, t) for t in (case.tokens, case.null_tokens)]
        latents = case.vae.latents * kv_cases.LATENT_SCALE
        self.reference = module.EncodedReference(*prompts, latents, self.text(case.kv_prompt))

    def text(self, conditioning):
        (context, extra), *_ = conditioning
        return self.module.Text(context, extra["pooled_output"])

    def kv(self, n: int, conditional: bool):
        noise = self.case.reference_noise
        return self.pipe.reference_kv(self.reference, noise, torch.tensor(STEPS[n]), conditional)

    def guided(self, n: int, scales, with_kv=True):
        case = self.case
        x, t, *_ = case.asked_of_picture(n, case.positive)
        kv = [self.kv(n, conditional) for conditional in (True, False)] if with_kv else [None, None]
        texts = self.text(case.positive), self.text(case.negative)
        return self.pipe.predict_noise(x, t, *texts, self.reference, *kv, self.module.Scales(*scales))


@pytest.fixture(params=["mini", "sdxl"])
def asked(request, module, pipelines, cases) -> Asked:
    return Asked(module, pipelines(request.param), cases(request.param))


# --- single steps


def test_exported_keys_and_values_agree_with_the_oracle(asked):
    for n in range(len(STEPS)):
        for conditional, expected in zip((True, False), asked.case.both(n), strict=True):
            assert worst(flat(asked.kv(n, conditional)), flat(expected)) < BOUND


def test_guided_predictions_agree_with_the_oracle_and_with_the_nodes(asked, host):
    case, nodes = asked.case, host(asked.case)
    in_host = {scales: nodes.guided(scales) for scales in SCALES}
    for n in range(len(STEPS)):
        four = case.expected(n, case.both(n))
        for scales in SCALES:
            found, expected = asked.guided(n, scales), oracle.guided(**four, **kv_cases.named(scales))
            print(f"oracle {relative(found, expected):.1e}, nodes {relative(found, in_host[scales][n]):.1e}")
            assert relative(found, expected) < GUIDED_BOUND
            assert relative(found, in_host[scales][n]) < GUIDED_BOUND
        assert relative(found, asked.guided(n, scales, with_kv=False)) > 100 * GUIDED_BOUND


def test_without_kv_it_is_plain_guidance_at_text_and_full(asked):
    case = asked.case
    uncond, cond = case.predict(0, False), case.predict(0, True)
    expected = uncond + 5.0 * (cond - uncond)
    assert relative(asked.guided(0, (3.0, 2.0, 2.0), with_kv=False), expected) < GUIDED_BOUND


@pytest.mark.parametrize("missing", ["kv", "null_kv"])
def test_a_prediction_without_the_keys_and_values_that_its_scale_needs_is_refused(asked, missing):
    case, kv = asked.case, asked.kv(0, True)
    x, t, *_ = case.asked_of_picture(0, case.positive)
    texts = asked.text(case.positive), asked.text(case.negative)
    given = {"kv": kv, "null_kv": kv, missing: None}
    with pytest.raises(ValueError, match="Only some of the predictions"):
        asked.pipe.predict_noise(x, t, *texts, asked.reference, **given, scales=asked.module.Scales(3.0, 2.0, 2.0))
    alone = asked.module.Scales(3.0, 2.0, 0.0) if missing == "null_kv" else asked.module.Scales(3.0, 0.0, 2.0)
    asked.pipe.predict_noise(x, t, *texts, asked.reference, **given, scales=alone)


def test_an_alpha_in_the_file_scales_the_low_rank_weights(pack, module, cases):
    import dataclasses

    case = dataclasses.replace(cases("mini"), alpha=2.0)
    pipe = module.LookaheadPipeline(**components(case))
    pipe.load_encoder(file_of(pack, case))
    found = flat(Asked(module, pipe, case).kv(0, True))
    assert worst(found, flat(case.export(0, case.kv_prompt))) < BOUND
    assert worst(found, flat(cases("mini").export(0, case.kv_prompt))) > 10 * BOUND


@pytest.mark.parametrize("size", [(96, 96), (150, 110)])
def test_the_image_prompt_of_a_picture_is_that_of_the_node(pipelines, cases, tools, size):
    case, pipe = cases("mini"), pipelines("mini")
    picture = tools.picture(4, height=size[0], width=size[1])
    tokens = kv_cases.image_tokens(case.unet, case.world, picture)
    for found, each in zip(pipe.encode_image_prompt(picture), tokens, strict=True):
        assert worst(flat(found), flat(oracle.image_prompt(case.unet, case.world.encoder, each))) < BOUND


# --- whole runs


@pytest.fixture(scope="module")
def full(pack, module, cases):
    """A whole pipeline with an encoder, and what it was made of."""
    with torch.inference_mode():
        pipe = module.LookaheadPipeline(**components(cases("mini"), full=True))
        pipe.load_encoder(file_of(pack, cases("mini")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def draw(full, cases):
    """draw(prompt, ...): latents after three steps, from one noise."""

    image = cases("mini").image

    def run(prompt="a drawing", reference=image, **options):
        noise = randn(1, 4, SIDE, SIDE, seed=61)
        side = 8 * SIDE
        options = {"latents": noise, "height": side, "width": side, "num_inference_steps": 3} | options
        return full(prompt, reference, output_type="latent", **options)

    return run


def test_pictures_of_a_seed_come_again(full, cases):
    def once(seed, kind="pil", **options):
        g = torch.Generator().manual_seed(seed)
        options = {"height": 96, "width": 128, "num_inference_steps": 2, "generator": g} | options
        return full("a drawing", cases("mini").image, output_type=kind, **options).images

    assert once(1)[0].size == (128, 96)
    assert torch.equal(once(1, "pt"), once(1, "pt")) and not torch.equal(once(1, "pt"), once(2, "pt"))


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_without_kv_it_draws_what_diffusers_own_ip_adapter_pipeline_draws(full, draw, pack, cases, tmp_path, kind):
    """Whose `load_ip_adapter` reads the encoder file itself: the image prompt's half is in the public layout."""
    import diffusers

    case = cases("mini")
    file = file_of(pack, case)
    path = tmp_path / "mine.safetensors"
    pack.module("lookahead.files.encoder_file").write(path, file.image_proj, file.ip_adapter, {}, file.kv)
    parts = {**full.components, "unet": copy.deepcopy(case.unet), "scheduler": scheduler(kind)}
    with torch.inference_mode(False):
        theirs = diffusers.StableDiffusionXLPipeline(**parts)
        theirs.load_ip_adapter(str(tmp_path), subfolder="", weight_name=path.name, image_encoder_folder=None)
        theirs.set_ip_adapter_scale(0.7)
    theirs.set_progress_bar_config(disable=True)
    from comfy.clip_model import clip_preprocess

    pixels = clip_preprocess(case.image, size=full.image_encoder.config.image_size)
    features = [full.image_encoder(p, output_hidden_states=True).hidden_states[-2] for p in (pixels * 0, pixels)]
    noise = randn(1, 4, SIDE, SIDE, seed=61)
    expected = theirs(
        "a drawing",
        negative_prompt="bad",
        guidance_scale=5.0,
        ip_adapter_image_embeds=[torch.stack(features)],
        latents=noise,
        height=96,
        width=96,
        num_inference_steps=3,
        output_type="latent",
    ).images
    before, full.scheduler = full.scheduler, scheduler(kind)
    try:
        options = {"use_kv": False, "image_prompt_scale": 0.7, "negative_prompt": "bad"}
        found = draw(**options).images
        assert relative(found, expected) < GUIDED_BOUND
        assert relative(draw(**{**options, "image_prompt_scale": 0.0}).images, expected) > 100 * GUIDED_BOUND
    finally:
        full.scheduler = before


def test_replayed_kv_draws_the_same_without_a_reference_pass(full, draw, monkeypatch):
    first = draw(keep_kv=True)
    other = draw("a stone statue").images
    assert len(first.kv.steps) == 3 and not torch.equal(first.images, other)

    def never(*_, **__):
        raise AssertionError("a reference pass")

    monkeypatch.setattr(full, "reference_kv", never)
    assert torch.equal(draw(replay=first.kv, reference=None).images, first.images)
    assert torch.equal(draw("a stone statue", replay=first.kv).images, other)


def test_kv_to_replay_that_does_not_fit_is_refused(draw, tools):
    kept = draw(keep_kv=True, scales=(3.0, 2.0, 0.0)).kv
    with pytest.raises(ValueError, match="not the 2 of this run") as error:
        draw(replay=kept, num_inference_steps=2, scales=(3.0, 2.0, 0.0))
    tools.one_sentence(error)
    with pytest.raises(ValueError, match="scale kv was 0") as error:
        draw(replay=kept)
    tools.one_sentence(error)


def test_each_picture_of_a_batch_is_that_of_its_own_noise(draw):
    noise = randn(2, 4, SIDE, SIDE, seed=62)
    both = draw(latents=noise, num_images_per_prompt=2).images
    for n in range(2):
        assert relative(both[n : n + 1], draw(latents=noise[n : n + 1]).images) < BOUND


def test_with_scales_that_add_up_to_one_only_the_full_prediction_is_made(full, draw):
    """As few-step models are sampled: one evaluation and one reference pass a step."""
    rows = []
    hook = full.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        draw(scales=(0.0, 1.0, 0.0))
    finally:
        hook.remove()
    assert rows == [1, 1] * 3


def test_it_works_in_three_lines_from_files(full, module, cases, pack, tmp_path):
    """`from_pretrained` of an SDXL folder and the image encoder's folder, and a picture as PIL gives it."""
    from PIL import Image

    full.image_encoder.save_pretrained(tmp_path / "clip")
    import diffusers

    parts = {k: v for k, v in full.components.items() if k not in ("image_encoder", "feature_extractor")}
    plain = diffusers.StableDiffusionXLPipeline(**{**parts, "unet": cases("mini").unet})
    plain.save_pretrained(tmp_path / "sdxl")
    file = file_of(pack, cases("mini"))
    path = tmp_path / "mine.safetensors"
    pack.module("lookahead.files.encoder_file").write(path, file.image_proj, file.ip_adapter, {"size": "96"}, file.kv)

    with torch.inference_mode(False):
        pipe = module.LookaheadPipeline.from_pretrained(tmp_path / "sdxl")
        pipe.load_encoder(path, image_encoder=tmp_path / "clip")
    face = Image.new("RGB", (120, 100), "orange")
    out = pipe("a drawing", reference=face, num_inference_steps=2, height=96, width=96)
    assert out.images[0].size == (96, 96)


def test_without_a_reference_it_is_plain_sdxl_though_the_encoder_has_kv(full, draw, cases):
    import diffusers

    parts = {k: v for k, v in full.components.items() if k not in ("image_encoder", "feature_extractor")}
    plain = diffusers.StableDiffusionXLPipeline(**parts | {"unet": copy.deepcopy(cases("mini").unet)})
    plain.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "height": 8 * SIDE, "width": 8 * SIDE, "output_type": "latent"}
    noise = randn(1, 4, SIDE, SIDE, seed=61)
    wanted = plain("a drawing", latents=noise, guidance_scale=5.0, **options).images
    assert full.encoder.kv and relative(draw(reference=None).images, wanted) < GUIDED_BOUND


def test_unloading_leaves_the_unet_as_it_was(module, pack, cases):
    case = cases("mini")
    pipe = module.LookaheadPipeline(**components(case))
    x, t, context, pooled, time_ids = case.asked_of_picture(0, case.positive)
    added = {"text_embeds": pooled, "time_ids": time_ids}

    def plain():
        return pipe.unet(x, t, encoder_hidden_states=context, added_cond_kwargs=added).sample

    before, kinds = plain(), {k: type(v) for k, v in pipe.unet.attn_processors.items()}
    pipe.load_encoder(file_of(pack, case))
    assert relative(plain(), before) < 1e-5  # and without anything asked of ours the UNet is the plain one
    Asked(module, pipe, case).kv(0, True)
    pipe.unload_encoder()
    assert torch.equal(plain(), before) and {k: type(v) for k, v in pipe.unet.attn_processors.items()} == kinds


def test_what_does_not_fit_is_refused_in_one_sentence(module, pack, cases, tools, draw):
    case = cases("mini")
    bare = module.LookaheadPipeline(**components(case))
    wrong = {
        "another base model": lambda: bare.load_encoder(file_of(pack, cases("sdxl"))),
        "call load_encoder": lambda: bare.encode_reference(case.image),
        "pass reference": lambda: draw(reference=None, use_kv=True),
        "a picture or pixels": lambda: draw(reference=torch.zeros(2, 3, 8, 8)),
    }
    for said, call in wrong.items():
        with pytest.raises(ValueError, match=said) as error:
            call()
        tools.one_sentence(error)


def test_a_scheduler_of_flow_matching_is_refused_for_a_reference(pack):
    """It noises by another rule, which nobody would notice."""
    import diffusers

    alpha_bar, t = pack.module("sdxl.pipeline")._alpha_bar, torch.tensor(500)
    known = diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear")
    assert 0 < float(alpha_bar(known, t)) < 1
    flow = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    for flowing in (flow, diffusers.FlowMatchEulerDiscreteScheduler()):
        with pytest.raises(ValueError, match="flow matching") as error:
            alpha_bar(flowing, t)
        assert str(error.value).endswith(".") and "\n" not in str(error.value)
