"""The node that says how much a picture shows the person of a reference."""

from __future__ import annotations

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ...lookahead.losses.identity import embed, largest
from ...lookahead.vision.face_models import FaceModels
from ..losses.identity_loss import OF_THE_PACK, load_recogniser, person_input, read_person, recogniser_files
from ..losses.network import AVERAGE, FOLDER, ONE_EACH, GradientPatcher, fingerprint
from ..reference.images import split_alpha
from ..reference.subject import Reference
from ..schema import schema
from ..sockets import FACE_ANALYSIS, SCORES
from .scores import Scores


class LookaheadIdentityScore(io.ComfyNode):
    """Pictures, pictures of a person or a REFERENCE -> LOOKAHEAD_SCORES."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadIdentityScore",
            display_name="Lookahead Identity Score",
            category="lookahead/scores",
            has_intermediate_output=True,
            description="How much each picture shows the person of the reference, by a face recogniser: 1 is the same, "
            "about 0 is somebody else. A recogniser that a picture was steered by flatters it: judge by another.",
            search_aliases=["face similarity", "arcface", "identity", "likeness", "face distance", "best of batch"],
            inputs=[
                FACE_ANALYSIS.Input(
                    "face_analysis",
                    tooltip="From Load Lookahead Face Analysis: finds the faces, and brings a recogniser.",
                ),
                io.Image.Input("image", tooltip="The pictures to judge. The largest face of each counts."),
                person_input("reference", "Who they should show: one picture, or several as a batch."),
                io.Combo.Input(
                    "several",
                    options=[AVERAGE, ONE_EACH],
                    default=AVERAGE,
                    tooltip="What to do with several references: they show one person, whose likeness is averaged; or "
                    "the first is for the first picture, the second for the second, and so on.",
                ),
                io.Combo.Input(
                    "recogniser",
                    options=[OF_THE_PACK, *recogniser_files()],
                    default=OF_THE_PACK,
                    tooltip="The network that tells people apart: that of the face pack, or a file of "
                    "models/lookahead_losses.",
                ),
            ],
            outputs=[
                SCORES.Output("SCORES", display_name="scores", tooltip="A score a picture, for Lookahead Rank."),
                io.Float.Output("MEAN", display_name="mean", tooltip="The mean over the pictures with a face."),
                io.String.Output("TEXT", display_name="text", tooltip="The scores in words, a line a picture."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, recogniser: str = OF_THE_PACK, **_) -> str:
        """Judge again when the file was replaced."""
        by_link = recogniser is None
        path = None if by_link or recogniser == OF_THE_PACK else folder_paths.get_full_path(FOLDER, recogniser)
        return fingerprint(path) if path else str(recogniser)

    @classmethod
    def execute(
        cls,
        face_analysis: FaceModels,
        image: Tensor,
        reference: Tensor | Reference,
        several: str = AVERAGE,
        recogniser: str = OF_THE_PACK,
    ) -> io.NodeOutput:
        with torch.inference_mode(False), torch.no_grad():
            patcher = GradientPatcher(load_recogniser(face_analysis, recogniser))
            comfy.model_management.load_model_gpu(patcher)
            network = patcher.model
            shown = split_alpha(image)[0].movedim(-1, 1).clone().to(patcher.load_device)
            people = read_person(patcher, face_analysis, reference, several).embeddings
            values = []
            for number, (picture, faces) in enumerate(zip(shown, face_analysis(shown), strict=True)):
                face = largest(faces)
                if face is None:
                    values.append(float("nan"))
                    continue
                found = embed(network, picture[None], face.points[None])[0].cpu()
                values.append(float(found @ people[number % len(people)]))
        scores = Scores(f"identity ({network.name})", torch.tensor(values))
        return io.NodeOutput(scores, scores.mean, scores.text(), ui=ui.PreviewText(scores.text()))
