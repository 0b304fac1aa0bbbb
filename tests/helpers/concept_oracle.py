"""DATE's two attention paths written out: weights merged into a copy, two whole attentions, their outputs blended.

Plain diffusers and nothing of this project. A concept is given by its offsets alone, {path of a projection: (A, B)}.
"""

import copy

import torch
from diffusers.models.attention_processor import AttnProcessor


class _Both:
    """The attention of one block with the concept's merged weights beside that of the base."""

    def __init__(self, concept, tokens, blend):
        self.concept, self.tokens, self.blend = concept, tokens, blend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *_, **__):
        soft = hard = None
        if encoder_hidden_states is not None:
            soft, hard = encoder_hidden_states[:, : self.tokens], encoder_hidden_states[:, self.tokens :]
        plain = AttnProcessor()
        return self.blend * plain(self.concept, hidden_states, soft) + (1 - self.blend) * plain(
            attn, hidden_states, hard
        )


@torch.no_grad()
def merged(unet, offsets, strength=1.0):
    """A copy of a UNet with W + strength B A in the place of W."""
    out = copy.deepcopy(unet)
    for name, (a, b) in offsets.items():
        out.get_submodule(name).weight += strength * b @ a
    return out


@torch.no_grad()
def predict(unet, offsets, x, t, soft, hard, pooled, time_ids, blend, strength=1.0):
    """The predicted noise under a soft and a hard context, [rows, tokens, C] each."""
    base, concept = copy.deepcopy(unet), merged(unet, offsets, strength)
    concept.set_attn_processor(AttnProcessor())
    attentions = [name.removesuffix(".processor") for name in base.attn_processors]
    base.set_attn_processor(
        {f"{name}.processor": _Both(concept.get_submodule(name), soft.shape[1], blend) for name in attentions}
    )
    added = {"text_embeds": pooled, "time_ids": time_ids}
    return base(x, t, torch.cat([soft, hard], 1), added_cond_kwargs=added).sample


def random_offsets(unet, rank=2, seed=41, scale=0.3):
    """Offsets of all queries, keys and values, small beside the weights."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, module in unet.named_modules():
        if name.endswith((".to_q", ".to_k", ".to_v")) and "transformer_blocks" in name:
            wide, high = module.in_features, module.out_features
            a, b = torch.randn(rank, wide, generator=g), torch.randn(high, rank, generator=g)
            out[name] = (a * wide**-0.5, b * scale * rank**-0.5)
    return out
