"""KV injection and the three-scale guider in the real host against the plain oracle of `kv_oracle.py`.

Both sides get the same weights, latents, noise, text and image prompt, in float32. The picture is not square, and the
reference, which is, has another size.
"""

import copy
import dataclasses
import functools
import importlib.util
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parents[1] / "mini/weights"


def sibling(name: str):
    """A module beside this one: the tests are no package."""
    spec = importlib.util.spec_from_file_location(f"{name}_for_kv_parity", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle, image_prompt_parity = sibling("kv_oracle"), sibling("test_parity")
difference = image_prompt_parity.difference

STEPS = (601, 251)
SIZES = {"mini": (12, 20), "sdxl": (16, 24)}  # height and width of the picture's latents
SIDE = 12  # of the reference's latents
SEED, NOISE_SEED = 7, 8
LATENT_SCALE = 0.13025
BOUND, GUIDED_BOUND = 1e-4, 5e-4
SCALES = [(3.0, 2.0, 2.0), (1.5, 2.5, 0.0)]


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Latents:
    """A VAE whose latent of every picture is known; unscaled, as the host's are."""

    def __init__(self, side: int):
        self.latents = randn(1, 4, side, side, seed=21) / LATENT_SCALE

    def encode(self, pixels):
        assert pixels.shape[1:3] == tuple(8 * side for side in self.latents.shape[-2:])
        return self.latents.expand(pixels.shape[0], -1, -1, -1).clone()


@dataclass
class Case:
    """What both sides are asked about. Text is [1, 77, context] and [1, pooled]; x and noise are [rows, 4, h, w]."""

    world: object
    unet: object
    lora: dict
    tokens: torch.Tensor  # of the image prompt [1, 16, context]
    null_tokens: torch.Tensor
    latent: tuple[int, int]
    image: torch.Tensor
    alpha: float | None = None
    vae: Latents = field(default_factory=lambda: Latents(SIDE))

    def __post_init__(self):
        self.positive, self.negative, self.kv_prompt = (self.world.text(seed) for seed in (11, 12, 13))
        self.sampling = self.world.model.get_model_object("model_sampling")
        self.sigmas = [float(self.sampling.sigmas[step]) for step in STEPS]
        # Of the picture's latents, and what is added to them: not the noise of the run, which any latents may have.
        small = randn(1, 4, 3, 4, seed=24)
        self.clean = torch.nn.functional.interpolate(small, self.latent, mode="bilinear")
        self.x = randn(1, 4, *self.latent, seed=22)
        self.noise = randn(1, 4, *self.latent, seed=23)
        self.reference_noise = randn(1, 4, SIDE, SIDE, seed=SEED)
        context = self.kv_prompt[0][0]
        self.zeros = [[torch.zeros_like(context), {"pooled_output": torch.zeros(1, self.world.pooled)}]]

    # --- the oracle's side

    def asked(self, latents, noise, n: int, text) -> tuple:
        """What the UNet is asked about (scaled latents + sigma x noise), at sigma n, with this text."""
        height, width = (8 * side for side in latents.shape[-2:])
        time_ids = torch.tensor([[height, width, 0.0, 0.0, height, width]])
        t = self.sampling.timestep(torch.tensor([self.sigmas[n]]))
        (context, extra), *_ = text
        return oracle.noised(latents, noise, self.sigmas[n]), t, context, extra["pooled_output"], time_ids

    def asked_of_picture(self, n: int, text) -> tuple:
        return self.asked(self.clean, self.x, n, text)

    def export(self, n: int, text, noise=None, lora=None) -> dict:
        """Reference KV at sigma n."""
        noise = self.reference_noise if noise is None else noise
        question = self.asked(self.vae.latents * LATENT_SCALE, noise, n, text)
        return oracle.export(self.unet, *question, self.lora if lora is None else lora, self.alpha)

    def both(self, n: int, noise=None, lora=None, null_text=None) -> tuple[dict, dict]:
        """Reference KV of the conditional and of the unconditional rows."""
        null = self.zeros if null_text is None else null_text
        return self.export(n, self.kv_prompt, noise, lora), self.export(n, null, noise, lora)

    def predict(self, n: int, conditional: bool, kv=None, prompt=True) -> torch.Tensor:
        """Noise prediction at sigma n."""
        text = self.positive if conditional else self.negative
        question = self.asked_of_picture(n, text)
        tokens = self.tokens if conditional else self.null_tokens
        ip = oracle.image_prompt(self.unet, self.world.encoder, tokens) if prompt else None
        return oracle.predict(self.unet, *question, kv=kv, image_prompt=ip)

    def expected(self, n: int, kv_pair) -> dict[str, torch.Tensor]:
        """The four noise predictions of the guidance at sigma n."""
        kv, kv_null = kv_pair
        return {
            "e_nu": self.predict(n, False),
            "e_nt": self.predict(n, True),
            "e_fu": self.predict(n, False, kv_null),
            "e_ft": self.predict(n, True, kv),
        }


def load_world(kind: str, worlds, tools, folder):
    """`mini` with the repository's weights; `sdxl`: all 70 blocks of SDXL, narrow, with random weights."""
    if kind == "sdxl":
        return worlds(kind)
    world = dataclasses.replace(worlds(kind))
    world.model = tools.make_model(world)
    prefix = "model.diffusion_model."
    weights = load_file(WEIGHTS / "mini_sdxl.safetensors")
    weights = {k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)}
    world.model.model.diffusion_model.load_state_dict(weights)
    world.encoder = {k: v.float() for k, v in load_file(WEIGHTS / "mini_ip_adapter_plus_face.safetensors").items()}
    world.clip_vision = tools.make_clip_vision(folder)
    world.clip_vision.load_sd({k: v.float() for k, v in load_file(WEIGHTS / "mini_clip_vision.safetensors").items()})
    return world


def image_tokens(unet, world, image) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of the picture and of an input of zeros, by diffusers' own Resampler: [1, 16, context] each."""
    from comfy.clip_model import clip_preprocess

    clip = world.clip_vision
    pixels = clip_preprocess(image, size=clip.image_size, mean=clip.image_mean, std=clip.image_std)
    both = torch.cat([pixels, torch.zeros_like(pixels)])
    features = clip.model(pixel_values=both, intermediate_output=-2)[1].float()
    weights = {k.removeprefix("image_proj."): v for k, v in world.encoder.items() if k.startswith("image_proj.")}
    with torch.inference_mode(False):
        weights = {k: v.clone() for k, v in weights.items()}
        resampler = unet._convert_ip_adapter_image_proj_to_diffusers(weights).requires_grad_(False)
    tokens = resampler(features)
    return tokens[:1], tokens[1:]


@pytest.fixture(scope="module")
def cases(worlds, tools, tmp_path_factory):
    """`cases("mini")` and `cases("sdxl")`, each built once."""
    built = {}

    def case(kind: str) -> Case:
        if kind not in built:
            with torch.inference_mode():
                world = load_world(kind, worlds, tools, tmp_path_factory.mktemp(kind))
                unet = tools.diffusers_unet(world)
                image = tools.picture(1)
                tokens, null_tokens = image_tokens(unet, world, image)
                lora = oracle.random_lora(unet, seed=31)
                built[kind] = Case(world, unet, lora, tokens, null_tokens, SIZES[kind], image)
        return built[kind]

    return case


@pytest.fixture(params=["mini", "sdxl"])
def case(request, cases) -> Case:
    return cases(request.param)


def worst(found: dict, expected: dict) -> float:
    """The largest relative difference of what stands under the same name."""
    assert found.keys() == expected.keys()
    return max(difference(found[name], expected[name]) for name in expected)


def flat(kv: dict) -> dict:
    """Keys and values under names of their own."""
    return {f"{name}.{which}": x for name, pair in kv.items() for which, x in zip("KV", pair, strict=True)}


# --- the oracle by itself


def test_the_oracle_without_reference_is_plain_diffusers(case):
    x, t, context, pooled, time_ids = case.asked_of_picture(0, case.positive)
    added = {"text_embeds": pooled, "time_ids": time_ids}
    plain = case.unet(x, t, encoder_hidden_states=context, added_cond_kwargs=added).sample
    assert difference(case.predict(0, True, prompt=False), plain) < 1e-5
    empty = {name: (k[:, :0], v[:, :0]) for name, (k, v) in case.export(0, case.kv_prompt).items()}
    assert torch.equal(case.predict(0, True, empty, prompt=False), case.predict(0, True, prompt=False))


def test_the_oracle_exports_the_bases_own_projections_without_lora(case):
    """And with all deltas zero; and the picture as its own reference changes nothing. In float64, since the oracle and
    diffusers round differently, and trained weights amplify that."""
    unet = copy.deepcopy(case.unet).double()
    question = [v.double() for v in case.asked_of_picture(0, case.positive)]
    seen = {}
    for name, block in oracle.blocks(unet).items():
        for which in "kv":
            getattr(block.attn1, f"to_{which}").register_forward_hook(
                lambda _, __, out, at=(name, which): seen.setdefault(".".join(at), out)
            )
    x, t, context, pooled, time_ids = question
    added = {"text_embeds": pooled, "time_ids": time_ids}
    plain = unet(x, t, encoder_hidden_states=context, added_cond_kwargs=added).sample
    own = {name: (seen[f"{name}.k"], seen[f"{name}.v"]) for name in oracle.blocks(unet)}
    zero = {k: (torch.zeros_like(v) if "lora_B" in k else v).double() for k, v in case.lora.items()}
    for lora in ({}, zero):
        assert worst(flat(oracle.export(unet, *question, lora)), flat(own)) < 1e-9
    assert difference(oracle.predict(unet, *question, kv=own), plain) < 1e-9


def test_the_oracles_lora_has_the_names_of_the_encoder_file_and_all_of_them_act(case):
    count = len(oracle.blocks(case.unet))
    encoder = {k for k in case.lora if k.startswith("kv_encoder.")}
    assert len(encoder) == (count - 1) * 8 * 2 and len(case.lora) - len(encoder) == count * 2 * 2
    last = oracle.last_block(case.unet)
    assert last == f"up_blocks.1.attentions.2.transformer_blocks.{1 if count == 70 else 0}"
    assert not any(last in k for k in encoder)
    kv = flat(case.export(0, case.kv_prompt))
    assert all(difference(kv[k], v) > 0.1 for k, v in flat(case.export(0, case.kv_prompt, lora={})).items())


def test_the_oracles_last_block_has_dead_layers(case):
    """What the last block's attentions and feed-forward give reaches no exported keys and values."""
    last = oracle.blocks(case.unet)[oracle.last_block(case.unet)]
    before = case.export(0, case.kv_prompt)
    layers = [last.attn1.to_out[0], last.attn2.to_out[0], last.ff.net[2]]
    for layer in layers:
        layer.weight.data *= -1.5
    try:
        after = case.export(0, case.kv_prompt)
    finally:
        for layer in layers:
            layer.weight.data /= -1.5
    assert worst(flat(after), flat(before)) == 0


def test_the_oracles_guidance_is_plain_cfg_where_the_reference_has_no_effect():
    e_u, e_t = randn(1, 4, 8, 8, seed=1), randn(1, 4, 8, 8, seed=2)
    torch.testing.assert_close(oracle.guided(e_u, e_t, e_u, e_t, 3.0, 2.0, 2.0), e_u + 5 * (e_t - e_u))
    a, b = randn(1, 4, 8, 8, seed=3), randn(1, 4, 8, 8, seed=4)
    torch.testing.assert_close(oracle.guided(e_u, e_t, a, b, 3.0, 2.0, 2.0), -6 * e_u + 3 * e_t + 2 * b + 2 * a)


# --- the host's side

MODELS = "models/lookahead"


@pytest.fixture(scope="module")
def encoder_of(pack):
    """A case's encoder file, written and loaded as the nodes do."""
    files = pack.module("lookahead.files.encoder_file")
    made = []

    def load(case: Case, kv=None):
        weights = case.world.encoder
        proj = {k.removeprefix("image_proj."): v for k, v in weights.items() if k.startswith("image_proj.")}
        numbers = itertools.takewhile(lambda n: f"ip_adapter.{n}.to_k_ip.weight" in weights, itertools.count(1, 2))
        pairs = [tuple(weights[f"ip_adapter.{n}.to_{which}_ip.weight"] for which in "kv") for n in numbers]
        metadata = {"kv_rank": "4", **({} if case.alpha is None else {"kv_alpha": str(case.alpha)})}
        path = pack.base / MODELS / f"kv_parity_{len(made)}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        made.append(path)
        files.write(path, proj, pairs, metadata, kv=case.lora if kv is None else kv)
        return pack.nodes["LookaheadLoadEncoder"].execute(path.name).result[0]

    yield load
    for path in made:
        path.unlink(missing_ok=True)


@pytest.fixture
def host(tools, encoder_of):
    """`host(case)`: the nodes' side of a case."""
    return lambda case, **options: Host(case, tools, encoder_of, **options)


class Host:
    """The nodes' answers: model with image prompt only (`without`), and with KV as well (`with_kv`)."""

    def __init__(self, case: Case, tools, encoder_of, trained=True, prompt=True, **options):
        self.case, self.tools = case, tools
        encoder = encoder_of(case) if trained else None
        clip_vision = case.world.clip_vision if prompt else None
        self.reference = tools.run(
            "LookaheadEncodeReference",
            encoder,
            clip_vision,
            case.image,
            vae=case.vae,
            conditioning=case.kv_prompt,
            size=8 * case.vae.latents.shape[-1],
        )
        self.without = tools.apply(case.world.model, self.reference) if prompt else case.world.model
        self.with_kv = tools.run("LookaheadApplyKVInjection", self.without, self.reference, **options)

    def ask(self, guider, noise=None, x=None) -> list[torch.Tensor]:
        """The guider's noise prediction at each sigma, in one run of the host."""
        import comfy.samplers

        case = self.case
        noise = case.noise if noise is None else noise
        x = case.x if x is None else x
        found = []

        def at_each(model, _, sigmas, extra_args=None, callback=None, disable=None):
            for sigma in sigmas[:-1]:
                noised = case.clean + x * sigma
                denoised = model(noised, sigma.expand(x.shape[0]), **extra_args)
                found.append((noised - denoised) / sigma)
            return x

        sigmas = torch.tensor([*case.sigmas, 0.0])
        sampler = comfy.samplers.KSAMPLER(at_each)
        guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=SEED)
        return found

    def plain(self, model, cfg: float, **inputs) -> list[torch.Tensor]:
        """With the host's own guider."""
        return self.ask(self.tools.guider(model, self.case.positive, self.case.negative, cfg), **inputs)

    def predictions(self, **inputs) -> list[dict[str, torch.Tensor]]:
        """The four noise predictions at each sigma; CFG at 0 is the unconditional, at 1 the conditional one."""
        asked = {
            "e_nu": self.plain(self.without, 0.0, **inputs),
            "e_nt": self.plain(self.without, 1.0, **inputs),
            "e_fu": self.plain(self.with_kv, 0.0, **inputs),
            "e_ft": self.plain(self.with_kv, 1.0, **inputs),
        }
        return [dict(zip(asked, each, strict=True)) for each in zip(*asked.values(), strict=True)]

    def guided(self, scales, **inputs) -> list[torch.Tensor]:
        """With our guider."""
        positive, negative = self.case.positive, self.case.negative
        text, full, kv = scales
        guider = self.tools.run("LookaheadGuider", self.with_kv, positive, negative, text=text, full=full, kv=kv)
        return self.ask(guider, **inputs)

    def exported(self, conditional: bool) -> list[dict]:
        """Reference KV at each sigma, as it stands behind the picture's own in the picture's pass."""
        case, calls = self.case, []
        names = block_names(case.world)
        picture, reference = case.latent[0] * case.latent[1], case.vae.latents[0, 0].numel()

        def override(attention, q, k, v, heads, *args, **kwargs):
            n = q.shape[-2]
            if k.shape[-2] * picture == n * (picture + reference):
                options = kwargs["transformer_options"]
                chunk = options["cond_or_uncond"].index(0 if conditional else 1)
                rows = q.shape[0] // len(options["cond_or_uncond"])
                k_ext, v_ext = (joined(y, kwargs)[chunk * rows : (chunk + 1) * rows, n:] for y in (k, v))
                calls.append((names[*options["block"], options["block_index"]], (k_ext, v_ext)))
            return attention(q, k, v, heads, *args, **kwargs)

        model = self.with_kv.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        self.plain(model, 1.0 if conditional else 0.0)
        count = len(names)
        assert len(calls) == count * len(STEPS)
        return [dict(calls[i * count : (i + 1) * count]) for i in range(len(STEPS))]


def joined(x, kwargs) -> torch.Tensor:
    """Heads side by side again, [rows, tokens, C], where the call has them apart."""
    return x.movedim(1, 2).flatten(2) if kwargs.get("skip_reshape") else x


def block_names(world) -> dict[tuple, str]:
    """diffusers' name of each transformer block by the host's ("input" | "middle" | "output", id, index)."""
    import comfy.utils

    found = {}
    for ours, hosts in comfy.utils.unet_to_diffusers(world.unet_config).items():
        if ours.endswith("attn1.to_q.weight"):
            place, block, index = re.match(r"(\w+)_blocks?\.(\d+)\..*blocks\.(\d+)\.", hosts).groups()
            found[place, 0 if place == "middle" else int(block), int(index)] = ours.removesuffix(".attn1.to_q.weight")
    return found


@dataclass
class Answers:
    """For each sigma: the four predictions, the guided result for each set of scales, and reference KV."""

    predictions: list[dict]
    guided: dict[tuple, list]
    exported: list[dict]  # of the conditional rows
    exported_null: list[dict]


@pytest.fixture(scope="module")
def answers(cases, tools, encoder_of):
    """What the nodes answer, asked for once a case."""

    @functools.cache
    def of(kind: str) -> Answers:
        with torch.inference_mode():
            host = Host(cases(kind), tools, encoder_of)
            guided = {scales: host.guided(scales) for scales in SCALES}
            return Answers(host.predictions(), guided, host.exported(True), host.exported(False))

    return of


@pytest.fixture(scope="module")
def expectations(cases):
    """What the oracle answers, asked for once a case."""

    @functools.cache
    def of(kind: str) -> Answers:
        with torch.inference_mode():
            case, each = cases(kind), range(len(STEPS))
            kv = [case.both(n) for n in each]
            four = [case.expected(n, kv[n]) for n in each]
            guided = {scales: [oracle.guided(**four[n], **named(scales)) for n in each] for scales in SCALES}
            return Answers(four, guided, [pair[0] for pair in kv], [pair[1] for pair in kv])

    return of


def named(scales) -> dict[str, float]:
    return dict(zip(("w_n", "w_f", "w_k"), scales, strict=True))


@pytest.mark.parametrize("kind", SIZES)
def test_exported_keys_and_values_agree_with_the_oracle(answers, expectations, kind):
    found, expected = answers(kind), expectations(kind)
    for n in range(len(STEPS)):
        conditional = worst(flat(found.exported[n]), flat(expected.exported[n]))
        unconditional = worst(flat(found.exported_null[n]), flat(expected.exported_null[n]))
        print(f"relative rms difference {conditional:.1e}, {unconditional:.1e}")
        assert conditional < BOUND and unconditional < BOUND


@pytest.mark.parametrize("kind", SIZES)
def test_noise_predictions_agree_with_the_oracle(answers, expectations, kind):
    for found, expected in zip(answers(kind).predictions, expectations(kind).predictions, strict=True):
        print({name: f"{difference(found[name], expected[name]):.1e}" for name in expected})
        assert worst(found, expected) < BOUND
        assert difference(expected["e_ft"], expected["e_nt"]) > 0.01  # the reference does something here
        assert difference(expected["e_fu"], expected["e_nu"]) > 0.01


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("kind", SIZES)
def test_guided_results_agree_with_the_oracle(answers, expectations, kind, scales):
    for found, expected in zip(answers(kind).guided[scales], expectations(kind).guided[scales], strict=True):
        print(f"relative rms difference {difference(found, expected):.1e}")
        assert difference(found, expected) < GUIDED_BOUND


@pytest.mark.parametrize("trained", [True, False])
def test_the_reference_acts_without_an_image_prompt_as_in_the_oracle(case, host, trained):
    """A trained encoder, and none at all."""
    side = host(case, trained=trained, prompt=trained)
    model = side.tools.run("LookaheadApplyKVInjection", case.world.model, side.reference)
    for cfg, conditional in ((1.0, True), (0.0, False)):
        found = side.plain(model, cfg)
        for n in range(len(STEPS)):
            kv = case.export(n, case.kv_prompt if conditional else case.zeros, lora=None if trained else {})
            assert difference(found[n], case.predict(n, conditional, kv, prompt=False)) < BOUND


def test_an_alpha_in_the_file_scales_the_low_rank_weights(cases, host):
    case = dataclasses.replace(cases("mini"), alpha=2.0)
    found = host(case).plain(host(case).with_kv, 1.0)
    for n in range(len(STEPS)):
        assert difference(found[n], case.predict(n, True, case.export(n, case.kv_prompt))) < BOUND
        full = cases("mini").export(n, case.kv_prompt)
        assert difference(found[n], case.predict(n, True, full)) > 10 * BOUND


NOISES = {
    # name: size of the picture's latents, options, the noise given to the guider -> that of the reference
    "of the run": ((SIDE, SIDE), {}, lambda given: given),
    "of the run's seed, where the sizes differ": ((12, 20), {}, lambda _: randn(1, 4, SIDE, SIDE, seed=SEED)),
    "of the run's seed, where there is none": (
        (SIDE, SIDE),
        {"nothing": True},
        lambda _: randn(1, 4, SIDE, SIDE, seed=SEED),
    ),
    "fixed": (
        (SIDE, SIDE),
        {"noise": "fixed", "noise_seed": NOISE_SEED},
        lambda _: randn(1, 4, SIDE, SIDE, seed=NOISE_SEED),
    ),
}


@pytest.mark.parametrize("name", NOISES)
def test_the_reference_is_noised_with_the_noise(cases, host, name):
    latent, options, expected_noise = NOISES[name]
    options = dict(options)
    case = dataclasses.replace(cases("mini"), latent=latent)
    noise = case.noise * 0 if options.pop("nothing", False) else case.noise
    side = host(case, **options)
    found = side.plain(side.with_kv, 1.0, noise=noise)
    for n in range(len(STEPS)):
        kv = case.export(n, case.kv_prompt, noise=expected_noise(noise))
        assert difference(found[n], case.predict(n, True, kv)) < BOUND


@pytest.mark.parametrize("scales", SCALES)
def test_each_image_of_a_batch_has_the_reference_under_its_own_noise(cases, host, scales):
    case = dataclasses.replace(cases("mini"), latent=(SIDE, SIDE))
    noise, x = randn(3, 4, SIDE, SIDE, seed=41), randn(3, 4, SIDE, SIDE, seed=42)
    found = host(case).guided(scales, noise=noise, x=x)
    for n in range(len(STEPS)):
        for row in range(3):
            case.x = x[row : row + 1]
            four = case.expected(n, case.both(n, noise=noise[row : row + 1]))
            assert difference(found[n][row], oracle.guided(*four.values(), *scales)[0]) < GUIDED_BOUND


# --- the comparison is sharp enough


def without_lora_in(case, block: str) -> dict:
    return {k: v for k, v in case.lora.items() if not k.startswith(f"kv_encoder.{block}.")}


def exported_from_the_tuned_projection(case) -> dict:
    """The export's delta with the pass's own added to it: B @ A + B' @ A' is [B, B'] @ [A, A']."""
    lora = dict(case.lora)
    for name in oracle.blocks(case.unet):
        for layer in oracle.EXPORT_LAYERS:
            for half, dim in (("A", 0), ("B", 1)):
                export, own = (f"{kind}.{name}.{layer}.lora_{half}.weight" for kind in ("kv_export", "kv_encoder"))
                if own in lora:
                    lora[export] = torch.cat([lora[export], lora[own]], dim=dim)
    return lora


def swapped(kv: dict) -> dict:
    return {name: (v, k) for name, (k, v) in kv.items()}


def without_middle(kv: dict) -> dict:
    return {name: pair for name, pair in kv.items() if not name.startswith("mid_block")}


MISTAKES = {
    "LoRA missing in one block": lambda case, n: case.both(
        n, lora=without_lora_in(case, "down_blocks.1.attentions.0.transformer_blocks.0")
    ),
    "export from the tuned projection": lambda case, n: case.both(n, lora=exported_from_the_tuned_projection(case)),
    "wrong noise": lambda case, n: case.both(n, noise=randn(1, 4, SIDE, SIDE, seed=SEED + 1)),
    "kappa_0 from the negative prompt": lambda case, n: case.both(n, null_text=case.negative),
    "keys and values swapped": lambda case, n: tuple(map(swapped, case.both(n))),
    "middle block skipped": lambda case, n: tuple(map(without_middle, case.both(n))),
}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_oracle_fails_each_comparison(cases, answers, expectations, kind, mistake):
    """By more than twice the bound at one sigma: the mini world's middle is its weakest part."""
    case, found, without = cases(kind), answers(kind), expectations(kind).predictions
    failures = []
    for n in range(len(STEPS)):
        kv, kv_null = MISTAKES[mistake](case, n)
        wrong = {**without[n], "e_fu": case.predict(n, False, kv_null), "e_ft": case.predict(n, True, kv)}
        in_guided = difference(found.guided[SCALES[0]][n], oracle.guided(**wrong, **named(SCALES[0])))
        failures.append((worst(found.predictions[n], wrong), in_guided))
        if "skipped" not in mistake:  # which is no mistake of the export
            assert worst(flat(found.exported_null[n]), flat(kv_null)) > 10 * BOUND
    print(mistake, *(f"predictions {p:.1e}, guided {g:.1e}" for p, g in failures), sep="; ")
    assert max(p for p, _ in failures) > 2 * BOUND and max(g for _, g in failures) > 2 * GUIDED_BOUND
