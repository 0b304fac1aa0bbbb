"""All that is trained: the image prompt's Resampler and projections, and the KV encoder's low-rank weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from ..lookahead.files.encoder_file import EncoderFile
from ..lookahead.method.attention import LowRank
from ..lookahead.method.resampler import Resampler, ResamplerSizes

KeysValues = dict[str, tuple[Tensor, Tensor]]  # by path of the block: [B, tokens, C] each, heads not split

# What the KV encoder changes in each of its blocks, and what its export changes of the keys and values handed on.
TUNED = tuple(f"attn{n}.{layer}" for n in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0"))
EXPORTED = ("attn1.to_k", "attn1.to_v")


def block_paths(unet: UNet2DConditionModel) -> list[str]:
    """Paths of all transformer blocks in the order of the public files: down, up, middle, as the modules stand."""
    return [path for path, module in unet.named_modules() if isinstance(module, BasicTransformerBlock)]


def last_path(unet: UNet2DConditionModel) -> str:
    """The block that runs last: its attentions come after every key and value that is exported."""
    ups = [path for path in block_paths(unet) if path.startswith("up_blocks")]
    return max(ups, key=lambda path: [int(n) for n in path.split(".")[1::2]])


def module_key(path: str) -> str:
    """A path of a layer as the name of a module, which holds no dots."""
    return path.replace(".", "/")


class Projections(nn.Module):
    """Keys and values of the image prompt for one cross-attention: tokens [B, T, context] -> two of [B, T, width]."""

    def __init__(self, context: int, width: int):
        super().__init__()
        self.to_k_ip = nn.Linear(context, width, bias=False)
        self.to_v_ip = nn.Linear(context, width, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_k_ip(tokens), self.to_v_ip(tokens)


class Encoder(nn.Module):
    """The trained networks for a given UNet, of which only names and widths are used. Weights are float32.

    kv_rank, export_rank: of the low-rank weights of the KV encoder and of its export; 0 and 0 train no KV encoder.
    A new KV encoder changes nothing (A is drawn from N(0, 1/rank^2), B is zero): it is the base, read twice.
    """

    def __init__(self, unet: UNet2DConditionModel, sizes: ResamplerSizes, kv_rank: int = 4, export_rank: int = 4):
        super().__init__()
        self.paths = tuple(block_paths(unet))
        if sizes.context_width != unet.config.cross_attention_dim:
            raise ValueError(
                f"The image prompt's tokens are {sizes.context_width} wide, and the base model reads "
                f"{unet.config.cross_attention_dim}: start from an encoder that was made for this base."
            )
        if (kv_rank > 0) != (export_rank > 0):
            raise ValueError(
                f"The ranks of KV encoder and export are {kv_rank} and {export_rank}: use 0 for both or none."
            )
        self.image_proj = Resampler(sizes)
        self.ip_adapter = nn.ModuleList(
            Projections(sizes.context_width, unet.get_submodule(f"{path}.attn2.to_q").out_features)
            for path in self.paths
        )
        self.kv = nn.ModuleDict()
        if kv_rank:
            last = last_path(unet)
            layers = [("kv_encoder", path, layer, kv_rank) for path in self.paths if path != last for layer in TUNED]
            layers += [("kv_export", path, layer, export_rank) for path in self.paths for layer in EXPORTED]
            for half, path, layer, rank in layers:
                base = unet.get_submodule(f"{path}.{layer}")
                change = LowRank(base.in_features, base.out_features, rank)
                nn.init.normal_(change.lora_A.weight, std=1 / rank)
                nn.init.zeros_(change.lora_B.weight)
                self.kv[module_key(f"{half}.{path}.{layer}")] = change

    @classmethod
    def start_from(
        cls, file: EncoderFile, unet: UNet2DConditionModel, kv_rank: int = 4, export_rank: int = 4
    ) -> Encoder:
        """Go on from an encoder file; a stock IP-Adapter Plus gets a new KV encoder of these ranks."""
        encoder = cls(unet, file.sizes, kv_rank, export_rank)
        widths = tuple(p.to_k_ip.out_features for p in encoder.ip_adapter)
        if widths != file.widths:
            raise ValueError(
                f"{file.name} has {len(file.widths)} cross-attentions, and the base model has {len(widths)} or others: "
                "start from an encoder that was made for this base."
            )
        encoder.image_proj.load_state_dict(file.image_proj)
        for projections, (k, v) in zip(encoder.ip_adapter, file.ip_adapter, strict=True):
            projections.to_k_ip.weight.data.copy_(k)
            projections.to_v_ip.weight.data.copy_(v)
        if encoder.kv and file.kv:
            encoder.load_kv(file.kv)
        return encoder

    def change(self, half: str, path: str, layer: str) -> LowRank | None:
        """The low-rank change of one projection; half is "kv_encoder" or "kv_export". None where there is none."""
        key = module_key(f"{half}.{path}.{layer}")
        return self.kv[key] if key in self.kv else None

    def projections(self, path: str) -> Projections:
        """The image prompt's projections of a block."""
        return self.ip_adapter[self.paths.index(path)]

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The trained tensors by learning rate: "adapter" (Resampler, projections) and, where there is one, "kv"."""
        adapter = [*self.image_proj.parameters(), *self.ip_adapter.parameters()]
        return {"adapter": adapter} | ({"kv": list(self.kv.parameters())} if self.kv else {})

    def kv_tensors(self) -> dict[str, Tensor]:
        """The KV encoder's weights under the names of the encoder file."""
        return {
            f"{key.replace('/', '.')}.lora_{which}.weight": getattr(change, f"lora_{which}").weight
            for key, change in self.kv.items()
            for which in "AB"
        }

    @torch.no_grad()
    def load_kv(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `kv_tensors`. Raises ValueError where names or ranks differ."""
        own = self.kv_tensors()
        for name in own.keys() | tensors.keys():
            if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
                raise ValueError(
                    f"The KV encoder of the file differs from the one to be trained in {name}: set kv_rank and "
                    "export_rank to the file's ranks."
                )
            own[name].copy_(tensors[name])
