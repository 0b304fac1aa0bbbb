"""The node that reads faces for an IP-Adapter FaceID."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy_api.latest import io
from torch import Tensor

from ...lookahead.vision.face_models import FaceModels
from ...lookahead.vision.faces import align, template
from ..schema import schema
from ..sockets import ENCODER, FACE_ANALYSIS, REFERENCE
from .encode_reference import AVERAGE, ONE_EACH, TOGETHER, arranged, check_clip_vision, image_features
from .encoder import LoadedEncoder, keys_values_of
from .face_id_encoder import FaceIDEncoder
from .images import clip_pixels, split_alpha
from .known_faces import largest_faces
from .subject import Reference, Subject

CROP = 224  # pixels a side of the aligned face that the image encoder sees, as in training


class LookaheadEncodeFace(io.ComfyNode):
    """ENCODER (FaceID), CLIP_VISION, FACE_ANALYSIS, IMAGE -> REFERENCE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadEncodeFace",
            display_name="Encode Lookahead Face",
            category="lookahead/reference",
            description="Reads the largest face of each picture with an IP-Adapter FaceID Plus v2: who it is by a face "
            "recogniser, and how it looks by CLIP. No crop is needed.",
            search_aliases=[
                "faceid",
                "face id",
                "ip-adapter faceid",
                "arcface",
                "insightface",
                "face",
                "identity",
                "instantid",
                "pulid",
                "portrait",
                "person",
            ],
            inputs=[
                ENCODER.Input("encoder", tooltip="From Load Lookahead Encoder: ip-adapter-faceid-plusv2_sdxl.bin."),
                io.ClipVision.Input(
                    "clip_vision", tooltip="CLIP ViT-H/14, the image encoder that it was trained with."
                ),
                FACE_ANALYSIS.Input(
                    "face_analysis",
                    tooltip="From Load Lookahead Face Analysis: buffalo_l has the recogniser that it was trained with.",
                ),
                io.Image.Input("image", tooltip="One picture, or several of one person as a batch."),
                io.Combo.Input(
                    "several",
                    options=[TOGETHER, AVERAGE, ONE_EACH],
                    default=AVERAGE,
                    tooltip="What to do with several pictures: let all of them speak together, average them, or give "
                    "the first picture to the first image of the batch, the second to the second, and so on.",
                ),
            ],
            outputs=[
                REFERENCE.Output(
                    "REFERENCE", display_name="reference", tooltip="The reference, for the nodes that apply it."
                ),
                io.Image.Output("FACE", display_name="face", tooltip="The faces as they were read, upright."),
            ],
        )

    @classmethod
    def execute(
        cls, encoder: LoadedEncoder, clip_vision, face_analysis: FaceModels, image: Tensor, several: str = AVERAGE
    ) -> io.NodeOutput:
        if not isinstance(encoder, FaceIDEncoder):
            raise ValueError(f"{encoder.name} reads no face embeddings: use Encode Lookahead Reference for it.")
        check_clip_vision(encoder, clip_vision)
        colour, _ = split_alpha(image)
        faces, embeddings = largest_faces(face_analysis, colour.movedim(-1, 1))
        if embeddings.shape[-1] != encoder.sizes.face_width:
            raise ValueError(
                f"The face pack {face_analysis.name} gives embeddings of width {embeddings.shape[-1]}, and "
                f"{encoder.name} reads {encoder.sizes.face_width}: use the pack that it was trained with (buffalo_l)."
            )
        points = torch.stack([face.points for face in faces])
        crops = align(colour.movedim(-1, 1), points.to(colour.device), template(CROP), CROP).clamp(0, 1).movedim(1, -1)
        features = image_features(encoder, clip_vision, clip_pixels(crops, None, clip_vision))
        nobody = torch.zeros_like(embeddings[:1])
        tokens, null_tokens = arranged(encoder.face_tokens(torch.cat([nobody, embeddings]), features), several)
        keys_values, null_keys_values = keys_values_of(encoder, tokens, null_tokens)
        subject = Subject(
            encoder=encoder,
            pixels=crops,
            mask=None,
            keys_values=keys_values,
            null_keys_values=null_keys_values,
            one_each=several == ONE_EACH,
            tokens=tokens,
            null_tokens=null_tokens,
            face=embeddings.to(comfy.model_management.intermediate_device()),
            recogniser=face_analysis.recogniser.name,
        )
        return io.NodeOutput(Reference((subject,)), crops)
