"""What tests see of the passes through a UNet, beside the nodes that are tested."""

from types import SimpleNamespace

import torch
from worlds import KV_PROMPT, World


class UNetPasses:
    """What was asked of the UNet, seen by hooks on its modules, which know nothing of our nodes.

    rows: for each row of each pass of the picture (text, number of the image, what the middle's first self-attention
    read beside the row itself), for example ("positive", 0, ("face 0",)): "face" is the reference's own prompt, "zeros"
    are zero embeddings, and the number is that of the row in the reference pass at the same noise level.
    """

    def __init__(self, world: World, **texts):
        self.texts = {"face": world.text(KV_PROMPT), **texts}
        self.unet = world.model.model.diffusion_model
        self.passes, self.references = [], []
        middle = self.unet.middle_block[1].transformer_blocks[0].attn1.to_k
        self._hooks = [
            self.unet.register_forward_pre_hook(self._begins, with_kwargs=True),
            middle.register_forward_hook(self._projects),
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()

    def model(self, model):
        """A clone of a model whose attention is watched."""
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = self._attends
        return model

    def clear(self):
        self.passes.clear()
        self.references.clear()

    @property
    def rows(self) -> list[tuple]:
        return [row for one in self.passes for row in one.rows]

    def _name(self, context) -> str:
        if not context.any():
            return "zeros"
        return next(name for name, text in self.texts.items() if torch.equal(context, text[0][0][0].to(context)))

    def _begins(self, _, args, kwargs):
        x, t = args[:2]
        options = kwargs["transformer_options"]
        names = [self._name(row) for row in kwargs["context"]]
        images = len(names) // len(options["cond_or_uncond"])
        rows = [(name, n % images, ()) for n, name in enumerate(names)]
        of_reference = set(names) <= {"face", "zeros"}
        self.now = SimpleNamespace(
            x=x, t=float(t[0]), names=names, rows=rows, options=options, keys=None, of_reference=of_reference
        )
        (self.references if of_reference else self.passes).append(self.now)

    def _projects(self, _, args, out):
        if self.now.keys is None:  # after a reference pass the inputs that it gave are projected as well
            self.now.keys = out

    def _attends(self, attention, q, k, v, *args, **kwargs):
        own = self.now.keys
        if own is not None and k.shape[-1] == own.shape[-1] and torch.equal(k[:, : own.shape[1]], own):
            for n, keys in enumerate(k[:, own.shape[1] :]):
                found = self._labels(keys)
                if found:  # an attention that is blended with a plain one is called twice
                    self.now.rows[n] = (*self.now.rows[n][:2], found)
        return attention(q, k, v, *args, **kwargs)

    def _labels(self, keys) -> tuple[str, ...]:
        known = {}
        for one in self.references:
            for name in ("face", "zeros") if one.t == self.now.t else ():
                rows = [keys for keys, own in zip(one.keys, one.names, strict=True) if own == name]
                known |= {f"{name} {n}": row for n, row in enumerate(rows)}
        parts = keys.split(len(next(iter(known.values())))) if len(keys) else ()
        # What was kept is projected again, in other batches perhaps: on some processors that rounds differently.
        return tuple(
            next(name for name, row in known.items() if torch.dist(part, row) < 1e-4 * row.norm()) for part in parts
        )
