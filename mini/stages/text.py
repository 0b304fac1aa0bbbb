"""The two text encoders of the mini world, in SDXL's shape: CLIP-L (penultimate layer) and CLIP-bigG (and pooled)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ...sdxl.configs import find_tokenizer
from ..plan import SIZES

_T = SIZES["text"]
PADDING = (49407, 0)  # CLIP-L pads with its end token, bigG with 0, as the host does


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(str(find_tokenizer()))


def tokenize(tokens: CLIPTokenizer, texts: list[str]) -> Tensor:
    """int32 [n, 2, 77]: the padded ids for either encoder."""
    ids = tokens(texts, truncation=True, max_length=_T["positions"]).input_ids
    out = torch.empty(len(texts), 2, _T["positions"], dtype=torch.int32)
    for encoder, pad in enumerate(PADDING):
        out[:, encoder] = pad
    for i, row in enumerate(ids):
        out[i, :, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return out


class TextEncoders(nn.Module):
    """Both encoders; the last layer of the first is there because SDXL's files have it, nothing reads it."""

    def __init__(self) -> None:
        super().__init__()
        common = {
            "vocab_size": _T["vocabulary"],
            "max_position_embeddings": _T["positions"],
            "num_hidden_layers": _T["layers"],
            "num_attention_heads": _T["heads"],
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "attn_implementation": "eager",
        }
        width_l, width_g, ratio = _T["width_l"], _T["width_g"], _T["mlp_ratio"]
        self.l = CLIPTextModel(
            CLIPTextConfig(
                **common,
                hidden_size=width_l,
                intermediate_size=ratio * width_l,
                projection_dim=width_l,
                hidden_act="quick_gelu",
            )
        )
        self.g = CLIPTextModelWithProjection(
            CLIPTextConfig(
                **common,
                hidden_size=width_g,
                intermediate_size=ratio * width_g,
                projection_dim=width_g,
                hidden_act="gelu",
            )
        )

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [n, 2, 77] -> (embeddings [n, 77, width_l + width_g], pooled [n, width_g])."""
        hidden_l = self.l(ids[:, 0].long(), output_hidden_states=True).hidden_states[-2]
        out_g = self.g(ids[:, 1].long(), output_hidden_states=True)
        return torch.cat([hidden_l, out_g.hidden_states[-2]], -1), out_g.text_embeds
