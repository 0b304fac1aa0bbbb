"""What KV injection is asked about in the host and beside it: cases, the nodes' side and the oracle's (`kv_oracle.py`).

Both sides get the same weights, latents, noise, text and image prompt, in float32. The picture is not square, and the
reference, which is, has another size.
"""

import dataclasses
import itertools
import re
from dataclasses import dataclass, field

import kv_oracle as oracle
import pytest
import torch
from safetensors.torch import load_file
from tensors import randn, relative
from worlds import ROOT

WEIGHTS = ROOT / "mini/weights"
MODELS = "models/lookahead"

STEPS = (601, 251)
SIZES = {"mini": (12, 20), "sdxl": (16, 24)}  # height and width of the picture's latents
SIDE = 12  # of the reference's latents
SEED = 7
LATENT_SCALE = 0.13025
BOUND, GUIDED_BOUND = 1e-4, 5e-4
SCALES = [(3.0, 2.0, 2.0), (1.5, 2.5, 0.0)]


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


def worst(found: dict, expected: dict) -> float:
    """The largest relative difference of what stands under the same name."""
    assert found.keys() == expected.keys()
    return max(relative(found[name], expected[name]) for name in expected)


def flat(kv: dict) -> dict:
    """Keys and values under names of their own."""
    return {f"{name}.{which}": x for name, pair in kv.items() for which, x in zip("KV", pair, strict=True)}


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


def named(scales) -> dict[str, float]:
    """Scales by the names that the oracle has for them."""
    return dict(zip(("w_n", "w_f", "w_k"), scales, strict=True))


def scheduler(kind="DDIMScheduler"):
    """A scheduler of diffusers with the numbers of SDXL."""
    import diffusers

    sdxl = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
    extra = {"clip_sample": False, "set_alpha_to_one": False} if kind == "DDIMScheduler" else {}
    return getattr(diffusers, kind)(**sdxl, steps_offset=1, **extra)
