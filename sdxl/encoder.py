"""All that is trained: the image prompt's Resampler and projections, and the KV encoder's low-rank weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from ..lookahead.files.encoder_file import EncoderFile
from ..lookahead.method.image_prompt import ImagePromptNetwork, Projections
from ..lookahead.method.kv_encoder import KVEncoder
from ..lookahead.method.resampler import ResamplerSizes

KeysValues = dict[str, tuple[Tensor, Tensor]]  # by path of the block: [B, tokens, C] each, heads not split
ImagePromptKV = Callable[[str], tuple[Tensor, Tensor]]  # path of a block -> what it reads beside the text


def block_paths(unet: UNet2DConditionModel) -> list[str]:
    """Paths of all transformer blocks in the order of the public files: down, up, middle, as the modules stand."""
    return [path for path, module in unet.named_modules() if isinstance(module, BasicTransformerBlock)]


class Encoder(ImagePromptNetwork):
    """The trained networks for a given UNet, of which only names and widths are used. Weights are float32.

    kv_rank, export_rank: of the low-rank weights of the KV encoder and of its export; 0 and 0 train no KV encoder.
    A new KV encoder changes nothing: it is the base, read twice.
    """

    def __init__(self, unet: UNet2DConditionModel, sizes: ResamplerSizes, kv_rank: int = 4, export_rank: int = 4):
        paths = block_paths(unet)
        if sizes.context_width != unet.config.cross_attention_dim:
            raise ValueError(
                f"The image prompt's tokens are {sizes.context_width} wide, and the base model reads "
                f"{unet.config.cross_attention_dim}: start from an encoder that was made for this base."
            )
        if (kv_rank > 0) != (export_rank > 0):
            raise ValueError(
                f"The ranks of KV encoder and export are {kv_rank} and {export_rank}: use 0 for both or none."
            )

        def widths(layer: str) -> tuple[int, int]:
            base = unet.get_submodule(layer)
            return base.in_features, base.out_features

        super().__init__(sizes, [widths(f"{path}.attn2.to_q")[1] for path in paths])
        self.paths = tuple(paths)
        self.kv = KVEncoder.fresh(paths, widths, kv_rank, export_rank) if kv_rank else KVEncoder()

    @classmethod
    def start_from(
        cls, file: EncoderFile, unet: UNet2DConditionModel, kv_rank: int = 4, export_rank: int = 4
    ) -> Encoder:
        """Go on from an encoder file, in 32 bit; a stock IP-Adapter Plus gets a new KV encoder of these ranks.

        Raises ValueError, one sentence, for a file of another base model or of other ranks.
        """
        check_base(file, unet)
        encoder = cls(unet, file.sizes, kv_rank, export_rank)
        encoder.image_proj.load_state_dict(file.image_proj)
        for projections, (k, v) in zip(encoder.ip_adapter, file.ip_adapter, strict=True):
            projections.load_state_dict({"to_k_ip.weight": k, "to_v_ip.weight": v})
        if encoder.kv and file.kv:
            encoder.kv.copy_from(file.kv)
        return encoder

    @classmethod
    def from_file(cls, file: EncoderFile, unet: UNet2DConditionModel) -> Encoder:
        """An encoder file as it is, frozen, in its own precision; its tensors are taken, not copied.

        Raises ValueError, one sentence, for a file of another base model.
        """
        check_base(file, unet)
        with torch.device("meta"):  # the file's tensors take these places
            encoder = cls(unet, file.sizes, 0, 0)
        encoder.assign(file.image_proj, file.ip_adapter)
        encoder.kv = KVEncoder.from_weights(file.kv_layers, file.kv_scale)
        return encoder.requires_grad_(False).eval()

    def projections(self, path: str) -> Projections:
        """The image prompt's projections of a block."""
        return self.ip_adapter[self.paths.index(path)]

    def image_prompt(self, tokens: Tensor) -> ImagePromptKV:
        """Tokens [B, T, context] as an image prompt that is projected where it is read, and so again in a pass that is
        repeated in backward."""
        return lambda path: self.projections(path)(tokens)

    def all_keys_values(self, tokens: Tensor) -> KeysValues:
        """The image prompt of all blocks, projected at once, for many passes with the same tokens."""
        return dict(zip(self.paths, self.keys_values(tokens), strict=True))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The trained tensors by learning rate: "adapter" (Resampler, projections) and, where there is one, "kv"."""
        adapter = [*self.image_proj.parameters(), *self.ip_adapter.parameters()]
        return {"adapter": adapter} | ({"kv": list(self.kv.parameters())} if self.kv else {})


def check_base(file: EncoderFile, unet: UNet2DConditionModel) -> None:
    """Raise ValueError, one sentence, where an encoder file was not made for this UNet."""
    paths = block_paths(unet)
    widths = tuple(unet.get_submodule(f"{path}.attn2.to_q").out_features for path in paths)
    context = unet.config.cross_attention_dim
    if widths != file.widths or context != file.sizes.context_width:
        raise ValueError(
            f"{file.name} was made for another base model: it has {len(file.widths)} cross-attentions and text of "
            f"width {file.sizes.context_width}, this UNet {len(widths)} and {context}: use SDXL, or the encoder "
            "made for this model."
        )
    for layer, (a, b) in file.kv_layers.items():
        path = layer.split(".", 1)[1]
        module = unet.get_submodule(path) if path.partition(".attn")[0] in paths else None
        if module is None or (module.in_features, module.out_features) != (a.shape[1], b.shape[0]):
            raise ValueError(
                f"{file.name} was made for another base model: its KV encoder does not fit this UNet at {path}: "
                "use the encoder made for this model."
            )
