"""The node for likeness to pictures and words by CLIP."""

from __future__ import annotations

import logging

import comfy.sd1_clip
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ...lookahead.losses.base import Combined, Loss
from ...lookahead.losses.cutouts import Cutouts
from ...lookahead.losses.embedding import EmbeddingLoss
from ...lookahead.vision import clip
from ..folders import file_names, nothing_chosen, searched, there
from ..schema import schema
from ..sockets import LOSS
from .lookahead_loss import LookaheadLoss
from .network import AVERAGE, ONE_EACH, GradientPatcher, fingerprint, picture_loss

FOLDER = "clip_vision"


def clip_path(name: str) -> str:
    """Path of a CLIP file. Raises FileNotFoundError, one sentence, naming the folders that were searched."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        where = searched(folder_paths.get_folder_paths(FOLDER))
        raise FileNotFoundError(
            f"There is no CLIP file {name!r}: put the model.safetensors of openai/clip-vit-large-patch14 (or another "
            f"CLIP) into {where}."
        )
    return path


def clip_found(name: str | None) -> bool | str:
    """Answers for `validate_inputs` whether a CLIP file is there: True, also where it comes by a link, or a
    sentence that says what is missing."""
    if not name:
        return nothing_chosen(file_names(FOLDER, ("",)), "CLIP file", folder_paths.get_folder_paths(FOLDER), name)
    return there(clip_path, name)


def clip_fingerprint(name: str | None) -> str:
    """Tells a CLIP file from what replaced it, for `fingerprint_inputs`."""
    try:
        return fingerprint(clip_path(name))
    except (OSError, TypeError):  # missing, or it comes by a link
        return str(name)


class LookaheadCLIPLoss(io.ComfyNode):
    """Pictures and words -> LOOKAHEAD_LOSS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadCLIPLoss",
            display_name="Lookahead CLIP Loss",
            category="lookahead/losses",
            description="How far a picture is from pictures or words, as CLIP sees them: style, mood and what there is "
            "to see, not the exact face or layout. For the Lookahead Guidance Sampler.",
            search_aliases=["clip guidance", "clip loss", "style guidance", "text guidance", "style reference"],
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=file_names(FOLDER, ("",)),
                    tooltip="A CLIP in models/clip_vision, in the layout of transformers. For words it must be a whole "
                    "CLIP (as openai/clip-vit-large-patch14), not the picture half alone.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="What the picture should be like: one or several. They are cropped to the square about "
                    "their centre.",
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    tooltip="What the picture should show, in CLIP's own words: short, such as an oil painting. Empty: "
                    "words do not count. With image as well, both count the same.",
                ),
                io.String.Input(
                    "neutral",
                    default="",
                    advanced=True,
                    tooltip="What the picture may be anyway, such as a photo of a face: what text says beyond it is "
                    "rewarded, what both say is not. Empty: the whole text.",
                ),
                io.Combo.Input(
                    "several",
                    options=[AVERAGE, ONE_EACH],
                    default=AVERAGE,
                    tooltip="With several pictures in image: their average is wanted of every picture that is drawn, "
                    "or the first is for the first image of the batch, the second for the second, and so on.",
                ),
                io.Int.Input(
                    "views",
                    default=4,
                    min=0,
                    max=64,
                    advanced=True,
                    tooltip="How many random views (cut, mirrored, a little brighter or darker) CLIP judges beside the "
                    "whole picture at each iteration. More make it harder to please CLIP with an invisible pattern, "
                    "and take longer.",
                ),
            ],
            outputs=[
                LOSS.Output("LOSS", display_name="loss", tooltip="For the Lookahead Guidance Sampler, or to combine."),
            ],
        )

    @classmethod
    def validate_inputs(cls, clip_name: str | None = None) -> bool | str:
        """Say where the file was looked for, instead of the host's 'value not in list'."""
        return clip_found(clip_name)

    @classmethod
    def fingerprint_inputs(cls, clip_name: str, **settings) -> str:
        """Load again when the file was replaced."""
        return clip_fingerprint(clip_name)

    @classmethod
    def execute(
        cls,
        clip_name: str,
        image: Tensor | None = None,
        text: str = "",
        neutral: str = "",
        several: str = AVERAGE,
        views: int = 4,
    ) -> io.NodeOutput:
        text, neutral = text.strip(), neutral.strip()
        if image is None and not text:
            raise ValueError("Nothing says what the picture should be like: connect image, or write a text.")
        if neutral and not text:
            raise ValueError("There is a neutral text, but no text to compare it with: write text, or clear neutral.")
        with torch.inference_mode(False), torch.no_grad():  # else the weights could not take part in gradients
            file = clip.read(clip_path(clip_name))
            patcher = GradientPatcher(clip.CLIPPictures(file))
            parts: dict[str, Loss] = {}
            if image is not None:
                parts["picture"] = picture_loss(patcher, image, several, views)
            if text:
                parts["words"] = EmbeddingLoss(patcher.model, text_target(file, text, neutral), Cutouts(views))
        loss = Combined(tuple((1.0, part) for part in parts.values())) if len(parts) > 1 else next(iter(parts.values()))
        return io.NodeOutput(LookaheadLoss(loss, (patcher,), f"CLIP {' and '.join(parts)}"))


def text_target(file: clip.CLIPFile, text: str, neutral: str) -> Tensor:
    """Embeds what words ask for, [1, channels]: the text, or the way to it from the neutral text."""
    if not neutral:
        return clip.embed_texts(file, token_ids([text]))
    vectors = clip.embed_texts(file, token_ids([text, neutral]))
    return clip.directions(vectors[:1], vectors[1])


def token_ids(texts: list[str]) -> Tensor:
    """CLIP's tokens [n, 77] by the host's own tokenizer, which all CLIP models share; what is too long is cut off."""
    tokenizer = comfy.sd1_clip.SDTokenizer().tokenizer
    for text in texts:
        if len(tokenizer(text)["input_ids"]) > 77:
            logging.warning("[LCM-Lookahead] CLIP reads 77 tokens, and a text is longer: its end is cut off.")
    return tokenizer(texts, truncation=True, max_length=77, padding="max_length", return_tensors="pt")["input_ids"]
