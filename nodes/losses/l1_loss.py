"""The node for likeness of colours, place by place."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ...lookahead.losses.l1 import L1Loss
from ..schema import schema
from ..sockets import LOSS
from .lookahead_loss import LookaheadLoss
from .network import pictures_of


class LookaheadL1Loss(io.ComfyNode):
    """Pictures -> LOOKAHEAD_LOSS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadL1Loss",
            display_name="Lookahead L1 Loss",
            category="lookahead/losses",
            description="How far the colours of a picture are from those of another, place by place: a rough layout in "
            "blurred colours. Needs no file and no package. For the Lookahead Guidance Sampler.",
            search_aliases=["colour", "color", "palette", "layout guidance", "pixel loss", "mean absolute error"],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="What the picture should be like, place by place; a sketch in flat colours will do. "
                    "Several go to the images of a batch in turn. Another shape is cropped about its centre.",
                ),
                io.Int.Input(
                    "size",
                    default=32,
                    min=0,
                    max=2048,
                    step=8,
                    tooltip="Shorter side in pixels at which colours are compared; the smaller, the freer the details. "
                    "0: every pixel.",
                ),
            ],
            outputs=[
                LOSS.Output("LOSS", display_name="loss", tooltip="For the Lookahead Guidance Sampler, or to combine."),
            ],
        )

    @classmethod
    def execute(cls, image: Tensor, size: int = 32) -> io.NodeOutput:
        with torch.inference_mode(False):  # else the picture could not take part in gradients
            return io.NodeOutput(LookaheadLoss(L1Loss(pictures_of(image), size), (), "L1"))
