"""SDXL with an encoder file in plain diffusers: image prompt, KV injection, guidance with three scales.

    pipe = LookaheadPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
    pipe.load_encoder("my_encoder.safetensors", image_encoder="CLIP-ViT-H-14-laion2B-s32B-b79K")
    pipe("a pencil drawing of a face", reference=Image.open("me.png")).images[0].save("drawn.png")

One UNet in memory (`SharedUNet`): in the reference pass it is the KV encoder of arXiv 2404.03620, section 4.3.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin, StableDiffusionXLPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ..lookahead.files import encoder_file
from ..lookahead.files.encoder_file import EncoderFile
from ..lookahead.method.guidance import Scales, guided
from ..lookahead.method.schedule import add_noise, alpha_bar_at
from ..lookahead.vision.images import centre_square, clip_input
from .concept import ConceptRows
from .encoder import Encoder, KeysValues
from .images import as_pixels
from .reference import EncodedReference, KeptKV, Text
from .shared_unet import Condition, SharedUNet, joined

__all__ = ["EncodedReference", "KeptKV", "LookaheadPipeline", "Scales", "Text"]


@dataclass
class LookaheadOutput(BaseOutput):
    """images: as `output_type` says; kv: what `pipe(..., replay=kv)` takes, or None."""

    images: object
    kv: KeptKV | None = None


class LookaheadPipeline(StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` that draws a person from one picture with an encoder file.

    Loading, LoRAs, offloading and schedulers are the parent's; without a reference it is SDXL under plain guidance.
    """

    encoder: Encoder | None = None
    encoder_metadata: dict[str, str] = {}
    _injected: SharedUNet | None = None

    def load_encoder(
        self, encoder: EncoderFile | str | os.PathLike[str], image_encoder: Any | str | os.PathLike[str] = None
    ) -> None:
        """Load an encoder file (a path, or an EncoderFile), in place of one that was loaded before.

        image_encoder: folder of the CLIP image encoder that it was trained with, or the model itself; None where the
        pipeline has it already. Raises EncoderFileError or ValueError, one sentence, for a file that does not fit.
        """
        file = encoder if isinstance(encoder, EncoderFile) else encoder_file.read(Path(encoder).expanduser())
        loaded = Encoder.from_file(file, self.unet)
        if isinstance(image_encoder, str | os.PathLike):
            from transformers import CLIPVisionModelWithProjection

            folder = Path(image_encoder).expanduser()
            image_encoder = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=self.unet.dtype)
        if image_encoder is not None:
            self.register_modules(image_encoder=image_encoder)
        self.unload_encoder()
        self.encoder, self.encoder_metadata = loaded, dict(file.metadata)
        self._injected = SharedUNet(self.unet, loaded).inject()

    def unload_encoder(self) -> None:
        """Take the encoder out again: the UNet is as it was before."""
        if self._injected is not None:
            self._injected.eject()
        self.encoder, self.encoder_metadata, self._injected = None, {}, None

    @property
    def _shared_unet(self) -> SharedUNet:
        if self._injected is None:
            return SharedUNet(self.unet)
        self._injected.unet = self.unet  # which may have been compiled since
        return self._injected

    # --- the reference

    def _encoder_on_device(self) -> Encoder:
        if self.encoder is None:
            raise ValueError("There is no encoder for the reference: call load_encoder with an encoder file first.")
        return self.encoder.to(self._execution_device, self.unet.dtype)

    @torch.no_grad()
    def encode_reference(
        self, image: Image.Image | Tensor, size: int = 0, kv_prompt: str | None = None
    ) -> EncodedReference:
        """Read a reference: a picture, or pixels [1, H, W, 3] in [0, 1]; a picture that is not square is cropped about
        its centre.

        size: side in pixels of what the VAE sees, 0 for what the encoder was trained with; kv_prompt: the KV encoder's
        own prompt, by default the file's. Raises ValueError where there is no encoder or no image encoder.
        """
        pixels = as_pixels(image)
        size = size or encoder_file.reference_size(self.encoder_metadata)
        prompt = kv_prompt or encoder_file.kv_prompt(self.encoder_metadata)
        image_prompt, null = self.encode_image_prompt(pixels)
        latents, text = self._encode(centre_square(pixels, size)), self._encode_text(prompt)
        return EncodedReference(image_prompt, null, latents, text)

    @torch.no_grad()
    def encode_image_prompt(self, pixels: Tensor) -> tuple[KeysValues, KeysValues]:
        """Image prompt and null image prompt of pixels [1, H, W, 3] in [0, 1]. The null tokens are those of zeros in
        the image encoder's input, as in training, not of a black picture."""
        encoder, clip = self._encoder_on_device(), self.image_encoder
        if clip is None:
            raise ValueError("There is no image encoder: give load_encoder the folder of CLIP ViT-H/14.")
        width = clip.config.hidden_size
        if width != encoder.image_proj.sizes.image_width:
            raise ValueError(
                f"The image encoder has width {width}, and the encoder file reads "
                f"{encoder.image_proj.sizes.image_width}: give load_encoder the one that it was trained with."
            )
        if not hasattr(clip, "_hf_hook"):  # it came after pipe.to(...), or after offloading was turned on
            clip.to(self._execution_device)
        picture = clip_input(pixels.movedim(-1, 1), clip.config.image_size)
        both = torch.cat([picture, torch.zeros_like(picture)]).to(self._execution_device, clip.dtype)
        features = clip(both, output_hidden_states=True).hidden_states[-2].to(self.unet.dtype)
        tokens, null = encoder.image_proj(features).chunk(2)
        return encoder.all_keys_values(tokens), encoder.all_keys_values(null)

    @contextmanager
    def _safe_vae(self) -> Iterator[None]:
        """SDXL's own autoencoder overflows in 16 bit: it computes in 32 meanwhile."""
        upcast = self.vae.dtype == torch.float16 and getattr(self.vae.config, "force_upcast", False)
        if upcast:
            self.vae.to(torch.float32)
        yield
        if upcast:
            self.vae.to(torch.float16)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Pixels [1, size, size, 3] in [0, 1] -> scaled latents [1, 4, h, w], the mean: nothing is drawn."""
        with self._safe_vae():
            out = self.vae.encode(pixels.movedim(-1, 1).mul(2).sub(1).to(self._execution_device, self.vae.dtype))
        latents = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents  # the tiny VAE has no spread
        return latents.to(self.unet.dtype) * self.vae.config.scaling_factor

    def _encode_text(self, prompt: str) -> Text:
        context, _, pooled, _ = self.encode_prompt(prompt, do_classifier_free_guidance=False)
        return Text(context.to(self.unet.dtype), pooled.to(self.unet.dtype))

    # --- one step

    @torch.no_grad()
    def reference_kv(
        self, reference: EncodedReference, noise: Tensor, t: Tensor, conditional: bool = True
    ) -> KeysValues:
        """The reference pass at time step t: keys and values of every self-attention, [rows, tokens, C].

        noise: [rows, 4, h, w] of the reference's size, the run's own initial noise where it fits; conditional: under
        the KV prompt, else under null text (never the user's negative prompt).
        """
        self._encoder_on_device()
        latents = reference.latents
        x = add_noise(latents, noise.to(latents), _alpha_bar(self.scheduler, t))
        text = reference.text if conditional else reference.text.zeros
        return self._shared_unet.export(x, t, self._condition([text], x))

    @torch.no_grad()
    def predict_noise(
        self,
        x: Tensor,
        t: Tensor,
        text: Text,
        null_text: Text,
        reference: EncodedReference | None = None,
        kv: KeysValues | None = None,
        null_kv: KeysValues | None = None,
        scales: Scales | None = None,
        image_prompt_scale: float = 1.0,
    ) -> Tensor:
        """The guided prediction [rows, 4, h, w] for x [rows, 4, h, w], scaled as the UNet reads it, at time step t.

        kv, null_kv: from `reference_kv`, or both None for plain guidance at text + full. Only what the scales need is
        evaluated. Raises ValueError where they need both, and one is None.
        """
        scales = scales or Scales()
        if kv is None and null_kv is None:
            scales = scales.without_kv
        prompt, null_prompt = (reference.image_prompt, reference.null_image_prompt) if reference else (None, None)
        inputs = {
            "uncond": (null_text, null_prompt, None),
            "text": (text, prompt, None),
            "full_uncond": (null_text, null_prompt, null_kv),
            "full": (text, prompt, kv),
        }

        def predict(names: Sequence[str]) -> tuple[Tensor, ...]:
            texts, prompts, kvs = zip(*(inputs[name] for name in names), strict=True)
            rows = x.repeat(len(names), 1, 1, 1)
            prompt, kv = (joined(parts, len(x)) for parts in (prompts, kvs))
            read = None if prompt is None else prompt.__getitem__
            condition = self._condition(texts, x)
            concept = self._concept_rows(names, texts, len(x))
            e = self._shared_unet.predict(
                rows, t, condition, read, kv, image_prompt_scale=image_prompt_scale, concept=concept
            )
            return e.chunk(len(names))

        return guided(predict, scales)

    def _concept_rows(self, names: Sequence[str], texts: Sequence[Text], n: int) -> ConceptRows | None:
        """What a pass reads of a concept (`concept_pipeline`): n rows of each prediction that is asked for."""
        return None

    def _condition(self, texts: Sequence[Text], x: Tensor) -> Condition:
        """The texts one after another, each for all rows of x."""
        height, width = (self.vae_scale_factor * side for side in x.shape[-2:])
        time_ids = torch.tensor([height, width, 0, 0, height, width], dtype=x.dtype, device=x.device)
        return Condition.stacked([Condition(text.context, text.pooled, time_ids[None]) for text in texts], len(x))

    # --- a whole run

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        reference: EncodedReference | Image.Image | Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        scales: Scales | tuple[float, float, float] = (3.0, 2.0, 2.0),
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
        if reference is not None and not isinstance(reference, EncodedReference):
            reference = self.encode_reference(reference)
        if use_kv is None:
            able = replay is not None or (self.encoder is not None and bool(self.encoder.kv))
            use_kv = able and reference is not None
        if use_kv and reference is None:
            raise ValueError("KV injection needs a reference: pass reference, a picture of the person.")
        # The reference whose keys and values are injected
        injected = reference if use_kv and (scales.full != 0 or scales.kv != 0) else None

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
        if injected is not None and noise.shape[-2:] != injected.latents.shape[-2:]:
            # The reference has another size than the picture: noise of its own, one for all rows.
            one = generator[0] if isinstance(generator, list) else generator
            noise = randn_tensor(injected.latents.shape, generator=one, device=device, dtype=dtype)
        if injected is not None and replay is not None:
            replay.check(timesteps, scales)
        kept = KeptKV(injected) if injected is not None and keep_kv else None
        options = self.prepare_extra_step_kwargs(generator, 0.0)
        with self.progress_bar(total=len(timesteps)) as bar:
            for n, t in enumerate(timesteps):
                kv = null_kv = None
                if injected is not None and replay is not None:
                    kv, null_kv = replay.at(n, device)
                elif injected is not None:
                    kv = self.reference_kv(injected, noise, t) if scales.full else None
                    null_kv = self.reference_kv(injected, noise, t, conditional=False) if scales.kv else None
                if kept is not None:
                    kept.keep(t, kv, null_kv)
                scaled = self.scheduler.scale_model_input(x, t)
                e = self.predict_noise(scaled, t, text, null_text, reference, kv, null_kv, scales, image_prompt_scale)
                x = self.scheduler.step(e, t, x, **options, return_dict=False)[0].to(dtype)
                bar.update()
        images = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return LookaheadOutput(images=images, kv=kept)

    def _decode(self, latents: Tensor, output_type: str) -> object:
        with self._safe_vae():
            latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
            pixels = self.vae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(pixels, output_type=output_type)


def _alpha_bar(scheduler: SchedulerMixin, t: Tensor) -> Tensor:
    """alpha_bar at a time step. Between two, where some schedulers go, log sigma is interpolated.

    Raises ValueError, one sentence, for a scheduler of flow matching, which noises by another rule.
    """
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas"):
        raise ValueError(
            f"The scheduler {type(scheduler).__name__} is one of flow matching, by whose rule the pipeline does not "
            "noise a reference: use another one, such as DDIMScheduler, or draw with use_kv=False."
        )
    return alpha_bar_at(scheduler.alphas_cumprod.double().to(t.device), t)
