"""The node that finds a face and cuts it out."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ...lookahead.vision.face_models import SIZES, THRESHOLD, FaceModels
from ...lookahead.vision.faces import Face, square_around
from ..schema import schema
from ..sockets import BOUNDING_BOX, FACE_ANALYSIS
from .face_crop import ORDERS, SMALLEST, aligned_crop, drawing, faces_in_boxes, in_order, natural_size, plain_crop
from .images import split_alpha

PLAIN, ALIGNED = "as it is", "upright"
ERROR, SKIP, WHOLE = "error", "skip the picture", "whole picture"
INSIDE, PAD = "move inside", "pad"


def sizes_of(text: str) -> list[int]:
    """Numbers between commas or blanks. Raises ValueError, one sentence."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise ValueError(
            f"The detection_sizes are {text!r}: write numbers with commas between them, such as 640, 320, 128."
        )
    return [int(word) for word in words]


class LookaheadCropFace(io.ComfyNode):
    """IMAGE, FACE_ANALYSIS or BOUNDING_BOX -> IMAGE of the faces, and a drawing of what was found."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadCropFace",
            display_name="Crop Lookahead Face",
            category="lookahead/reference",
            description="Finds the faces in a picture and cuts one of them out as a square, for Encode Lookahead "
            "Reference. The second output shows every face that was found, with its number.",
            search_aliases=["face crop", "face detailer", "insightface", "align face", "face detection", "portrait"],
            inputs=[
                FACE_ANALYSIS.Input(
                    "face_analysis",
                    optional=True,
                    tooltip="From Load Lookahead Face Analysis. With boxes it can be left open.",
                ),
                io.Image.Input("image", tooltip="One picture or a batch; each gives the face that is asked for."),
                io.Combo.Input(
                    "order",
                    options=list(ORDERS),
                    default=next(iter(ORDERS)),
                    tooltip="Order in which the faces of a picture are numbered, from 0.",
                ),
                io.Int.Input(
                    "face",
                    default=0,
                    min=-64,
                    max=63,
                    tooltip="Number of the face that is cut out, from 0; -1 is the last one.",
                ),
                io.Float.Input(
                    "margin",
                    default=0.3,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Margin around the face on each side, as a share of its size, 0 to 3.",
                ),
                io.Combo.Input(
                    "alignment",
                    options=[PLAIN, ALIGNED],
                    default=PLAIN,
                    advanced=True,
                    tooltip="Alignment of the crop. as it is: a square of the picture. upright: turned and scaled so "
                    "that eyes and mouth lie where face recognisers expect them; black where the picture ends.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    advanced=True,
                    tooltip="Side of the crop in pixels; 0 takes that of the largest crop as it is in its picture.",
                ),
                io.Combo.Input(
                    "if_none",
                    display_name="if no face",
                    options=[ERROR, SKIP, WHOLE],
                    default=ERROR,
                    advanced=True,
                    tooltip="What to do with a picture that has no such face: stop, leave it out of the batch, or take "
                    "the whole picture (its square about the centre).",
                ),
                io.String.Input(
                    "detection_sizes",
                    default=", ".join(map(str, SIZES)),
                    advanced=True,
                    tooltip="Sizes of the picture in pixels at which faces are looked for, each a multiple of 32. "
                    "Large ones find small faces, small ones a face that fills the picture.",
                ),
                io.Float.Input(
                    "threshold",
                    default=THRESHOLD,
                    min=0.05,
                    max=0.99,
                    step=0.01,
                    advanced=True,
                    tooltip="Lowest score of the detector, 0 to 1. Lower it for drawn or hidden faces.",
                ),
                BOUNDING_BOX.Input(
                    "boxes",
                    optional=True,
                    extra_dict={"forceInput": True},
                    tooltip="Faces that another node has found in the same pictures, in place of face_analysis: bboxes "
                    "of the host's own MediaPipe face node, which needs no insightface. They have no landmarks, so the "
                    "crop cannot be upright.",
                ),
                io.Combo.Input(
                    "edges",
                    options=[INSIDE, PAD],
                    default=INSIDE,
                    optional=True,
                    advanced=True,
                    tooltip="What to do where the square reaches over the edge of the picture. move inside: another "
                    "part of the picture, a smaller one where need be. pad: the face stays in the middle; the padding "
                    "is transparent, which Encode Lookahead Reference leaves out.",
                ),
            ],
            outputs=[
                io.Image.Output("IMAGE", display_name="face", tooltip="The faces, one a picture, all of one size."),
                io.Image.Output(
                    "PREVIEW",
                    display_name="preview",
                    tooltip="Every picture with all faces that were found: box, landmarks, number and score. The "
                    "one that was taken is green.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        face_analysis: FaceModels | None = None,
        image: Tensor | None = None,
        order: str = "largest first",
        face: int = 0,
        margin: float = 0.3,
        alignment: str = PLAIN,
        size: int = 0,
        if_none: str = ERROR,
        detection_sizes: str = ", ".join(map(str, SIZES)),
        threshold: float = THRESHOLD,
        boxes=None,
        edges: str = INSIDE,
    ) -> io.NodeOutput:
        if size and size < SMALLEST:
            raise ValueError(f"size is {size}, and a crop has at least {SMALLEST} pixels a side: use 0 for its own.")
        pictures = split_alpha(image)[0].movedim(-1, 1)
        height, width = pictures.shape[-2:]
        if boxes is not None:
            found = faces_in_boxes(boxes, len(pictures), threshold)
        elif face_analysis is not None:
            found = face_analysis.find(pictures, sizes_of(detection_sizes), threshold)
        else:
            raise ValueError(
                "Nothing says where the faces are: connect face_analysis (Load Lookahead Face Analysis), or boxes from "
                "the host's MediaPipe face node."
            )
        if boxes is not None and alignment == ALIGNED:
            raise ValueError(
                f"Boxes have no eyes and mouth by which a face could be turned {ALIGNED}: choose {PLAIN!r}, or connect "
                "face_analysis instead."
            )
        found = [in_order(faces, order, height, width) for faces in found]
        chosen = [numbered(faces, face) for faces in found]
        if if_none == ERROR:
            refuse_missing(found, chosen, face)
        taken = [
            (picture, None if number is None else faces[number])
            for picture, faces, number in zip(pictures, found, chosen, strict=True)
            if number is not None or if_none == WHOLE
        ]
        if not taken:
            raise ValueError(
                f"None of {len(pictures)} pictures has face {face}, so nothing is left: lower the threshold, add a "
                "detection size, or use another picture."
            )
        if edges == PAD:
            taken = [(torch.cat([picture, torch.ones_like(picture[:1])]), found_one) for picture, found_one in taken]
        cut = upright if alignment == ALIGNED else squares
        crops = cut(taken, size, margin, edges == INSIDE)
        drawn = [drawing(*part) for part in zip(pictures, found, chosen, strict=True)]
        return io.NodeOutput(torch.stack(crops).movedim(1, -1).contiguous(), torch.stack(drawn))


def numbered(faces: list[Face], number: int) -> int | None:
    """The place in the list of face `number` (-1 is the last), None where there is none."""
    place = number + len(faces) if number < 0 else number
    return place if 0 <= place < len(faces) else None


def refuse_missing(found: list[list[Face]], chosen: list[int | None], face: int) -> None:
    """Raise ValueError, one sentence, for the first picture without the face that is asked for."""
    for i, (faces, number) in enumerate(zip(found, chosen, strict=True)):
        if number is None:
            which = "the picture" if len(found) == 1 else f"picture {i + 1} of {len(found)}"
            there = f"Face {face} is not there" if faces else "No face was found"
            count = f", which has {len(faces)} (numbered from 0)" if faces else ""
            raise ValueError(
                f"{there} in {which}{count}: lower the threshold, add a detection size, or choose in if_none what to "
                "do then."
            )


def squares(taken: list[tuple[Tensor, Face | None]], size: int, margin: float, inside: bool = True) -> list[Tensor]:
    """Plain crops [channels, size, size]; without a face the picture's square about its centre."""
    cuts = []
    for picture, face in taken:
        height, width = picture.shape[-2:]
        side = min(height, width)
        whole = ((width - side) // 2, (height - side) // 2, side)
        cuts.append(whole if face is None else square_around(face, height, width, margin, inside))
    size = size or max(SMALLEST, *(side for _, _, side in cuts))
    return [plain_crop(picture, cut, size) for (picture, _), cut in zip(taken, cuts, strict=True)]


def upright(taken: list[tuple[Tensor, Face | None]], size: int, margin: float, inside: bool = True) -> list[Tensor]:
    """Aligned crops [channels, size, size]; without a face the picture's square about its centre."""
    size = size or max([natural_size(face, margin) for _, face in taken if face is not None], default=0)
    return [
        squares([(picture, None)], size, margin)[0] if face is None else aligned_crop(picture, face, size, margin)
        for picture, face in taken
    ]
