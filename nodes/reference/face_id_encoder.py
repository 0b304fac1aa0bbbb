"""A loaded IP-Adapter FaceID Plus v2: an encoder that reads face embeddings beside image features."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor

from ...lookahead.files import encoder_file, face_id_file
from ...lookahead.files.face_id_file import FaceIDFile
from ...lookahead.method.face_id import AttentionLoRA, FaceIDNetwork
from .encoder import LoadedEncoder


class FaceIDEncoder(LoadedEncoder):
    """A file ready for use. lora_patcher: manages the `AttentionLoRA`, None where the file has none."""

    def __init__(self, file: FaceIDFile):
        network = FaceIDNetwork.from_weights(file.sizes, file.image_proj, file.ip_adapter, comfy.ops.manual_cast)
        self._take(file, network, {})
        self.kv_patcher = self.lora_patcher = None
        if file.lora:
            lora = AttentionLoRA.from_weights(file.lora, comfy.ops.manual_cast)
            self.lora_patcher = comfy.model_patcher.ModelPatcher(
                lora,
                load_device=comfy.model_management.get_torch_device(),
                offload_device=comfy.model_management.unet_offload_device(),
            )

    def face_tokens(self, faces: Tensor, features: Tensor) -> Tensor:
        """Face embeddings [rows, face_width] and image features [rows, patches, image_width] -> tokens, in float32."""
        device = self.load()
        faces, features = (t.to(device=device, dtype=torch.float32) for t in (faces, features))
        return self.network.image_proj(faces, features)


def load(path: str) -> tuple[LoadedEncoder, str]:
    """An encoder file of either kind, ready for use, and what it says of itself. Raises EncoderFileError."""
    file = face_id_file.read_encoder(path)
    if isinstance(file, FaceIDFile):
        return FaceIDEncoder(file), face_id_file.provenance(file)
    return LoadedEncoder(file), encoder_file.provenance(file)
