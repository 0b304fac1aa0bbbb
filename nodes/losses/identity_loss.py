"""The node for likeness of a person."""

from __future__ import annotations

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ...lookahead.losses.face_views import FaceViews
from ...lookahead.losses.identity import LAST, NONE, REFERENCE, FaceReferences, IdentityLoss, read_references
from ...lookahead.vision import arcface
from ...lookahead.vision.face_models import FaceModels
from ...lookahead.vision.perceptual import BACKBONES
from ..folders import file_names
from ..reference.images import split_alpha
from ..reference.known_faces import known_people
from ..reference.subject import Reference
from ..schema import schema
from ..sockets import FACE_ANALYSIS, LOSS
from ..sockets import REFERENCE as REFERENCE_SOCKET
from .lookahead_loss import LookaheadLoss
from .network import AVERAGE, EXTENSIONS, FOLDER, ONE_EACH, GradientPatcher, fingerprint

OF_THE_PACK = "of the face pack"
FALLBACKS = {"last place, else the reference's": REFERENCE, "last place": LAST, "does not count": NONE}


def recogniser_files() -> list[str]:
    """Files of models/lookahead_losses that may be recognisers: not LPIPS's."""
    others = tuple(begins for begins, _ in BACKBONES.values())
    return [name for name in file_names(FOLDER, (*EXTENSIONS, ".onnx")) if not name.startswith(others)]


def load_recogniser(face_analysis: FaceModels, name: str) -> arcface.Recogniser:
    """The pack's recogniser, or that of a file. Raises ValueError or FileNotFoundError, one sentence."""
    if name != OF_THE_PACK:
        return arcface.read(folder_paths.get_full_path_or_raise(FOLDER, name))
    if face_analysis.recogniser is None:
        raise ValueError(
            f"The face pack {face_analysis.name} has no recogniser: use a whole pack, or choose a file of "
            "models/lookahead_losses as recogniser."
        )
    return arcface.read(face_analysis.recogniser, face_analysis.preprocessing)


def open_recogniser(face_analysis: FaceModels, name: str) -> GradientPatcher:
    """The recogniser, loaded. Call it outside of inference mode, else the weights could not take part in gradients."""
    patcher = GradientPatcher(load_recogniser(face_analysis, name))
    comfy.model_management.load_model_gpu(patcher)
    return patcher


def person_input(name: str, tooltip: str, optional: bool = False) -> io.Input:
    """An input that takes a person as pictures or as a reference that knows their face."""
    return io.MultiType.Input(
        name,
        types=[io.Image, REFERENCE_SOCKET],
        optional=optional,
        tooltip=f"{tooltip} Or a reference that knows its face, for example from Load Lookahead Reference.",
    )


def read_person(
    patcher: GradientPatcher, face_analysis: FaceModels, image: Tensor | Reference, several: str
) -> FaceReferences:
    """Who is in IMAGE [n, H, W, 1 to 4], or whom a reference knows. Raises NoFaceError or ValueError, one sentence."""
    if isinstance(image, Reference):
        return known_people(image, patcher.model, patcher.load_device, several == AVERAGE)
    pictures = split_alpha(image)[0].movedim(-1, 1).clone().to(patcher.load_device)
    return read_references(patcher.model, face_analysis, list(pictures), several == AVERAGE)


def face_analysis_input() -> io.Input:
    """The input of the face pack."""
    return FACE_ANALYSIS.Input(
        "face_analysis",
        tooltip="From Load Lookahead Face Analysis: finds the faces, and brings a recogniser.",
    )


def recogniser_input(advanced: bool | None = None) -> io.Input:
    """The choice of the network that tells people apart."""
    return io.Combo.Input(
        "recogniser",
        options=[OF_THE_PACK, *recogniser_files()],
        default=OF_THE_PACK,
        advanced=advanced,
        tooltip="The network that tells people apart: that of the face pack (through onnx2torch), or a "
        "file of models/lookahead_losses, such as model_ir_se50.pth, the paper's. It has a licence of its "
        "own.",
    )


def views_input() -> io.Input:
    """The number of random views of a face that a loss looks at; files from before it have 0."""
    return io.Int.Input(
        "views",
        default=0,
        min=0,
        max=32,
        optional=True,
        advanced=True,
        tooltip="How many random views of the face (moved and turned a little, in another light, with grain) are "
        "judged at each iteration, instead of its one crop, so that a pattern in one crop pleases the recogniser less. "
        "0: the one crop.",
    )


def fingerprint_of_recogniser(name: str | None) -> str:
    """Changes when the file of the recogniser was replaced; None: it comes by a link."""
    by_link = name is None
    path = None if by_link or name == OF_THE_PACK else folder_paths.get_full_path(FOLDER, name)
    return fingerprint(path) if path else str(name)


class LookaheadIdentityLoss(io.ComfyNode):
    """FACE_ANALYSIS, pictures of a person or a REFERENCE -> LOOKAHEAD_LOSS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadIdentityLoss",
            display_name="Lookahead Identity Loss",
            category="lookahead/losses",
            description="How unlike the person in a picture is to the one of the reference, by a face recogniser "
            "(ArcFace). For the Lookahead Guidance Sampler.",
            search_aliases=[
                "identity loss",
                "arcface",
                "face similarity",
                "likeness",
                "id loss",
                "insightface",
                "portrait",
                "person",
            ],
            inputs=[
                face_analysis_input(),
                person_input(
                    "image",
                    "Who the picture should show: one picture, or several as a batch. The largest face of each counts.",
                ),
                io.Combo.Input(
                    "several",
                    options=[AVERAGE, ONE_EACH],
                    default=AVERAGE,
                    tooltip="What to do with several pictures: they show one person, whose likeness is averaged; or "
                    "the first is for the first image of the batch, the second for the second, and so on.",
                ),
                recogniser_input(),
                io.Combo.Input(
                    "no_face",
                    display_name="if no face",
                    options=list(FALLBACKS),
                    default=next(iter(FALLBACKS)),
                    tooltip="Where the face of a preview is taken to be when none is found in it: where it was last, "
                    "else at its place in the reference; where it was last, else the preview does not count; or it "
                    "never counts.",
                ),
                views_input(),
            ],
            outputs=[
                LOSS.Output("LOSS", display_name="loss", tooltip="For the Lookahead Guidance Sampler, or to combine."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, recogniser: str = OF_THE_PACK, **_) -> str:
        """Load again when the file was replaced."""
        return fingerprint_of_recogniser(recogniser)

    @classmethod
    def execute(
        cls,
        face_analysis: FaceModels,
        image: Tensor | Reference,
        several: str = AVERAGE,
        recogniser: str = OF_THE_PACK,
        no_face: str = next(iter(FALLBACKS)),
        views: int = 0,
    ) -> io.NodeOutput:
        with torch.inference_mode(False):
            patcher = open_recogniser(face_analysis, recogniser)
            references = read_person(patcher, face_analysis, image, several)
        loss = IdentityLoss(patcher.model, face_analysis, references, FALLBACKS[no_face], views=FaceViews(views))
        return io.NodeOutput(LookaheadLoss(loss, (patcher,), "identity"))
