"""What generates pictures of plans: one small interface, and the few-step SDXL behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from ....lookahead.files.tensors import EncoderFileError, read_tensors, sha256
from ....lookahead.method.schedule import BETA_END, BETA_START
from ....sdxl import load, lora
from ....sdxl.load import ModelError, PromptEncoder
from ....sdxl.subject_attention import Sharing, SubjectAttention
from .config import GeneratorSettings, SharedAttention
from .prompts import PicturePlan


@dataclass(frozen=True, eq=False)
class GeneratedPicture:
    """A picture, uint8 [3, h, w] on the CPU, and what its generator knows of it exactly, as plain values."""

    pixels: Tensor
    exact: Mapping[str, Any] = field(default_factory=dict)


class PictureGenerator(Protocol):
    """Generates pictures: each a function of its plan, and in its last bits of the plans that are in its batch."""

    name: str
    licence: str
    digest: str  # of all weights: other ones draw other pictures

    def __call__(self, plans: Sequence[PicturePlan]) -> list[GeneratedPicture]: ...


# The distilled models of SDXL keep its noise schedule, and start from pure noise, at the last time step.
_SCHEDULE = {"beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "scaled_linear"}
SAMPLERS = {
    "ddim": lambda: DDIMScheduler(**_SCHEDULE, timestep_spacing="trailing", clip_sample=False),
    "lcm": lambda: LCMScheduler(**_SCHEDULE, original_inference_steps=50),
    "euler": lambda: EulerDiscreteScheduler(**_SCHEDULE, timestep_spacing="trailing"),
    "euler_ancestral": lambda: EulerAncestralDiscreteScheduler(**_SCHEDULE, timestep_spacing="trailing"),
    "tcd": lambda: TCDScheduler(**_SCHEDULE, timestep_spacing="trailing"),
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FewStepSDXL:
    """A few-step SDXL: a base that is one (SDXL-Turbo), or a base with a few-step LoRA, sampled by diffusers.

    Noise is drawn on the CPU from each plan's seed, so it depends on neither the batch nor the device.
    """

    def __init__(
        self,
        settings: GeneratorSettings,
        parts: tuple[UNet2DConditionModel, PromptEncoder, AutoencoderKL | AutoencoderTiny],
        branches: Mapping[str, Tensor] | None,
        files: Sequence[Path],
        device: torch.device,
    ):
        """parts: UNet, text encoders, autoencoder. branches: tensors of the LoRA. files: all weights.

        Raises ModelError, one sentence, for a LoRA that does not fit.
        """
        unet, text, vae = parts
        dtype = _DTYPES[settings.precision]
        overflows = settings.precision == "fp16" and vae.config.get("force_upcast", False)
        for module, own in ((unet, dtype), (text, dtype), (vae, torch.float32 if overflows else dtype)):
            nn.Module.to(module.eval(), device, own)  # (diffusers' own warns of layers that it does not have)
        if device.type == "cpu":  # faster there
            unet.set_attn_processor(AttnProcessor())
            for model in (text.first, text.second):
                model.set_attn_implementation("eager")
        vae.to(memory_format=torch.channels_last)  # a plain CNN: quicker so
        if branches is not None:
            try:
                added = lora.load(branches, unet, f"generator.lora {settings.lora}")
            except EncoderFileError as error:
                raise ModelError(str(error)) from error
            added.to(device, dtype).attach(unet).scale = settings.lora_scale
        self.settings, self.vae = settings, vae
        self.name = " + ".join(Path(n).name for n in (settings.base, settings.lora) if n)
        self.licence, self.digest = settings.licence, digest_files(files)
        self.pipe = StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=text.first,
            text_encoder_2=text.second,
            tokenizer=text.tokenizers[0],
            tokenizer_2=text.tokenizers[1],
            unet=unet,
            scheduler=SAMPLERS[settings.sampler](),
            add_watermarker=False,
        )
        self.pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, plans: Sequence[PicturePlan]) -> list[GeneratedPicture]:
        latents = self.pipe(
            [plan.prompt for plan in plans],
            height=self.settings.size,
            width=self.settings.size,
            num_inference_steps=self.settings.steps,
            guidance_scale=self.settings.guidance,
            generator=[torch.Generator().manual_seed(plan.seed) for plan in plans],
            output_type="latent",
        ).images
        decoded = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        return [GeneratedPicture(pixels) for pixels in to_bytes(decoded / 2 + 0.5)]


class ConsistentSDXL(FewStepSDXL):
    """Any SDXL whose pictures of a person are sampled together and share attention (`sdxl.subject_attention`)."""

    def __init__(self, settings: GeneratorSettings, *parts: Any):
        super().__init__(settings, *parts)
        shared = settings.shared or SharedAttention()
        self.subject = SubjectAttention(self.pipe.unet, Sharing(**shared.model_dump()))

    def __call__(self, plans: Sequence[PicturePlan]) -> list[GeneratedPicture]:
        """plans: all pictures of each of their people, one after another."""
        pictures: list[GeneratedPicture] = []
        for _, each in groupby(plans, key=lambda plan: plan.person.number):
            theirs = list(each)
            words = [subject_tokens(self.pipe.tokenizer, plan.prompt, plan.person.description) for plan in theirs]
            with self.subject.shared(words, self.settings.steps, theirs[0].seed):
                pictures += super().__call__(theirs)
        return pictures


def subject_tokens(tokenizer: Any, prompt: str, subject: str) -> list[int]:
    """Places of the subject's tokens in a prompt's; of all words, where they are not found."""
    ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
    wanted = tokenizer(subject, add_special_tokens=False).input_ids
    for first in range(1, len(ids) - len(wanted)):
        if ids[first : first + len(wanted)] == wanted:
            return list(range(first, first + len(wanted)))
    return list(range(1, max(2, len(ids) - 1)))


def read_few_step(
    settings: GeneratorSettings, device: torch.device, folder: Path | None = None, *beside: Path
) -> FewStepSDXL:
    """The generator of public files. folder: what `settings.base` stands for, where it is a name; beside: where the
    LoRA is looked for too.

    Raises FileNotFoundError, ModelError or EncoderFileError, one sentence.
    """
    base = folder or load.found("base", settings.base, section="generator")
    branches, vae, files = None, None, weights_in(base)
    if settings.lora is not None:
        path = _existing("generator.lora", settings.lora, "a few-step LoRA such as LCM-LoRA's", *beside)
        branches, files = read_tensors(path)[0], [*files, path]
    if settings.vae is not None:
        vae = _existing("generator.vae", settings.vae, "an autoencoder of SDXL as a diffusers folder")
        files = [*files, *weights_in(vae)]
    dtype = torch.float32 if device.type == "cpu" else _DTYPES[settings.precision]
    kind = ConsistentSDXL if settings.kind == "consistent" else FewStepSDXL
    return kind(settings, load.load_base(base, dtype, vae), branches, files, device)


def _existing(field: str, name: str, what: str, *beside: Path) -> Path:
    for path in (Path(name).expanduser(), *(folder / name for folder in beside)):
        if path.exists():
            return path
    raise FileNotFoundError(f"There is no {name}, which {field} names: get {what} and write its path there.")


def to_bytes(pictures: Tensor) -> Tensor:
    """[n, 3, h, w] in about [0, 1] -> uint8 on the CPU."""
    return (pictures.float().clamp(0, 1) * 255).round().byte().cpu()


def weights_in(path: Path) -> list[Path]:
    """A file of weights, or all of a diffusers folder."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".bin"))


def digest_files(files: Sequence[Path]) -> str:
    """One hash of several files' contents, whatever they are called and where they lie."""
    return hashlib.sha256("".join(sha256(path) for path in files).encode()).hexdigest()
