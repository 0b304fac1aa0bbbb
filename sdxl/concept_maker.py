"""From one picture to a concept, and the few steps that tune it, with SDXL's frozen models in diffusers' form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..lookahead.method.attention import Attention, softmax_attention
from ..lookahead.method.concept import LOOKS, Concept, ConceptEncoder, average, concept_of
from ..lookahead.method.concept_input import TEMPLATES, ConceptError, check_blend, check_picture, picture_hash
from ..lookahead.method.concept_tuning import PredictWith, Tuning, tune, words_to_try
from ..lookahead.method.schedule import add_noise, alphas_cumprod
from ..lookahead.vision.images import centre_square
from .concept import (
    ConceptRows,
    PromptIds,
    check_concept,
    dictionary_of,
    encode_hard,
    encode_soft,
    image_features,
    prompt_ids,
    unet_features,
    unet_width,
)
from .load import Frozen, PromptEncoder
from .shared_unet import Condition, SharedUNet

POOLED = ("blended", "soft", "hard")
#: What a concept takes over from its encoder's metadata.
KEPT = ("base_model", "base_model_hash", "templates", "tuning")


def squared(picture: Tensor, size: int) -> Tensor:
    """The square about the middle of a picture [3, H, W] in [0, 1], as [1, 3, size, size]. Raises ConceptError for a
    picture that is too small to show anything."""
    check_picture(*picture.shape[-2:])
    return centre_square(picture.movedim(0, -1)[None], size).movedim(-1, 1)


@torch.no_grad()
def predict_concept(
    encoder: ConceptEncoder,
    words: Mapping[int, str],
    frozen: Frozen,
    picture: Tensor,
    size: int,
    blend: float = 0.25,
    about: Mapping[str, str] | None = None,
) -> Concept:
    """The concept of one picture [3, H, W] in [0, 1], untuned: one pass of the image encoder and of `encoder`.

    words: the encoder's dictionary; size: pixels a side of what is looked at; about: more of where it comes from.
    Raises ConceptError, one sentence, where picture, encoder and base do not go together.
    """
    square = squared(picture, size)
    features = image_features(frozen, square)
    if features.shape[-1] != encoder.sizes.image_width:
        raise ConceptError(
            f"The image encoder has width {features.shape[-1]}, and the concept encoder reads "
            f"{encoder.sizes.image_width}: use the image encoder that it was trained with."
        )
    encoder = encoder.to(features.device)
    if encoder.sizes.unet_width:
        features, seen = features.expand(len(LOOKS), -1), looked_at(encoder, frozen, square)
        prediction = average(encoder(features, seen))
    else:
        prediction = encoder(features)
    dictionary = dictionary_of(frozen.text, words)
    known = {"picture_hash": picture_hash(picture), "size": str(size), "steps": "0", **(about or {})}
    concept = concept_of(prediction, dictionary, check_blend(blend), known)
    check_concept(concept, frozen.unet, frozen.text)
    return concept


def looked_at(encoder: ConceptEncoder, frozen: Frozen, square: Tensor) -> Tensor:
    """The UNet makes this of a picture [1, 3, size, size] at the time steps LOOKS, under the empty prompt and one fixed
    noise, standardised for `encoder`: [LOOKS, unet_width]."""
    check_unet(encoder, frozen)
    latents, n = frozen.latents(square).to(frozen.unet.device), len(LOOKS)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    t = torch.tensor(LOOKS, device=latents.device)
    x = add_noise(latents.expand(n, -1, -1, -1), noise, alphas_cumprod().float().to(latents.device)[t])
    text = no_text(frozen.text, n, square.shape[-1])
    return encoder.standardised(unet_features(frozen.unet, x, t, text.context, text.added), t)


def no_text(text: PromptEncoder, n: int, size: int) -> Condition:
    """The empty prompt for n pictures of a size."""
    context, pooled = text("")
    time_ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32, device=context.device)
    return Condition.stacked([Condition(context, pooled, time_ids)], n)


def check_unet(encoder: ConceptEncoder, frozen: Frozen) -> None:
    """Raise ConceptError, one sentence, where an encoder reads another UNet's features."""
    width = unet_width(frozen.unet)
    if width != encoder.sizes.unet_width:
        raise ConceptError(
            f"This base's UNet gives {width} features, and the concept encoder reads {encoder.sizes.unet_width}: use "
            "the base that it was trained on."
        )


def concept_rows(concept: Concept, n: int, hard: Tensor | None, blend: float, strength: float = 1.0) -> ConceptRows:
    """A concept as all n rows of a pass read it. strength multiplies the offsets alone."""
    offsets = {}
    for name, (a, b) in concept.offsets.items():
        scaled = b if strength == 1 else b * strength
        offsets[name] = a.expand(n, *a.shape), scaled.expand(n, *b.shape)
    return ConceptRows(offsets, hard, blend)


def encode_concept_prompts(
    text: PromptEncoder, ids: PromptIds, concept: Concept, blend: float, pooled: str = "blended"
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft context, hard context [n, 77, C] and pooled text [n, p] of prompts with a concept in their placeholder.

    pooled: which of the two gives the pooled text, which enters the UNet once: "soft", "hard", or "blended" as the
    paths are. Blend 0 is the base under the hard prompt to the bit, blend 1 the soft one alone.
    """
    if pooled not in POOLED:
        raise ConceptError(f"pooled is {pooled!r}: use one of {', '.join(POOLED)}.")
    share = {"soft": 1.0, "hard": 0.0, "blended": check_blend(blend)}[pooled]
    device = text.first.device
    words = concept.word_l.to(device)[None], concept.word_g.to(device)[None]
    soft, soft_pooled = encode_soft(text, ids, *words)
    with torch.no_grad():
        hard, hard_pooled = encode_hard(text, ids, torch.tensor([concept.word_id]))
    if share in (0.0, 1.0):
        return soft, hard, soft_pooled if share else hard_pooled
    return soft, hard, share * soft_pooled + (1 - share) * hard_pooled


class ConceptTuner:
    """Tunes concepts with the frozen models of one base, whose UNet it gives back as it was (`close`).

    checkpointing: of SharedUNet; a step of SDXL fits into 16 GB with "blocks".
    """

    def __init__(self, frozen: Frozen, checkpointing: str = "none", attention: Attention = softmax_attention):
        self.frozen = frozen
        self.shared = SharedUNet(frozen.unet, attention=attention).inject(checkpointing)

    def close(self) -> None:
        """The UNet computes as before."""
        self.shared.eject()

    def tune(
        self,
        concept: Concept,
        picture: Tensor,
        tuning: Tuning,
        templates: Sequence[str] = TEMPLATES,
        progress: Callable[[int, float], None] | None = None,
        make_room: bool = False,
    ) -> tuple[Concept, list[float]]:
        """A tuned copy of the concept, and the loss of every step; picture: [3, H, W] in [0, 1], the one that it was
        predicted from. make_room: what reads pictures leaves the device once it has read this one.

        Raises ConceptError, one sentence, where concept, picture and base do not go together.
        """
        frozen, size = self.frozen, int(concept.about.get("size", 8 * frozen_size(self.frozen)))
        check_concept(concept, frozen.unet, frozen.text)
        square = squared(picture, size)
        views = frozen.latents(torch.cat([square, square.flip(-1)])).to(frozen.unet.device)
        if make_room:
            for model in (frozen.vae, frozen.vision):
                model.to("cpu")
        predict = self.predictor(templates, tuning.blend, size)
        alpha_bar = alphas_cumprod().float().to(views.device)
        words = dictionary_of(frozen.text, words_to_try(concept, tuning))
        with torch.enable_grad():
            return tune(concept, views, alpha_bar, predict, tuning, words, progress=progress)

    def predictor(self, templates: Sequence[str], blend: float, size: int) -> PredictWith:
        """Gives what the tuning asks of a base: noise predicted with a concept, with gradients to its tensors."""
        frozen, dtype, device = self.frozen, self.frozen.unet.dtype, self.frozen.unet.device
        ids = prompt_ids(frozen.text, list(templates))
        side = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32, device=device)

        def predict(concept: Concept, x: Tensor, t: Tensor, number: int) -> Tensor:
            chosen = ids.rows(torch.tensor([number % len(templates)]))
            soft, hard, pooled = encode_concept_prompts(frozen.text, chosen, concept, blend)
            rows = concept_rows(concept, 1, hard.to(device, dtype), blend)
            condition = Condition(soft.to(device, dtype), pooled.to(device, dtype), side)
            return self.shared.predict(x.to(dtype), t, condition, concept=rows)

        return predict


@contextmanager
def tuner(
    frozen: Frozen, checkpointing: str = "none", attention: Attention = softmax_attention
) -> Iterator[ConceptTuner]:
    """A `ConceptTuner` for a while; afterwards, also after an error, the UNet is as it was."""
    made = ConceptTuner(frozen, checkpointing, attention)
    try:
        yield made
    finally:
        made.close()


def frozen_size(frozen: Frozen) -> int:
    """The side of a latent that the base was made for."""
    return int(frozen.unet.config.sample_size)
