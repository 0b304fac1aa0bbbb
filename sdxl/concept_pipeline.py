"""From one picture of anything to drawings of it in plain diffusers (after arXiv 2307.06925; constants are ours).

    pipe.load_concept_encoder("concept_encoder.safetensors", image_encoder="CLIP-ViT-H-14-laion2B-s32B-b79K")
    concept = pipe.tune_concept(pipe.predict_concept(picture), picture)
    pipe("a comic of a S* on a beach", concept=concept).images[0].save("drawn.png")

Who stays in stock diffusers takes the two files of `write_stock`: a LoRA and an embedding, the concept alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..lookahead.files.concept_file import read_concept, read_concept_encoder
from ..lookahead.files.tensors import sha256
from ..lookahead.method.concept import Concept, ConceptEncoder
from ..lookahead.method.concept_input import TEMPLATES, ConceptError, check_blend
from ..lookahead.method.concept_tuning import Tuning
from .concept import ConceptRows, check_concept, prompt_ids
from .concept_maker import KEPT, concept_rows, encode_concept_prompts, predict_concept, tuner
from .images import as_pixels
from .load import Frozen, PromptEncoder
from .pipeline import LookaheadOutput, LookaheadPipeline
from .reference import Text
from .shared_unet import SharedUNet, rows_of_each

ROWS = ("all", "conditional")


@dataclass(frozen=True, eq=False)
class _Drawn:
    """A concept in one call of the pipeline. hard: the context of the plain path, a row a picture, once it is known."""

    concept: Concept
    blend: float
    strength: float
    rows: str
    pooled: str
    hard: Tensor | None = None


class ConceptPipeline(LookaheadPipeline):
    """`LookaheadPipeline` that also draws concepts. Without one it is its parent; image prompt and KV injection act
    beside a concept."""

    concept_encoder: ConceptEncoder | None = None
    concept_words: dict[int, str] = {}
    concept_metadata: dict[str, str] = {}
    _drawn: _Drawn | None = None

    def load_concept_encoder(
        self, path: str | os.PathLike[str], image_encoder: Any | str | os.PathLike[str] = None
    ) -> None:
        """Load a concept encoder's file, in place of one that was loaded before.

        image_encoder: folder of the CLIP image encoder that it was trained with, or the model itself; None where the
        pipeline has it already. Raises EncoderFileError, one sentence, for a file that is none.
        """
        encoder, words, metadata = read_concept_encoder(path)
        if isinstance(image_encoder, str | os.PathLike):
            from transformers import CLIPVisionModelWithProjection

            image_encoder = CLIPVisionModelWithProjection.from_pretrained(Path(image_encoder), dtype=self.unet.dtype)
        if image_encoder is not None:
            self.register_modules(image_encoder=image_encoder)
        self.concept_encoder, self.concept_words = encoder, words
        self.concept_metadata = metadata | {"encoder_hash": sha256(path)}

    def load_concept(self, path: str | os.PathLike[str]) -> Concept:
        """A concept from its file, checked against this base. Raises EncoderFileError or ConceptError, one sentence."""
        concept = read_concept(path)
        check_concept(concept, self.unet, self._prompt_encoder)
        return concept

    def predict_concept(self, image: Image.Image | Tensor) -> Concept:
        """The concept of one picture, untuned; a picture, or pixels [1, H, W, 3] in [0, 1]. Raises ConceptError, one
        sentence, where there is no encoder, or the picture is too small."""
        if self.concept_encoder is None:
            raise ConceptError("There is no concept encoder: call load_concept_encoder with its file first.")
        about = self.concept_metadata
        return predict_concept(
            self.concept_encoder,
            self.concept_words,
            self._frozen(),
            as_pixels(image)[0].movedim(-1, 0),
            int(about.get("size", self.default_sample_size * self.vae_scale_factor)),
            float(about.get("blend", 0.25)),
            {name: about[name] for name in ("encoder_hash", *KEPT) if name in about},
        )

    def tune_concept(
        self,
        concept: Concept,
        image: Image.Image | Tensor,
        steps: int | None = None,
        tuning: Tuning | None = None,
        checkpointing: str = "blocks",
        progress: Callable[[int, float], None] | None = None,
    ) -> Concept:
        """A copy of a concept that is more like its picture. steps: by default as its encoder was made for, else 12;
        tuning: all settings; checkpointing: what is computed twice to save memory. Raises ConceptError, one sentence;
        the pipeline is then as before."""
        settings = tuning or Tuning.of(concept, steps=steps)
        templates = concept.about.get("templates", "\n".join(TEMPLATES)).split("\n")
        with self._ejected(), tuner(self._frozen(), checkpointing) as maker:
            return maker.tune(concept, as_pixels(image)[0].movedim(-1, 0), settings, templates, progress)[0]

    @property
    def _prompt_encoder(self) -> PromptEncoder:
        return PromptEncoder((self.tokenizer, self.tokenizer_2), self.text_encoder, self.text_encoder_2)

    def _frozen(self) -> Frozen:
        if self.image_encoder is None:
            raise ConceptError("There is no image encoder: give load_concept_encoder the folder of CLIP ViT-H/14.")
        frozen = Frozen(self.unet, self._prompt_encoder, self.vae, self.image_encoder)
        frozen.readers(self._execution_device)
        return frozen

    @contextmanager
    def _ejected(self) -> Iterator[None]:
        """Within it the UNet is without an encoder's attention, which another takes the place of."""
        if self._injected is None:
            yield
            return
        self._injected.eject()
        try:
            yield
        finally:
            self._injected.inject()

    # --- drawing

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # the parent's arguments, by name
        self,
        prompt: str | list[str],
        concept: Concept | None = None,
        blend: float | None = None,
        strength: float = 1.0,
        rows: str = "all",
        pooled: str = "blended",
        **options: Any,
    ) -> LookaheadOutput:
        """Draw pictures; in the prompt S* stands for the concept.

        blend: share of the path with the concept, by default what it was tuned with; 1 is the concept alone, 0 the base
        under the prompt with its real word. strength: factor of the attention offsets; rows: "all", or
        "conditional" for none on the negative prompt; pooled: "soft", "hard" or "blended"; options: the parent's.
        Raises ConceptError, one sentence, for what does not fit.
        """
        if concept is None:
            return super().__call__(prompt, **options)
        if rows not in ROWS:
            raise ConceptError(f"rows is {rows!r}: use one of {', '.join(ROWS)}.")
        check_concept(concept, self.unet, self._prompt_encoder)
        blend = concept.blend if blend is None else check_blend(blend)
        self._drawn = _Drawn(concept, blend, strength, rows, pooled)
        alone = self._injected is None
        if alone:
            self._injected = SharedUNet(self.unet).inject()
        try:
            return super().__call__(prompt, **options)
        finally:
            self._drawn = None
            if alone and self._injected is not None:
                self._injected.eject()
                self._injected = None

    def encode_prompt(self, prompt: str | list[str], *args: Any, **options: Any) -> tuple[Tensor, ...]:
        """The parent's, but for a prompt with S* while a concept is drawn."""
        drawn = self._drawn
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if drawn is None:
            return super().encode_prompt(prompt, *args, **options)
        text, n = self._prompt_encoder, options.get("num_images_per_prompt", 1)
        device = self._execution_device
        text.to(device)
        soft, hard, pooled = encode_concept_prompts(
            text, prompt_ids(text, prompts), drawn.concept, drawn.blend, drawn.pooled
        )
        null = super().encode_prompt(["" for _ in prompts], *args, **options)
        self._drawn = replace(drawn, hard=hard.repeat_interleave(n, 0))
        return soft.repeat_interleave(n, 0), null[1], pooled.repeat_interleave(n, 0), null[3]

    def _concept_rows(self, names: Sequence[str], texts: Sequence[Text], n: int) -> ConceptRows | None:
        drawn = self._drawn
        if drawn is None:
            return None
        conditional = [not name.endswith("uncond") for name in names]
        hard = [
            drawn.hard if acts and drawn.hard is not None else text.context
            for acts, text in zip(conditional, texts, strict=True)
        ]
        whole = rows_of_each([h.to(texts[0].context) for h in hard], n)
        rows = concept_rows(drawn.concept, len(whole), whole, drawn.blend, drawn.strength)
        if drawn.rows == "all":
            return rows
        share = torch.tensor([drawn.blend * acts for acts in conditional]).repeat_interleave(n)
        return replace(rows, blend=share.to(whole).view(-1, 1, 1))
