"""KV injection and the three-scale guidance, written as plainly as possible on diffusers' UNet.

What the nodes are compared with, so it shares no code with them: attention is an explicit softmax in attention
processors of its own, low-rank weights are merged into a copy of the UNet, and nothing is cached or left out. A
transformer block is named by its diffusers path, for example "mid_block.attentions.0.transformer_blocks.0".
"""

import copy
import re

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

KeysValues = dict[str, tuple[Tensor, Tensor]]  # block -> keys and values, each [rows, tokens, C] (heads not split)

ENCODER_LAYERS = [f"{attn}.{to}" for attn in ("attn1", "attn2") for to in ("to_q", "to_k", "to_v", "to_out.0")]
EXPORT_LAYERS = ["attn1.to_k", "attn1.to_v"]


def blocks(unet) -> dict[str, BasicTransformerBlock]:
    """All transformer blocks by name."""
    return {name: m for name, m in unet.named_modules() if isinstance(m, BasicTransformerBlock)}


def last_block(unet) -> str:
    """The transformer block that is executed last: what its attentions give reaches no exported keys and values."""
    ups = [name for name in blocks(unet) if name.startswith("up_blocks")]
    return max(ups, key=lambda name: [int(number) for number in name.split(".")[1::2]])


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head. q: [rows, n, C]; k, v: [rows, m, C]; the result: [rows, n, C]."""
    rows, n, width = q.shape
    q, k, v = (x.reshape(rows, x.shape[1], heads, width // heads).movedim(2, 1) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / (width // heads) ** 0.5
    return (torch.softmax(scores, dim=-1) @ v).movedim(1, 2).reshape(rows, n, width)


class SelfAttention:
    """Processor: keys and values of a reference, if any, stand behind the picture's own under one softmax.

    `seen`, if given, receives the input of the attention, LN1(h): [rows, n, C].
    """

    def __init__(self, block: str, kv: KeysValues, seen: dict[str, Tensor] | None = None):
        self.block, self.kv, self.seen = block, kv, seen

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        if self.seen is not None:
            self.seen[self.block] = hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if self.block in self.kv:
            k_ext, v_ext = (x.expand(q.shape[0], -1, -1) for x in self.kv[self.block])
            k, v = torch.cat([k, k_ext], dim=1), torch.cat([v, v_ext], dim=1)
        return attn.to_out[0](attend(q, k, v, attn.heads))


class CrossAttention:
    """Processor: the text, plus `scale` times the image prompt under a softmax of its own."""

    def __init__(self, block: str, image_prompt: KeysValues, scale: float = 1.0):
        self.block, self.image_prompt, self.scale = block, image_prompt, scale

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        out = attend(q, k, v, attn.heads)
        if self.block in self.image_prompt:
            k_ip, v_ip = (x.expand(q.shape[0], -1, -1) for x in self.image_prompt[self.block])
            out = out + self.scale * attend(q, k_ip, v_ip, attn.heads)
        return attn.to_out[0](out)


def run(unet, x, t, context, pooled, time_ids, kv=None, image_prompt=None, scale=1.0, seen=None) -> Tensor:
    """One pass of the UNet with the processors above, which are taken out again."""
    before = unet.attn_processors
    processors = {}
    for name in blocks(unet):
        processors[f"{name}.attn1.processor"] = SelfAttention(name, kv or {}, seen)
        processors[f"{name}.attn2.processor"] = CrossAttention(name, image_prompt or {}, scale)
    unet.set_attn_processor(processors)
    try:
        rows = x.shape[0]
        added = {"text_embeds": pooled.expand(rows, -1), "time_ids": time_ids.expand(rows, -1)}
        context = context.expand(rows, -1, -1)
        return unet(x, t, encoder_hidden_states=context, added_cond_kwargs=added).sample
    finally:
        unet.set_attn_processor(before)


def delta(lora: dict[str, Tensor], name: str, alpha: float | None) -> Tensor | float:
    """What is added to a weight [out, in]: B @ A, times alpha / rank where the file has an alpha. 0 without LoRA."""
    if f"{name}.lora_A.weight" not in lora:
        return 0.0
    a, b = lora[f"{name}.lora_A.weight"], lora[f"{name}.lora_B.weight"]
    return (b @ a) * (1.0 if alpha is None else alpha / a.shape[0])


def export(unet, x, t, context, pooled, time_ids, lora, alpha=None) -> KeysValues:
    """The reference pass: keys and values [rows, tokens, C] of every block.

    x: the noised reference as the UNet reads it [rows, 4, h, w]; context [1 or rows, tokens, context]; pooled and
    time_ids [1 or rows, ...]; lora: weights under the encoder file's names, {} for a training-free pass.

    The pass itself runs with the tuned weights. What it exports are LN1(h) times the BASE's own to_k and to_v plus
    the export's low-rank weights.
    """
    tuned = copy.deepcopy(unet)
    for name in blocks(tuned):
        if name == last_block(unet):
            continue
        for layer in ENCODER_LAYERS:
            weight = tuned.get_submodule(f"{name}.{layer}").weight
            weight.data = weight.data + delta(lora, f"kv_encoder.{name}.{layer}", alpha)
    seen: dict[str, Tensor] = {}
    run(tuned, x, t, context, pooled, time_ids, seen=seen)
    kv = {}
    for name, block in blocks(unet).items():
        w_k = block.attn1.to_k.weight + delta(lora, f"kv_export.{name}.attn1.to_k", alpha)
        w_v = block.attn1.to_v.weight + delta(lora, f"kv_export.{name}.attn1.to_v", alpha)
        kv[name] = (seen[name] @ w_k.T, seen[name] @ w_v.T)
    return kv


def predict(unet, x, t, context, pooled, time_ids, kv=None, image_prompt=None, scale=1.0) -> Tensor:
    """The noise prediction of the picture, [rows, 4, h, w], with or without reference KV and image prompt.

    x: the latents as the UNet reads them; kv: block -> (K, V), [rows, m, C] or [1, m, C] for all rows; image_prompt:
    block -> (K_ip, V_ip), likewise, acting `scale` times.
    """
    return run(unet, x, t, context, pooled, time_ids, kv, image_prompt, scale)


def guided(e_nu, e_nt, e_fu, e_ft, w_n: float, w_f: float, w_k: float) -> Tensor:
    """Three-scale guidance: n without reference KV, f with it; u without text, t with it."""
    return e_nu + w_n * (e_nt - e_nu) + w_f * (e_ft - e_nu) + w_k * (e_fu - e_nu)


def noised(latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """What the UNet reads of a scaled reference latent at sigma; all [rows, 4, h, w]."""
    return (latents + sigma * noise) / (sigma**2 + 1) ** 0.5


def image_prompt(unet, weights: dict[str, Tensor], tokens: Tensor) -> KeysValues:
    """Keys and values of an image prompt's tokens [rows, 16, context], by the numbering of the public files.

    It counts all attentions as diffusers lists them: a block's self-attention is even, its cross-attention odd.
    """
    numbers = {name.removesuffix(".processor"): n for n, name in enumerate(unet.attn_processors)}
    found = {}
    for name in blocks(unet):
        k, v = (weights[f"ip_adapter.{numbers[name + '.attn2']}.to_{which}_ip.weight"] for which in "kv")
        found[name] = (tokens @ k.T, tokens @ v.T)
    return found


def random_lora(unet, rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Low-rank weights under the encoder file's names, each delta half as strong as the weight it is added to."""
    g = torch.Generator().manual_seed(seed)
    names = [f"kv_encoder.{b}.{layer}" for b in blocks(unet) if b != last_block(unet) for layer in ENCODER_LAYERS]
    names += [f"kv_export.{b}.{layer}" for b in blocks(unet) for layer in EXPORT_LAYERS]
    lora = {}
    for name in names:
        weight = unet.get_submodule(re.sub(r"^kv_\w+\.", "", name)).weight
        out, width = weight.shape
        strength = 0.5 * weight.square().mean().sqrt() * (width / rank) ** 0.5
        lora[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=g) * width**-0.5
        lora[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=g) * strength
    return lora
