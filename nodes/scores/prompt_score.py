"""The node that says how well a picture follows a text."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import torch
from comfy_api.latest import io, ui
from torch import Tensor
from torch.nn import functional as F

from ...lookahead.vision import clip
from ...lookahead.vision.images import cover
from ..folders import file_names
from ..losses.clip_loss import FOLDER, clip_fingerprint, clip_found, clip_path, token_ids
from ..losses.network import GradientPatcher
from ..reference.images import split_alpha
from ..schema import schema
from ..sockets import SCORES
from .scores import Scores


class LookaheadPromptScore(io.ComfyNode):
    """Pictures, a text -> LOOKAHEAD_SCORES."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadPromptScore",
            display_name="Lookahead Prompt Score",
            category="lookahead/scores",
            has_intermediate_output=True,
            description="How well each picture follows a text, as CLIP sees it (CLIP-T, the cosine of picture and "
            "text). Only scores of the same CLIP and the same text can be compared.",
            search_aliases=["clip score", "clip-t", "prompt adherence", "text similarity", "best of batch"],
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=file_names(FOLDER, ("",)),
                    tooltip="A whole CLIP in models/clip_vision, in the layout of transformers, such as "
                    "openai/clip-vit-base-patch16, the paper's.",
                ),
                io.Image.Input("image", tooltip="The pictures to judge, cropped to the square about their centre."),
                io.String.Input(
                    "text", default="", multiline=True, tooltip="What they should show, as the prompt said it."
                ),
            ],
            outputs=[
                SCORES.Output("SCORES", display_name="scores", tooltip="A score a picture, for Lookahead Rank."),
                io.Float.Output("MEAN", display_name="mean", tooltip="The mean over the pictures."),
                io.String.Output("TEXT", display_name="text", tooltip="The scores in words, a line a picture."),
            ],
        )

    @classmethod
    def validate_inputs(cls, clip_name: str | None = None) -> bool | str:
        """Say where the file was looked for, instead of the host's 'value not in list'."""
        return clip_found(clip_name)

    @classmethod
    def fingerprint_inputs(cls, clip_name: str, **_) -> str:
        """Judge again when the file was replaced."""
        return clip_fingerprint(clip_name)

    @classmethod
    def execute(cls, clip_name: str, image: Tensor, text: str = "") -> io.NodeOutput:
        if not text.strip():
            raise ValueError("There is no text to compare the pictures with: write what they should show.")
        with torch.inference_mode(False), torch.no_grad():
            file = clip.read(clip_path(clip_name))
            wanted = clip.embed_texts(file, token_ids([text.strip()]))[0]
            patcher = GradientPatcher(clip.CLIPPictures(file))
            comfy.model_management.load_model_gpu(patcher)
            pictures = split_alpha(image)[0].movedim(-1, 1).clone()
            size = patcher.model.size
            seen = [
                patcher.model(cover(one[None], size, size).clamp(0, 1).to(patcher.load_device)).cpu()
                for one in pictures
            ]
            values = F.normalize(torch.cat(seen), dim=-1) @ wanted
        path = Path(clip_name)
        name = path.parent.name if path.stem == "model" and path.parent.name else path.stem
        scores = Scores(f"prompt ({name})", values)
        return io.NodeOutput(scores, scores.mean, scores.text(), ui=ui.PreviewText(scores.text()))
