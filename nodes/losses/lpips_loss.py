"""The node for likeness of layout, shape and texture by LPIPS."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ...lookahead.losses.cutouts import Cutouts
from ...lookahead.losses.lpips import LPIPSLoss
from ...lookahead.vision.perceptual import BACKBONES, lpips_network
from ..schema import schema
from ..sockets import LOSS
from .lookahead_loss import LookaheadLoss
from .network import FOLDER, GradientPatcher, find_file, fingerprint, pictures_of

FILE, RANDOM = "from a file", "random"


def backbone_path(backbone: str) -> str:
    """Path of a backbone's weights. Raises FileNotFoundError, one sentence, with what to get and where to put it."""
    begins, public = BACKBONES[backbone]
    wanted = f"LPIPS with {backbone} has no weights: get {public} from https://download.pytorch.org/models/{public}"
    return find_file(FOLDER, (begins,), wanted)


class LookaheadLPIPSLoss(io.ComfyNode):
    """Pictures -> LOOKAHEAD_LOSS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadLPIPSLoss",
            display_name="Lookahead LPIPS Loss",
            category="lookahead/losses",
            description="How far a picture is from another in layout, shapes and texture, place by place (LPIPS, by "
            "the package of that name). For the Lookahead Guidance Sampler.",
            search_aliases=["lpips", "perceptual loss", "layout guidance", "composition"],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="What the picture should be like, place by place. Several go to the images of a batch in "
                    "turn. Another shape is cropped about its centre.",
                ),
                io.Combo.Input(
                    "backbone",
                    options=list(BACKBONES),
                    default="vgg",
                    tooltip="The network that compares: vgg guides best, alex agrees best with people, squeeze is the "
                    "smallest.",
                ),
                io.Int.Input(
                    "size",
                    default=256,
                    min=0,
                    max=2048,
                    step=8,
                    tooltip="Shorter side in pixels at which pictures are compared; smaller looks at layout rather "
                    "than detail, and saves memory. 0: as they are.",
                ),
                io.Int.Input(
                    "views",
                    default=2,
                    min=0,
                    max=64,
                    tooltip="How many random views (cut from both pictures alike) are compared beside the whole "
                    "picture at each iteration. More make it harder to please the network with an invisible pattern, "
                    "and take longer.",
                ),
                io.Combo.Input(
                    "weights",
                    options=[FILE, RANDOM],
                    default=FILE,
                    tooltip="From a file of models/lookahead_losses; or random ones, which need no file: a rough "
                    "measure for trying things out, not the published one.",
                ),
            ],
            outputs=[
                LOSS.Output("LOSS", display_name="loss", tooltip="For the Lookahead Guidance Sampler, or to combine."),
            ],
        )

    @classmethod
    def validate_inputs(cls, backbone: str = "vgg", weights: str = FILE) -> bool | str:
        """Say before the run that a file is missing."""
        for name, value, known in (("backbone", backbone, list(BACKBONES)), ("weights", weights, [FILE, RANDOM])):
            if value is not None and value not in known:  # None: it comes by a link
                return f"The input {name} is {value!r}: choose one of {', '.join(known)}."
        try:
            if weights == FILE and backbone is not None:
                backbone_path(backbone)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, backbone: str = "vgg", weights: str = FILE, **settings) -> str:
        """Load again when the file was replaced."""
        try:
            return fingerprint(backbone_path(backbone)) if weights == FILE else str(weights)
        except (OSError, KeyError):  # missing, or it comes by a link
            return str(backbone)

    @classmethod
    def execute(
        cls, image: Tensor, backbone: str = "vgg", size: int = 256, views: int = 2, weights: str = FILE
    ) -> io.NodeOutput:
        with torch.inference_mode(False):  # else the weights could not take part in gradients
            network = lpips_network(backbone, backbone_path(backbone) if weights == FILE else None)
            patcher = GradientPatcher(network)
            loss = LPIPSLoss(network, pictures_of(image), size, Cutouts(views))
        name = "LPIPS" if weights == FILE else "LPIPS (random weights)"
        return io.NodeOutput(LookaheadLoss(loss, (patcher,), name))
