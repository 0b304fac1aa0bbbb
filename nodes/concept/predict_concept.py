"""The node that turns one picture into a concept."""

from __future__ import annotations

import comfy.model_management
from comfy_api.latest import io, ui
from torch import Tensor

from ...lookahead.method.concept import LOOKS, Concept, concept_of, nearest_words
from ...lookahead.method.concept_input import ConceptError, check_picture, picture_hash
from ...lookahead.vision.images import centre_square, clip_input
from ..conditioning.unet_blocks import self_attentions
from ..reference.images import split_alpha
from ..schema import schema
from ..sockets import CONCEPT, CONCEPT_ENCODER
from .clip_words import check_words, dictionary_of
from .concept_files import LoadedConceptEncoder
from .host_features import looked_at

NAMED = 5  # nearest words that are shown


class LookaheadPredictConcept(io.ComfyNode):
    """CONCEPT_ENCODER, models and a picture -> CONCEPT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadPredictConcept",
            display_name="Predict Lookahead Concept",
            category="lookahead/concept",
            has_intermediate_output=True,
            description="Turns one picture of anything into a concept by one pass of the encoder: a word for prompts "
            "(S*) and low-rank offsets of the model's attention. Tune it afterwards for likeness.",
            search_aliases=["DATE", "concept", "textual inversion", "e4t", "one picture", "personalization"],
            inputs=[
                CONCEPT_ENCODER.Input("concept_encoder", tooltip="From Load Lookahead Concept Encoder."),
                io.Model.Input(
                    "model",
                    tooltip="The SDXL model that the concept will be drawn with; some encoders look at its UNet.",
                ),
                io.Clip.Input(
                    "clip", tooltip="The CLIP of the same checkpoint, whose words the concept is compared with."
                ),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The image encoder that the concept encoder was trained with."
                ),
                io.Image.Input(
                    "image",
                    tooltip="One picture of the concept; the square about its middle is looked at. 64 pixels at least.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The VAE of the same checkpoint, for encoders that also read what the model's UNet makes "
                    "of the picture. Else leave it open.",
                ),
            ],
            outputs=[
                CONCEPT.Output("CONCEPT", display_name="concept", tooltip="For Tune, Save, Encode Prompt and Apply."),
                io.String.Output(
                    "WORDS", display_name="nearest words", tooltip="The real words that it is nearest to, with cosines."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, concept_encoder: LoadedConceptEncoder, model, clip, clip_vision, image: Tensor, vae=None
    ) -> io.NodeOutput:
        picture = one_picture(image)
        square = centre_square(picture, concept_encoder.size)
        comfy.model_management.load_model_gpu(clip_vision.patcher)
        pixels = clip_input(square.movedim(-1, 1), clip_vision.image_size).to(clip_vision.load_device)
        features = clip_vision.model(pixel_values=pixels, intermediate_output=-2)[1].float().mean(1)
        seen = None
        if concept_encoder.reads_unet:
            if vae is None:
                raise ConceptError(
                    f"{concept_encoder.name} reads what the UNet makes of the picture, and there is no VAE to encode "
                    "it: connect vae."
                )
            network, latents = concept_encoder.network, vae.encode(square)
            seen = looked_at(network, concept_encoder.name, model, clip, latents, LOOKS)
        prediction = concept_encoder.predict(features, seen)
        dictionary = dictionary_of(clip, concept_encoder.words)
        about = {
            "picture_hash": picture_hash(picture[0].movedim(-1, 0)),
            "size": str(concept_encoder.size),
            "steps": "0",
            "encoder_hash": concept_encoder.digest,
        }
        kept = ("base_model", "base_model_hash", "templates", "tuning")
        about |= {name: concept_encoder.about[name] for name in kept if name in concept_encoder.about}
        concept = concept_of(prediction, dictionary, concept_encoder.blend, about)
        check_words(clip, concept)
        check_blocks(model, concept)
        places, cosines = nearest_words(concept.word_l[None], concept.word_g[None], dictionary, NAMED)
        pairs = zip(places[0].tolist(), cosines[0].tolist(), strict=True)
        text = "\n".join(f"{dictionary.texts[place]} {cosine:.3f}" for place, cosine in pairs)
        return io.NodeOutput(concept, text, ui=ui.PreviewText(text))


def one_picture(image: Tensor) -> Tensor:
    """The one picture of an IMAGE, [1, H, W, 3], read as a reference is (`split_alpha`): what is transparent is white.

    Raises ValueError, one sentence, for several pictures and for one that is too small or no picture.
    """
    if len(image) != 1:
        raise ConceptError(
            f"The image is a batch of {len(image)} pictures, and a concept is made of one: choose one of them."
        )
    check_picture(*image.shape[1:3])
    return split_alpha(image)[0]


def square_of(image: Tensor, size: int) -> Tensor:
    """The square about the middle of the one picture of an IMAGE, [1, size, size, 3]. Raises as `one_picture`."""
    return centre_square(one_picture(image), size)


def check_blocks(model, concept: Concept) -> None:
    """Raise ConceptError, one sentence, where a concept was not made for a model of this layout; ValueError where the
    model is not SDXL."""
    blocks = {block.path: block for block in self_attentions(model)}
    for name, (a, b) in concept.offsets.items():
        path, _, layer = name.partition(".attn")
        block = blocks.get(path)
        read = None if block is None else block.context_width if layer in ("2.to_k", "2.to_v") else block.width
        if block is None or (a.shape[1], b.shape[0]) != (read, block.width):
            there = "no such block" if block is None else f"{read} -> {block.width}"
            raise ConceptError(
                f"The concept was made for another base model: it changes {name} ({a.shape[1]} -> {b.shape[0]}), and "
                f"this MODEL has {there}: use the checkpoint that it was made with."
            )
