"""The KV encoder's trained part: low-rank changes of attention projections, under the host's memory management."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import nn

from ...lookahead.files.encoder_file import EncoderFile
from ...lookahead.method.kv_encoder import LowRank


class KVNetwork(nn.Module):
    """Low-rank changes by layer name, such as "kv_encoder.<path of the block>.attn1.to_q"; in the file's precision.

    The host's `manual_cast` operations cast each weight to the precision of what comes in.
    """

    def __init__(self, file: EncoderFile):
        super().__init__()
        self.layers = nn.ModuleDict()
        self.widths: dict[str, tuple[int, int]] = {}
        for name, (a, b) in file.kv_layers.items():
            rank, width_in = a.shape
            with torch.device("meta"):
                layer = LowRank(width_in, b.shape[0], rank, file.kv_scale(rank), comfy.ops.manual_cast)
            layer.load_state_dict({"lora_A.weight": a, "lora_B.weight": b}, assign=True)
            self.layers[name.replace(".", "/")] = layer
            self.widths[name] = (width_in, b.shape[0])
        self.requires_grad_(False).eval()

    def change(self, half: str, path: str, projection: str) -> LowRank | None:
        """The change of one projection ("attn1.to_q", ...) of a block, None where the file has none."""
        name = f"{half}.{path}.{projection}".replace(".", "/")
        return self.layers[name] if name in self.layers else None


def kv_patcher(file: EncoderFile) -> comfy.model_patcher.ModelPatcher | None:
    """The KV encoder of a file as the host manages models; None where the file has none (training-free)."""
    if not file.kv:
        return None
    return comfy.model_patcher.ModelPatcher(
        KVNetwork(file),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
