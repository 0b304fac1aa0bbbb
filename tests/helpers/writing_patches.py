"""Patches of a model that write into the tensors that they are given, as FreeU does, and the same without."""

import torch


def pure(t):
    """A part of t changed, in a new tensor."""
    half = t.shape[1] // 2
    return torch.cat([t[:, :half] * (1 + 0.1 * t[:, :half].mean().tanh()), t[:, half:]], dim=1)


def writing(t):
    """The same change, written into t."""
    half = t.shape[1] // 2
    t[:, :half] = t[:, :half] * (1 + 0.1 * t[:, :half].mean().tanh())
    return t


def with_patches(model, change):
    """A clone of a model that changes what goes into its blocks, out of them, out of cross-attention, and into layers
    of one type."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import Upsample  # where a host is

    def upsample(layer, x, emb, context, options, output_shape, *others):
        return layer(change(x), output_shape=output_shape)

    model = model.clone()
    model.set_model_input_block_patch(lambda h, options: change(h))
    model.set_model_output_block_patch(lambda h, hsp, options: (change(h), change(hsp)))
    model.set_model_attn2_output_patch(lambda n, extra: change(n))
    model.set_model_forward_timestep_embed_patch((Upsample, upsample))
    return model
