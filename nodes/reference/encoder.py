"""What travels as LOOKAHEAD_ENCODER: the trained networks of an encoder file, under the host's memory management."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor, nn

from ...lookahead.files.encoder_file import EncoderFile
from ...lookahead.method.resampler import Resampler
from .kv_encoder import kv_patcher

DEFAULT_SIZE = 1024  # side of the reference in pixels: SDXL's own


class EncoderNetwork(nn.Module):
    """The Resampler and one pair of projections a cross-attention, in the file's precision.

    The host's `manual_cast` operations cast each weight to the precision of what comes in.
    """

    def __init__(self, file: EncoderFile):
        super().__init__()
        with torch.device("meta"):  # the file's tensors take these places: nothing is allocated or initialised twice
            self.image_proj = Resampler(file.sizes, comfy.ops.manual_cast)
            self.to_k = nn.ModuleList(self._projection(file, width) for width in file.widths)
            self.to_v = nn.ModuleList(self._projection(file, width) for width in file.widths)
        self.image_proj.load_state_dict(file.image_proj, assign=True)
        for n, (to_k, to_v) in enumerate(file.ip_adapter):
            self.to_k[n].load_state_dict({"weight": to_k}, assign=True)
            self.to_v[n].load_state_dict({"weight": to_v}, assign=True)
        self.requires_grad_(False).eval()

    @staticmethod
    def _projection(file: EncoderFile, width: int) -> nn.Module:
        return comfy.ops.manual_cast.Linear(file.sizes.context_width, width, bias=False)


class Encoder:
    """An encoder file ready for use. `file` is what was read, without its weights' second copy being made."""

    def __init__(self, file: EncoderFile):
        self.name = file.name
        self.sizes = file.sizes
        self.widths = file.widths
        self.metadata = file.metadata
        self.network = EncoderNetwork(file)
        self.kv_patcher = kv_patcher(file)
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.network,
            load_device=comfy.model_management.text_encoder_device(),
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )

    @property
    def size(self) -> int:
        """Side in pixels of the square that the VAE sees of a reference: from the file, else 1024 (SDXL)."""
        text = self.metadata.get("size", "")
        return int(text) if text.isdecimal() and int(text) >= 64 else DEFAULT_SIZE

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
        tokens = tokens.to(self.load())
        pairs = zip(self.network.to_k, self.network.to_v, strict=True)
        return torch.cat([projection(tokens) for pair in pairs for projection in pair], dim=-1)
