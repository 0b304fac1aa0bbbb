"""A LOOKAHEAD_ENCODER carries the trained networks of an encoder file, under the host's memory management."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor

from ...lookahead.files.encoder_file import EncoderFile, reference_size
from ...lookahead.files.reference_file import weights_mark
from ...lookahead.method.image_prompt import ImagePromptNetwork
from ...lookahead.method.kv_encoder import KVEncoder

if TYPE_CHECKING:
    from ...lookahead.files.face_id_file import FaceIDFile


class LoadedEncoder:
    """An encoder file ready for use, its tensors taken over without a copy and in the file's precision.

    mark: by which a saved reference knows the encoder that it was read with (`reference_file.weights_mark`).
    network: of the image prompt, managed by `patcher`; kv_patcher: manages the `KVEncoder`, None where the file has
    none (training-free). The host's `manual_cast` operations cast each weight to the precision of what comes in.
    """

    lora_patcher: comfy.model_patcher.ModelPatcher | None = None  # of a LoRA that the image prompt comes with

    def __init__(self, file: EncoderFile):
        network = ImagePromptNetwork.from_weights(file.sizes, file.image_proj, file.ip_adapter, comfy.ops.manual_cast)
        self._take(file, network, file.kv)
        self.kv_patcher = kv_patcher(file)

    def _take(self, file: EncoderFile | FaceIDFile, network: torch.nn.Module, others: Mapping[str, Tensor]) -> None:
        """What both kinds of encoder have: names, sizes, a mark, and a network that the host manages."""
        self.name = file.name
        self.sizes = file.sizes
        self.widths = file.widths
        self.metadata = file.metadata
        self.network = network
        self.mark = weights_mark([*network.state_dict().items(), *others.items()])
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.network,
            load_device=comfy.model_management.text_encoder_device(),
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )

    @property
    def size(self) -> int:
        """Side in pixels of the square that the VAE sees of a reference: from the file, else 1024 (SDXL)."""
        return reference_size(self.metadata)

    def load(self) -> torch.device:
        """Have the host bring the networks to their device, and return it."""
        comfy.model_management.load_model_gpu(self.patcher)
        return self.patcher.load_device

    def tokens(self, features: Tensor) -> Tensor:
        """Image features [rows, patches, image_width] -> tokens [rows, tokens, context_width], in float32."""
        return self.network.image_proj(features.to(device=self.load(), dtype=torch.float32))

    def keys_values(self, tokens: Tensor) -> Tensor:
        """Tokens [rows, tokens, context_width] -> keys and values of every cross-attention, packed along the channels.

        [rows, tokens, 2 * sum(widths)]: for each cross-attention, in the file's order, its keys and then its values.
        They depend on neither the noise nor the step, so they are made once. (SDXL, one row: 16 x 166400 numbers.)
        """
        pairs = self.network.keys_values(tokens.to(self.load()))
        return torch.cat([projected for pair in pairs for projected in pair], dim=-1)


def keys_values_of(encoder: LoadedEncoder, tokens: Tensor, null_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a subject's tokens and of its null tokens, packed, where the host keeps what nodes hand on."""
    device = comfy.model_management.intermediate_device()
    return encoder.keys_values(tokens).to(device), encoder.keys_values(null_tokens).to(device)


def kv_patcher(file: EncoderFile) -> comfy.model_patcher.ModelPatcher | None:
    """The KV encoder of a file as the host manages models; None where the file has none (training-free)."""
    if not file.kv:
        return None
    return comfy.model_patcher.ModelPatcher(
        KVEncoder.from_weights(file.kv_layers, file.kv_scale, comfy.ops.manual_cast),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
