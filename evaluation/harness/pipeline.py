"""The back end that draws with diffusers: `sdxl`'s pipeline, under the same noise as the host's."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...lookahead.method.guidance import Scales
from ...lookahead.method.schedule import BETA_END, BETA_START
from ...sdxl import load  # first: it cures what diffusers' own imports need
from ...sdxl.images import read
from ...sdxl.pipeline import EncodedReference, LookaheadPipeline
from .backends import Backend, Setting
from .library import EvaluationError, Library
from .memory import own_peak
from .methods import Method
from .scenes import Drawable, Drawn, PictureJob
from .sections import DrawingOptions

SDXL = {"beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "scaled_linear", "steps_offset": 1}
# The host's sampler and scheduler -> what draws the same in diffusers
SCHEDULERS: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("dpmpp_2m", "karras"): ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("euler", "karras"): ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("ddim", "ddim_uniform"): ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
}


@contextmanager
def open_backend(setting: Setting) -> Iterator[Backend]:
    """The pipeline with the models of the setting, on a GPU where there is one."""
    yield PipelineBackend(setting)


class PipelineBackend:
    """A loaded pipeline (`Backend`)."""

    def __init__(self, setting: Setting):
        import diffusers

        drawing = setting.drawing
        known = SCHEDULERS.get((drawing.sampler, drawing.scheduler))
        if known is None:
            some = "; ".join(" with ".join(pair) for pair in SCHEDULERS)
            raise EvaluationError(
                f"drawing.sampler is {drawing.sampler} with {drawing.scheduler}, which diffusers does not have in the "
                f"host's form: use {some}, or the back end host alone."
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        unet, text, vae = load.load_base(setting.files.folder, dtype)
        kind, options = known
        encoder = setting.files.image_encoder_folder
        self.pipe = LookaheadPipeline(
            vae=vae,
            text_encoder=text.first,
            text_encoder_2=text.second,
            tokenizer=text.tokenizers[0],
            tokenizer_2=text.tokenizers[1],
            unet=unet,
            scheduler=getattr(diffusers, kind)(**SDXL, **options),
            image_encoder=load.load_image_encoder(encoder, dtype) if encoder else None,
            add_watermarker=False,
        ).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.about = f"diffusers {importlib.metadata.version('diffusers')}"
        self._setting = setting
        self._encoder: Path | None = None
        self._read: tuple[object, EncodedReference] | None = None

    def check(self, name: str, method: Method, job: PictureJob) -> None:
        """Nothing can be missing that a method's own files do not say."""

    def draw(self, method: Drawable, job: PictureJob, weight: float) -> Drawn:
        begun, peak = time.perf_counter(), own_peak(self.pipe.device)
        try:
            image = method.in_diffusers(_Scene(self, job, self._setting.drawing, self._setting.library), weight)
        except ValueError as error:
            raise EvaluationError(f"{method.kind}, {job.prompt.text!r}, {job.person.name}: {error}") from None
        return Drawn(image, time.perf_counter() - begun, peak.bytes)

    def load(self, encoder: Path) -> None:
        """Have an encoder in the UNet, read once as long as it stays."""
        if self._encoder != encoder:
            self.pipe.load_encoder(encoder)
            self._encoder = encoder

    def reference(self, job: PictureJob, size: int) -> EncodedReference:
        """The person as the encoder reads them, once as long as both stay. size: of what the VAE sees."""
        key = (self._encoder, job.person.digest, size)
        if self._read is None or self._read[0] != key:
            pixels = read(job.person.reference).movedim(0, -1)[None]
            self._read = key, self.pipe.encode_reference(pixels, size)
        return self._read[1]


class _Scene:
    """The pipeline for one picture (`DiffusersScene`)."""

    def __init__(self, backend: PipelineBackend, job: PictureJob, drawing: DrawingOptions, library: Library):
        self._backend, self._job, self.drawing, self.library = backend, job, drawing, library

    def load(self, encoder: Path) -> None:
        self._backend.load(encoder)

    def draw(
        self,
        scales: tuple[float, float, float] | None,
        weight: float = 1.0,
        use_kv: bool = False,
        reference: bool = False,
    ) -> Image.Image:
        size, drawing = self.drawing.size, self.drawing
        numbers = torch.Generator().manual_seed(self._job.noise_seed)
        noise = torch.randn(1, 4, size // 8, size // 8, generator=numbers)
        person = self._backend.reference(self._job, size) if use_kv or reference else None
        pipe = self._backend.pipe
        return pipe(
            self._job.prompt.text,
            reference=person,
            negative_prompt=drawing.negative,
            height=size,
            width=size,
            num_inference_steps=drawing.steps,
            scales=Scales(*(scales or (drawing.guidance, 0.0, 0.0))),
            image_prompt_scale=weight,
            use_kv=use_kv,
            latents=noise.to(pipe.device, pipe.unet.dtype),
        ).images[0]
