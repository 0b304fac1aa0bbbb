"""SDXL with an encoder file in plain diffusers: image prompt, KV injection, guidance with three scales.

    pipe = LookaheadPipeline.from_pretrained("stable-diffusion-xl-base-1.0")
    pipe.load_encoder("my_encoder.safetensors", image_encoder="CLIP-ViT-H-14-laion2B-s32B-b79K")
    pipe("a pencil drawing of a face", reference=Image.open("me.png")).images[0].save("drawn.png")

One UNet in memory: in the reference pass (the KV encoder of arXiv 2404.03620, section 4.3) the low-rank changes of the
encoder file are added beside its projections. What one pass reads and exports travels through the UNet's
`cross_attention_kwargs`; the attention processors themselves hold nothing but the name of their block.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..lookahead.files import encoder_file
from ..lookahead.files.encoder_file import EncoderFile
from ..lookahead.method.attention import LowRank, decoupled_cross_attention, extended_self_attention, softmax_attention
from ..lookahead.method.guidance import three_scale_guidance
from ..lookahead.method.resampler import Resampler
from ..lookahead.vision.images import centre_square, clip_input
from .encoder import KeysValues, block_paths, last_path, module_key

__all__ = ["KeptKV", "LookaheadPipeline", "Reference", "Scales", "Text"]

KV_PROMPT = "a photo of a face"
SIZE = 1024  # side of the reference in pixels where the file does not say


@dataclass(frozen=True, eq=False)
class Text:
    """An encoded prompt: context [rows, tokens, channels] and pooled [rows, channels]."""

    context: Tensor
    pooled: Tensor

    @property
    def zeros(self) -> Text:
        """The null text of SDXL: zeros, not the encoding of an empty prompt."""
        return Text(torch.zeros_like(self.context), torch.zeros_like(self.pooled))


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture of a person and all that is derived from it.

    image_prompt, null_image_prompt: behind the projections of every cross-attention, [1, tokens, C]; latents:
    [1, 4, h, w], scaled as the UNet reads them; text: the KV encoder's own prompt, one row.
    """

    image_prompt: KeysValues
    null_image_prompt: KeysValues
    latents: Tensor
    text: Text


@dataclass(frozen=True)
class Scales:
    """Of `three_scale_guidance`: the prompt without reference KV, the prompt with it, reference KV alone."""

    text: float = 3.0
    full: float = 2.0
    kv: float = 2.0

    @property
    def without_kv(self) -> Scales:
        """Plain classifier-free guidance as strong as where the reference KV has no effect."""
        return Scales(self.text + self.full, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class KeptKV:
    """Reference KV of a whole run, in host memory, to be replayed under other prompts.

    steps: (time step, KV under the KV prompt or None, KV under null text or None), one a step. It depends on the
    reference, the initial noise, the steps and the weights, never on the prompt. (SDXL, 16 bit, 1024 pixels: 0.84 GB a
    step and picture.)
    """

    reference: Reference
    steps: list[tuple[float, KeysValues | None, KeysValues | None]] = field(default_factory=list)


@dataclass
class LookaheadOutput(BaseOutput):
    """images: as `output_type` says; kv: what `pipe(..., replay=kv)` takes, or None."""

    images: object
    kv: KeptKV | None = None


@dataclass(frozen=True, eq=False)
class Pass:
    """What one pass of the UNet reads beside its inputs, row for row, and, in the reference pass, exports."""

    image_prompt: KeysValues = field(default_factory=dict)
    scale: float = 1.0
    kv: KeysValues = field(default_factory=dict)
    low_rank: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    exported: KeysValues | None = None
    last: str = ""

    def changed(self, out: Tensor, half: str, block: str, projection: str, x: Tensor) -> Tensor:
        """A projection's output plus the encoder's low-rank change of it, where there is one."""
        name = module_key(f"{half}.{block}.{projection}")
        return out + self.low_rank[name](x) if name in self.low_rank else out


class _LastExport(Exception):
    """Everything is exported: the rest of the UNet need not run."""


class SelfAttention:
    """Attention processor: own keys and values, behind them those of the reference, under one softmax."""

    def __init__(self, block: str):
        self.block = block

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, lookahead=Pass()
    ):
        x, block, change = hidden_states, self.block, lookahead.changed
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        if lookahead.exported is not None:
            # The base's projections with a change of their own, not the tuned ones that the pass itself goes on with.
            pair = change(k, "kv_export", block, "attn1.to_k", x), change(v, "kv_export", block, "attn1.to_v", x)
            lookahead.exported[block] = pair
            if block == lookahead.last:
                raise _LastExport
        q = change(q, "kv_encoder", block, "attn1.to_q", x)
        k = change(k, "kv_encoder", block, "attn1.to_k", x)
        v = change(v, "kv_encoder", block, "attn1.to_v", x)
        if block in lookahead.kv:
            out = extended_self_attention(q, k, v, *lookahead.kv[block], attn.heads)
        else:
            out = softmax_attention(q, k, v, attn.heads)
        return attn.to_out[1](change(attn.to_out[0](out), "kv_encoder", block, "attn1.to_out.0", out))


class CrossAttention:
    """Attention processor: the text, and the image prompt under a softmax of its own."""

    def __init__(self, block: str):
        self.block = block

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, lookahead=Pass()
    ):
        x, text, block, change = hidden_states, encoder_hidden_states, self.block, lookahead.changed
        q = change(attn.to_q(x), "kv_encoder", block, "attn2.to_q", x)
        k = change(attn.to_k(text), "kv_encoder", block, "attn2.to_k", text)
        v = change(attn.to_v(text), "kv_encoder", block, "attn2.to_v", text)
        if block in lookahead.image_prompt:
            out = decoupled_cross_attention(q, k, v, *lookahead.image_prompt[block], attn.heads, lookahead.scale)
        else:
            out = softmax_attention(q, k, v, attn.heads)
        return attn.to_out[1](change(attn.to_out[0](out), "kv_encoder", block, "attn2.to_out.0", out))


class EncoderNetwork(nn.Module):
    """The networks of an encoder file: Resampler, one pair of projections a cross-attention, low-rank changes."""

    def __init__(self, file: EncoderFile):
        super().__init__()

        def linear(weight: Tensor) -> nn.Linear:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.load_state_dict({"weight": weight}, assign=True)
            return layer

        with torch.device("meta"):  # the file's tensors take these places
            self.image_proj = Resampler(file.sizes)
        self.image_proj.load_state_dict(file.image_proj, assign=True)
        self.to_k = nn.ModuleList(linear(k) for k, _ in file.ip_adapter)
        self.to_v = nn.ModuleList(linear(v) for _, v in file.ip_adapter)
        self.low_rank = nn.ModuleDict()
        for name, (a, b) in file.kv_layers.items():
            rank = a.shape[0]
            with torch.device("meta"):
                layer = LowRank(a.shape[1], b.shape[0], rank, file.kv_scale(rank))
            layer.load_state_dict({"lora_A.weight": a, "lora_B.weight": b}, assign=True)
            self.low_rank[module_key(name)] = layer
        self.requires_grad_(False).eval()

    def keys_values(self, tokens: Tensor, blocks: Sequence[str]) -> KeysValues:
        """Tokens [rows, tokens, context] -> keys and values for each block's cross-attention."""
        pairs = zip(blocks, self.to_k, self.to_v, strict=True)
        return {block: (to_k(tokens), to_v(tokens)) for block, to_k, to_v in pairs}


class LookaheadPipeline(StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` that draws a person from one picture with an encoder file.

    Loading, LoRAs, offloading and schedulers are the parent's; without a reference it is SDXL under plain guidance.
    """

    encoder: EncoderNetwork | None = None
    encoder_metadata: dict[str, str] = {}
    _processors_before: dict | None = None

    def load_encoder(self, encoder, image_encoder=None) -> None:
        """Load an encoder file (a path, or an EncoderFile), in place of one that was loaded before.

        image_encoder: folder of the CLIP image encoder that it was trained with, or the model itself; None where the
        pipeline has it already. Raises EncoderFileError or ValueError, one sentence, for a file that does not fit.
        """
        file = encoder if isinstance(encoder, EncoderFile) else encoder_file.read(encoder)
        self._check(file)
        if isinstance(image_encoder, str | os.PathLike):
            from transformers import CLIPVisionModelWithProjection

            image_encoder = CLIPVisionModelWithProjection.from_pretrained(Path(image_encoder), dtype=self.unet.dtype)
        if image_encoder is not None:
            self.register_modules(image_encoder=image_encoder)
        self.encoder, self.encoder_metadata = EncoderNetwork(file), dict(file.metadata)
        if self._processors_before is None:
            before = self.unet.attn_processors
            ours = {f"{b}.attn1.processor": SelfAttention(b) for b in self.blocks}
            ours |= {f"{b}.attn2.processor": CrossAttention(b) for b in self.blocks}
            self.unet.set_attn_processor({**before, **ours})
            self._processors_before = before

    def unload_encoder(self) -> None:
        """Take the encoder out again: the UNet is as it was before."""
        if self._processors_before is not None:
            self.unet.set_attn_processor(self._processors_before)
        self.encoder, self.encoder_metadata, self._processors_before = None, {}, None

    @property
    def blocks(self) -> list[str]:
        """Names of the UNet's transformer blocks in the order of the public files."""
        return block_paths(self.unet)

    def _check(self, file: EncoderFile) -> None:
        modules = [self.unet.get_submodule(block) for block in self.blocks]
        widths, context = [m.attn2.to_q.out_features for m in modules], modules[0].attn2.to_k.in_features
        if tuple(widths) != file.widths or context != file.sizes.context_width:
            raise ValueError(
                f"{file.name} was made for another base model: it has {len(file.widths)} cross-attentions and text of "
                f"width {file.sizes.context_width}, this UNet {len(widths)} and {context}: use SDXL, or the encoder "
                "made for this model."
            )
        for layer, (a, b) in file.kv_layers.items():
            name = layer.split(".", 1)[1]
            block = name.partition(".attn")[0]
            module = self.unet.get_submodule(name) if block in self.blocks else None
            if module is None or (module.in_features, module.out_features) != (a.shape[1], b.shape[0]):
                raise ValueError(
                    f"{file.name} was made for another base model: its KV encoder does not fit this UNet at {name}: "
                    "use the encoder made for this model."
                )

    # --- the reference

    def _network(self) -> EncoderNetwork:
        if self.encoder is None:
            raise ValueError("There is no encoder for the reference: call load_encoder with an encoder file first.")
        return self.encoder.to(self._execution_device, self.unet.dtype)

    @torch.no_grad()
    def encode_reference(self, image: Image.Image | Tensor, size: int = 0, kv_prompt: str | None = None) -> Reference:
        """Read a reference: a picture, or pixels [1, H, W, 3] in [0, 1]; a picture that is not square is cropped about
        its centre.

        size: side in pixels of what the VAE sees, 0 for what the encoder was trained with; kv_prompt: the KV encoder's
        own prompt, by default the file's. Raises ValueError where there is no encoder or no image encoder.
        """
        pixels = _pixels(image)
        said = self.encoder_metadata.get("size", "")
        size = size or (int(said) if said.isdecimal() and int(said) >= 64 else SIZE)
        prompt = kv_prompt or self.encoder_metadata.get("kv_prompt") or KV_PROMPT
        image_prompt, null = self.encode_image_prompt(pixels)
        return Reference(image_prompt, null, self._encode(centre_square(pixels, size)), self._encode_text(prompt))

    @torch.no_grad()
    def encode_image_prompt(self, pixels: Tensor) -> tuple[KeysValues, KeysValues]:
        """Image prompt and null image prompt of pixels [1, H, W, 3] in [0, 1]. The null tokens are those of zeros in
        the image encoder's input, as in training, not of a black picture."""
        network, clip = self._network(), self.image_encoder
        if clip is None:
            raise ValueError("There is no image encoder: give load_encoder the folder of CLIP ViT-H/14.")
        width = clip.config.hidden_size
        if width != network.image_proj.sizes.image_width:
            raise ValueError(
                f"The image encoder has width {width}, and the encoder file reads "
                f"{network.image_proj.sizes.image_width}: give load_encoder the one that it was trained with."
            )
        if not hasattr(clip, "_hf_hook"):  # it came after pipe.to(...), or after offloading was turned on
            clip.to(self._execution_device)
        seen = clip_input(pixels.movedim(-1, 1), clip.config.image_size)
        both = torch.cat([seen, torch.zeros_like(seen)]).to(self._execution_device, clip.dtype)
        features = clip(both, output_hidden_states=True).hidden_states[-2].to(self.unet.dtype)
        tokens, null = network.image_proj(features).chunk(2)
        return network.keys_values(tokens, self.blocks), network.keys_values(null, self.blocks)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Pixels [1, size, size, 3] in [0, 1] -> scaled latents [1, 4, h, w], the mean: nothing is drawn."""
        upcast = self.vae.dtype == torch.float16 and getattr(self.vae.config, "force_upcast", False)
        if upcast:
            self.vae.to(torch.float32)
        x = pixels.movedim(-1, 1).mul(2).sub(1).to(self._execution_device, self.vae.dtype)
        out = self.vae.encode(x)
        latents = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents  # the tiny VAE has no spread
        if upcast:
            self.vae.to(torch.float16)
        return latents.to(self.unet.dtype) * self.vae.config.scaling_factor

    def _encode_text(self, prompt: str) -> Text:
        context, _, pooled, _ = self.encode_prompt(prompt, do_classifier_free_guidance=False)
        return Text(context.to(self.unet.dtype), pooled.to(self.unet.dtype))

    # --- one step

    @torch.no_grad()
    def reference_kv(self, reference: Reference, noise: Tensor, t: Tensor, conditional: bool = True) -> KeysValues:
        """The reference pass at time step t: keys and values of every self-attention, [rows, tokens, C].

        noise: [rows, 4, h, w] of the reference's size, the run's own initial noise where it fits; conditional: under
        the KV prompt, else under null text (never the user's negative prompt).
        """
        abar, like = _alphas_cumprod(self.scheduler, t), reference.latents
        x = abar.sqrt().to(like) * like + (1 - abar).sqrt().to(like) * noise.to(like)
        text = reference.text if conditional else reference.text.zeros
        exported: KeysValues = {}
        try:
            call = Pass(low_rank=self._network().low_rank, exported=exported, last=last_path(self.unet))
            self._unet(x, t, text, call)
        except _LastExport:
            pass
        # The middle runs before the upper half, so nothing is missing here.
        return exported

    @torch.no_grad()
    def predict_noise(
        self,
        x: Tensor,
        t: Tensor,
        text: Text,
        null_text: Text,
        reference: Reference | None = None,
        kv: KeysValues | None = None,
        null_kv: KeysValues | None = None,
        scales: Scales | None = None,
        image_prompt_scale: float = 1.0,
    ) -> Tensor:
        """The guided prediction [rows, 4, h, w] for x [rows, 4, h, w], scaled as the UNet reads it, at time step t.

        kv, null_kv: from `reference_kv`, or None for plain guidance at text + full. Evaluations whose scale is 0 are
        not made; nor is that of the null text where the scales add up to 1.
        """
        scales = scales or Scales()
        if kv is None and null_kv is None:
            scales = scales.without_kv
        prompt, null_prompt = ({}, {}) if reference is None else (reference.image_prompt, reference.null_image_prompt)
        alone = math.isclose(scales.text + scales.full + scales.kv, 1.0)
        asked = {"uncond": None if alone else (null_text, null_prompt, {})}
        asked["text"] = (text, prompt, {}) if scales.text else None
        asked["full_uncond"] = (null_text, null_prompt, null_kv) if scales.kv else None
        asked["full"] = (text, prompt, kv) if scales.full else None
        found = {}
        for names in (("uncond", "text"), ("full_uncond", "full")):  # with reference KV a row is longer: passes apart
            rows = {name: asked[name] for name in names if asked[name] is not None}
            if rows:
                parts = self._evaluate(x, t, list(rows.values()), image_prompt_scale)
                found |= dict(zip(rows, parts, strict=True))
        uncond = found.get("uncond", torch.zeros_like(x))  # its weight is 0 where it was not asked for
        parts = (found.get(name) for name in ("text", "full_uncond", "full"))
        return three_scale_guidance(uncond, *parts, scales.text, scales.full, scales.kv)

    def _evaluate(self, x: Tensor, t: Tensor, asked: list, image_prompt_scale: float) -> tuple[Tensor, ...]:
        n = len(x)
        texts, prompts, kvs = zip(*asked, strict=True)
        text = Text(_rows([text.context for text in texts], n), _rows([text.pooled for text in texts], n))
        call = Pass(_joined(prompts, n), image_prompt_scale, _joined(kvs, n))
        return self._unet(x.repeat(len(asked), 1, 1, 1), t, text, call).chunk(len(asked))

    def _unet(self, x: Tensor, t: Tensor, text: Text, call: Pass) -> Tensor:
        height, width = (self.vae_scale_factor * side for side in x.shape[-2:])
        time_ids = torch.tensor([height, width, 0, 0, height, width], dtype=x.dtype, device=x.device)
        added = {"text_embeds": _rows([text.pooled], len(x)), "time_ids": time_ids.expand(len(x), -1)}
        context = _rows([text.context], len(x))
        plain = self._processors_before is None  # diffusers' own processors know no argument of ours
        options = None if plain else {"lookahead": call}
        return self.unet(x, t, context, added_cond_kwargs=added, cross_attention_kwargs=options, return_dict=False)[0]

    # --- a whole run

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        reference: Reference | Image.Image | Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        scales: Scales | tuple[float, float, float] = Scales(),
        image_prompt_scale: float = 1.0,
        use_kv: bool | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        keep_kv: bool = False,
        replay: KeptKV | None = None,
    ) -> LookaheadOutput:
        """Draw pictures.

        reference: a picture of the person, or what `encode_reference` made of one; scales: text, full, kv; use_kv:
        whether KV injection acts, by default where the encoder file has a KV encoder (True without one is injection
        without training, False the image prompt alone, with no reference pass at all); latents: initial noise
        [rows, 4, h, w] with unit variance; keep_kv: return the reference KV of the run; replay: use that of an earlier
        run with the same steps and noise, under any prompt. Raises ValueError, one sentence, for what does not fit.
        """
        scales = scales if isinstance(scales, Scales) else Scales(*scales)
        height = height or self.default_sample_size * self.vae_scale_factor
        width = width or self.default_sample_size * self.vae_scale_factor
        self.check_inputs(prompt, None, height, width, 1, negative_prompt)
        device, dtype = self._execution_device, self.unet.dtype
        if replay is not None:
            reference = replay.reference if reference is None else reference
        if reference is not None and not isinstance(reference, Reference):
            reference = self.encode_reference(reference)
        if use_kv is None:
            use_kv = replay is not None or (self.encoder is not None and len(self.encoder.low_rank) > 0)
        if use_kv and reference is None:
            raise ValueError("KV injection needs a reference: pass reference, a picture of the person.")
        use_kv = use_kv and (scales.full != 0 or scales.kv != 0)

        encoded = self.encode_prompt(
            prompt,
            num_images_per_prompt=num_images_per_prompt,
            do_classifier_free_guidance=True,
            negative_prompt=negative_prompt,
        )
        context, null_context, pooled, null_pooled = (x.to(dtype) for x in encoded)
        text, null_text = Text(context, pooled), Text(null_context, null_pooled)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        channels = self.unet.config.in_channels
        x = self.prepare_latents(len(context), channels, height, width, dtype, device, generator, latents)
        noise = x / self.scheduler.init_noise_sigma
        if use_kv and noise.shape[-2:] != reference.latents.shape[-2:]:
            # The reference has another size than the picture: noise of its own, one for all rows.
            one = generator[0] if isinstance(generator, list) else generator
            noise = randn_tensor(reference.latents.shape, generator=one, device=device, dtype=dtype)
        if use_kv and replay is not None:
            _check_replay(replay, timesteps, scales)
        kept = KeptKV(reference) if keep_kv and use_kv else None
        options = self.prepare_extra_step_kwargs(generator, 0.0)
        with self.progress_bar(total=len(timesteps)) as bar:
            for n, t in enumerate(timesteps):
                kv = null_kv = None
                if use_kv and replay is not None:
                    _, kv, null_kv = replay.steps[n]
                    kv, null_kv = _moved(kv, device), _moved(null_kv, device)
                elif use_kv:
                    kv = self.reference_kv(reference, noise, t) if scales.full else None
                    null_kv = self.reference_kv(reference, noise, t, conditional=False) if scales.kv else None
                if kept is not None:
                    kept.steps.append((float(t), _moved(kv, "cpu"), _moved(null_kv, "cpu")))
                scaled = self.scheduler.scale_model_input(x, t)
                e = self.predict_noise(scaled, t, text, null_text, reference, kv, null_kv, scales, image_prompt_scale)
                x = self.scheduler.step(e, t, x, **options, return_dict=False)[0].to(dtype)
                bar.update()
        images = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return LookaheadOutput(images=images, kv=kept)

    def _decode(self, latents: Tensor, output_type: str):
        upcast = self.vae.dtype == torch.float16 and getattr(self.vae.config, "force_upcast", False)
        if upcast:
            self.vae.to(torch.float32)
        pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False)[0]
        if upcast:
            self.vae.to(torch.float16)
        return self.image_processor.postprocess(pixels, output_type=output_type)


def _rows(parts: Sequence[Tensor], n: int) -> Tensor:
    """Parts of one or n rows -> n rows of each, one part after another."""
    return torch.cat([part.expand(n, *part.shape[1:]) for part in parts])


def _joined(parts: Sequence[KeysValues], n: int) -> KeysValues:
    """Keys and values of several groups of n rows as one batch; empty where there are none."""
    return {block: tuple(_rows([p[block][i] for p in parts], n) for i in (0, 1)) for block in parts[0]}


def _moved(kv: KeysValues | None, device) -> KeysValues | None:
    return None if kv is None else {block: (k.to(device), v.to(device)) for block, (k, v) in kv.items()}


def _check_replay(replay: KeptKV, timesteps: Tensor, scales: Scales) -> None:
    asked, kept = [float(t) for t in timesteps], [t for t, _, _ in replay.steps]
    if asked != kept:
        raise ValueError(
            f"The reference KV to replay is of {len(kept)} steps, which are not the {len(asked)} of this run: use the "
            "same scheduler and number of steps, or leave replay out."
        )
    missing = {"full": replay.steps[0][1] is None and scales.full, "kv": replay.steps[0][2] is None and scales.kv}
    for name, lacks in missing.items():
        if lacks:
            raise ValueError(
                f"The reference KV to replay is of a run whose scale {name} was 0, and here it is not: keep it from a "
                "run with that scale, or set it to 0."
            )


def _alphas_cumprod(scheduler, t: Tensor) -> Tensor:
    """Cumulative alpha at time step t. Between two steps, where some schedulers go, log sigma is interpolated."""
    alphas = scheduler.alphas_cumprod.double().to(t.device)
    below, above = t.floor().long(), t.ceil().long().clamp(max=len(alphas) - 1)
    log_sigma = [0.5 * torch.log((1 - alphas[i]) / alphas[i]) for i in (below, above)]
    between = torch.sigmoid(-2 * torch.lerp(log_sigma[0], log_sigma[1], t.double() - below))
    return torch.where(below == above, alphas[below], between)


def _pixels(image: Image.Image | Tensor) -> Tensor:
    """A picture as [1, H, W, 3] in [0, 1], turned as its camera says."""
    if isinstance(image, Image.Image):
        import numpy as np

        rgb = ImageOps.exif_transpose(image).convert("RGB")
        return torch.from_numpy(np.asarray(rgb).copy()).unsqueeze(0) / 255.0
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[0] != 1 or image.shape[-1] != 3:
        what = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"The reference is {what}, and a picture or pixels of shape [1, H, W, 3] are needed: pass one."
        )
    return image.float()
