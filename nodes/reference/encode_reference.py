"""The node that reads reference pictures."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import torch
from comfy_api.latest import io
from torch import Tensor

from ...lookahead.files.encoder_file import DEFAULT_KV_PROMPT, kv_prompt, reference_size
from ...lookahead.method.layer_weights import numbers
from ...lookahead.vision.face_models import FaceModels
from ...lookahead.vision.images import centre_square
from ..schema import schema
from ..sockets import ENCODER, FACE_ANALYSIS, REFERENCE
from .encoder import LoadedEncoder, keys_values_of
from .face_id_encoder import FaceIDEncoder
from .images import CENTRE, PADDED, TOP, as_square, centre_square_masks, clip_pixels, join_masks, split_alpha
from .known_faces import largest_faces
from .kv_cache import KVCache
from .subject import Reference, Subject

TOGETHER, AVERAGE, ONE_EACH = "together", "average", "one per picture"


class LookaheadEncodeReference(io.ComfyNode):
    """ENCODER, CLIP_VISION, IMAGE -> REFERENCE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadEncodeReference",
            display_name="Encode Lookahead Reference",
            category="lookahead/reference",
            description="Reads one or several pictures of a person (or thing) with an encoder. Crop to the face first; "
            "a picture that is not square is cropped about its centre.",
            search_aliases=[
                "ip-adapter encode",
                "reference image",
                "face",
                "image prompt",
                "identity",
                "portrait",
                "person",
                "personalization",
            ],
            inputs=[
                ENCODER.Input(
                    "encoder",
                    optional=True,
                    tooltip="From Load Lookahead Encoder. Only KV injection without training works without it.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The image encoder that the encoder was trained with; CLIP ViT-H/14 for the public files. "
                    "Needed for the image prompt.",
                ),
                io.Image.Input("image", tooltip="The reference: one picture, or several of one person as a batch."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Mask of the reference: its white part counts, for example without clothes or background. "
                    "One mask for all pictures or one for each. Transparency counts as masked out, so the mask of Load "
                    "Image (white where transparent) is not needed here.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The VAE of the checkpoint, only for KV injection. Else leave it open.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The CLIP of the checkpoint, only for KV injection: it reads the prompt of the reference "
                    f'that the encoder was trained with, such as "{DEFAULT_KV_PROMPT}". Else leave it open.',
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    advanced=True,
                    tooltip="A prompt of your own for the reference, only for KV injection, in place of clip.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    advanced=True,
                    tooltip="Side in pixels of the square that the VAE sees of the reference; 0 takes what the encoder "
                    "was trained with (1024 where the file does not say).",
                ),
                io.Combo.Input(
                    "several",
                    options=[TOGETHER, AVERAGE, ONE_EACH],
                    default=TOGETHER,
                    tooltip="What to do with several pictures: let all of them speak together, average them (KV "
                    "injection reads them together), or give the first picture to the first image of the batch, the "
                    "second to the second, and so on.",
                ),
                io.String.Input(
                    "picture_weights",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="A weight for each picture of the batch, such as 1, 0.5: each acts by itself, in the share "
                    "of its weight, in place of what several says. A negative one is subtracted. Empty weighs none.",
                ),
                io.Combo.Input(
                    "square",
                    options=[CENTRE, TOP, PADDED],
                    default=CENTRE,
                    optional=True,
                    advanced=True,
                    tooltip="Square of a picture that is not square. centre and top cut it, about the centre or at the "
                    "top (a portrait keeps its hair); padded keeps all of it, and the padding counts as masked out.",
                ),
                FACE_ANALYSIS.Input(
                    "face_analysis",
                    optional=True,
                    advanced=True,
                    tooltip="From Load Lookahead Face Analysis: the reference then also knows whose face it is, for "
                    "losses and scores and in a saved file. Else leave it open.",
                ),
            ],
            outputs=[
                REFERENCE.Output(
                    "REFERENCE", display_name="reference", tooltip="The reference, for the nodes that apply it."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        encoder: LoadedEncoder | None = None,
        clip_vision=None,
        image: Tensor | None = None,
        size: int = 0,
        several: str = TOGETHER,
        mask: Tensor | None = None,
        vae=None,
        clip=None,
        conditioning=None,
        picture_weights: str = "",
        square: str = CENTRE,
        face_analysis: FaceModels | None = None,
    ) -> io.NodeOutput:
        if size and size < 64:
            raise ValueError(f"size is {size}, and a reference needs at least 64 pixels: use 0 for the encoder's own.")
        colour, alpha = split_alpha(image)
        shares = shares_of(picture_weights, len(colour), several)
        several = ONE_EACH if shares else several
        face = recogniser = None
        if face_analysis is not None:
            face = largest_faces(face_analysis, colour.movedim(-1, 1))[1]
            face = face.to(comfy.model_management.intermediate_device())
            recogniser = face_analysis.recogniser
        colour, mask = as_square(colour, join_masks(colour, mask, alpha), square)
        tokens = null_tokens = keys_values = null_keys_values = None
        if encoder is not None and clip_vision is not None:
            check_clip_vision(encoder, clip_vision)
            if isinstance(encoder, FaceIDEncoder):
                raise ValueError(
                    f"{encoder.name} reads face embeddings, which this node does not make: use Encode Lookahead Face."
                )
            seen = clip_pixels(colour, mask, clip_vision)
            tokens, null_tokens = image_prompt_tokens(encoder, clip_vision, seen, several)
            keys_values, null_keys_values = keys_values_of(encoder, tokens, null_tokens)
        elif vae is None:
            raise ValueError(
                "Nothing says how to read the reference: connect encoder and clip_vision for an image prompt, or vae "
                "and clip for KV injection."
            )
        side = size or reference_size({} if encoder is None else encoder.metadata)
        pixels = centre_square(colour, side)
        subject = Subject(
            encoder=encoder,
            pixels=pixels,
            mask=None if mask is None else centre_square_masks(mask, side),
            keys_values=keys_values,
            null_keys_values=null_keys_values,
            latents=None if vae is None else vae.encode(pixels),
            kv_prompt=conditioning if clip is None or conditioning is not None else encode_prompt(clip, encoder),
            one_each=several == ONE_EACH,
            tokens=tokens,
            null_tokens=null_tokens,
            face=face,
            recogniser="" if recogniser is None else recogniser.name,
        )
        weighed = [one_picture(subject, number, share) for number, share in enumerate(shares) if share]
        return io.NodeOutput(Reference(tuple(weighed) or (subject,)))


def shares_of(text: str, pictures: int, several: str) -> list[float]:
    """The weight of each picture as a share of those above 0; empty where the text is.

    Raises ValueError, one sentence, where it does not fit the pictures.
    """
    weights = numbers(text, "The picture_weights are")
    if not weights:
        return []
    if several == ONE_EACH:
        raise ValueError(
            f"The picture_weights weigh pictures of one person, and several is {ONE_EACH!r}: leave them empty, or "
            f"choose {TOGETHER!r}."
        )
    total = sum(weight for weight in weights if weight > 0)
    if len(weights) != pictures or not total:
        raise ValueError(
            f"There are {len(weights)} picture_weights for {pictures} reference pictures: write one for each, at least "
            "one of them above 0."
        )
    return [weight / total for weight in weights]


def one_picture(subject: Subject, number: int, weight: float) -> Subject:
    """One picture of a subject that has one each, as a subject of its own."""

    def of(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else rows[number : number + 1]

    return replace(
        subject,
        pixels=of(subject.pixels),
        mask=of(subject.mask),
        keys_values=of(subject.keys_values),
        latents=of(subject.latents),
        tokens=of(subject.tokens),
        face=of(subject.face),
        one_each=False,
        weight=weight,
        cache=KVCache(),
    )


def check_clip_vision(encoder: LoadedEncoder, clip_vision) -> None:
    """Raise ValueError, one sentence, where the CLIP_VISION is not a CLIP image encoder at all."""
    kind = getattr(clip_vision, "model_type", None)
    if kind != "clip_vision_model":
        raise ValueError(
            f"The CLIP_VISION is of kind {kind}, but {encoder.name} reads a CLIP image encoder: load CLIP ViT-H/14."
        )


def image_prompt_tokens(encoder: LoadedEncoder, clip_vision, pixels: Tensor, several: str) -> tuple[Tensor, Tensor]:
    """Tokens of the image prompt and null tokens, [rows, tokens, context] and [1, tokens, context], in float32.

    pixels: [pictures, 3, S, S], the image encoder's input. Null tokens are those of an input of zeros (the mean
    colour), as in training, not of a black picture. Raises ValueError, one sentence, for a wrong image encoder.
    """
    features = image_features(encoder, clip_vision, pixels)
    return arranged(encoder.tokens(features), several)


def image_features(encoder: LoadedEncoder, clip_vision, pixels: Tensor) -> Tensor:
    """Features of an input of zeros, and of each picture's: [1 + pictures, patches, width]. Errors as above."""
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    null = torch.zeros_like(pixels[:1])
    inputs = torch.cat([null, pixels]).to(clip_vision.load_device)
    features = clip_vision.model(pixel_values=inputs, intermediate_output=-2)[1]
    if features.shape[-1] != encoder.sizes.image_width:
        raise ValueError(
            f"The CLIP_VISION gives features of width {features.shape[-1]}, but {encoder.name} reads "
            f"{encoder.sizes.image_width}: load the image encoder that it was trained with"
            + (" (CLIP ViT-H/14)." if encoder.sizes.image_width == 1280 else ".")
        )
    return features


def arranged(tokens: Tensor, several: str) -> tuple[Tensor, Tensor]:
    """Null tokens and those of each picture, [1 + pictures, tokens, context] -> tokens, as `several` has them, and null
    tokens, where the host keeps what nodes hand on."""
    null, tokens = tokens[:1], tokens[1:]
    if several == AVERAGE:
        tokens = tokens.mean(dim=0, keepdim=True)
    elif several == TOGETHER:
        # Doubling every null token leaves its softmax average as it is, so both sides keep one length.
        null = null.repeat(1, tokens.shape[0], 1)
        tokens = tokens.flatten(0, 1).unsqueeze(0)
    device = comfy.model_management.intermediate_device()
    return tokens.to(device), null.to(device)


def encode_prompt(clip, encoder: LoadedEncoder | None):
    """Conditioning of the prompt that the KV encoder was trained with (from the file, else "a photo of a face")."""
    prompt = kv_prompt({} if encoder is None else encoder.metadata)
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
