"""The node that lets a reference act through the self-attentions (reference KV)."""

from __future__ import annotations

import logging
import math

from comfy_api.latest import io, ui
from torch import Tensor

from ...lookahead.method.reference_presets import KV_INJECTION as PRESETS
from ..presets import AS_SET, acting, preset_input
from ..reference.subject import Reference, Subject
from ..schema import schema
from ..sockets import REFERENCE, WEIGHTS
from .kv_injection import KVInjection
from .reference_pass import EIGHT_BIT, FIXED, FULL, SHARED, KVSource
from .rows import When
from .self_attention import ADAIN, NO_ADAIN, PICTURE
from .unet_blocks import KVBlock, self_attentions
from .weights import WeightFactors
from .wrappers import add_effect

STEPS = 30  # of the run whose cost the node's text tells
ALL, COARSE, FINE, UP, MIDDLE_UP = "all", "coarse", "fine", "up", "middle and up"


class LookaheadApplyKVInjection(io.ComfyNode):
    """MODEL, REFERENCE -> MODEL whose self-attentions also read the reference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadApplyKVInjection",
            display_name="Apply Lookahead KV Injection",
            category="lookahead/reference",
            description="Runs the reference through the same SDXL model at every step and lets the picture's "
            "self-attention read what the model sees there: fine detail of the face, and some of the reference's look. "
            "Works without training, better with an encoder trained for it. Use it with the Lookahead Guider.",
            search_aliases=[
                "reference only",
                "kv injection",
                "shared attention",
                "reference attention",
                "face",
                "consistent character",
                "consistency",
            ],
            has_intermediate_output=True,
            inputs=[
                io.Model.Input("model", tooltip="An SDXL model; LoRAs and other patches may come before or after."),
                REFERENCE.Input(
                    "reference", tooltip="From Encode Lookahead Reference, with its vae and clip connected."
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Blend of each self-attention, 0 to 1: from the picture alone (0, exactly the model "
                    "without this node) to picture and reference together (1). Between them each step takes a little "
                    "longer.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Start of its part of the sampling, a share from 0 (first step) to 1. A later start leaves "
                    "layout and style to the prompt.",
                ),
                io.Float.Input(
                    "end",
                    # docs/knobs.md: as like as to the end (.609, .608), and the style stays (1.00, .78).
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="End of its part of the sampling, a share from 0 to 1 (after the last step).",
                ),
                io.Combo.Input(
                    "blocks",
                    options=[ALL, COARSE, FINE, UP, MIDDLE_UP],
                    default=ALL,
                    advanced=True,
                    tooltip="Self-attentions that read the reference: all 70, the coarse ones (deepest level: who it "
                    "is and the layout), the fine ones (the other levels: texture, detail), those of the decoder half "
                    "(up), or these with the middle block. Fewer are faster and take less memory.",
                ),
                io.Combo.Input(
                    "noise",
                    display_name="reference noise",
                    options=[SHARED, FIXED],
                    default=SHARED,
                    advanced=True,
                    tooltip="Noise of the reference at each step: the picture's own noise, as in training (where the "
                    "sizes agree, else the picture's seed), or always the same noise. With fixed noise it is "
                    "read once for all pictures of a batch and for all seeds.",
                ),
                io.Int.Input(
                    "noise_seed",
                    display_name="reference noise seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    advanced=True,
                    tooltip="Seed of fixed noise; shared noise does not use it.",
                ),
                io.Float.Input(
                    "cache_gb",
                    display_name="cache in GB",
                    default=2.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    advanced=True,
                    tooltip="Size of the cache in gigabytes of main memory. It keeps what the reference gave for the "
                    "next run with the same reference, noise and steps. A step at 1024x1024 takes 0.42 GB in 16 bit, "
                    "half of it with precision 8 bit. 0 keeps none.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Mask of the picture, stretched over it: the reference is read where it is white. One mask "
                    "for all images of a batch, or several in turn.",
                ),
                WEIGHTS.Input(
                    "weights",
                    optional=True,
                    advanced=True,
                    tooltip="Factors of the weight by layer and over the steps, from Lookahead Weights.",
                ),
                io.Combo.Input(
                    "adain",
                    options=list(ADAIN),
                    default=NO_ADAIN,
                    optional=True,
                    advanced=True,
                    tooltip="What takes over the statistics (mean and deviation of each channel) of what, before both "
                    "are read together. picture to the reference: as StyleAligned, more of its look. reference to the "
                    "picture: its keys and values become the picture's in colour and contrast, against a copied look.",
                ),
                io.Int.Input(
                    "renew",
                    display_name="renew every",
                    default=1,
                    min=1,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip="The reference is read anew in one of so many steps, less often in small steps such as "
                    "the last ones of karras, and the steps between use what it gave. 4 makes a first run much faster "
                    "and takes a quarter of the cache. 1 reads it in every step, as in the paper.",
                ),
                io.Combo.Input(
                    "precision",
                    options=[FULL, EIGHT_BIT],
                    default=FULL,
                    optional=True,
                    advanced=True,
                    tooltip="Precision in which the reference is read and kept. 8 bit takes half of the cache that 16 "
                    "bit take, and changes the picture very little. full is the model's own.",
                ),
                preset_input(
                    PRESETS,
                    "How much of the reference against how much of the prompt's style, written into weight, start and "
                    "end: likeness acts to the end (1), balanced to 0.4, style to 0.2. A field that you change goes "
                    "back to as set below.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="model", tooltip="The model with the KV injection applied."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        reference: Reference,
        weight: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        blocks: str = ALL,
        noise: str = SHARED,
        noise_seed: int = 0,
        cache_gb: float = 2.0,
        mask: Tensor | None = None,
        weights: WeightFactors | None = None,
        adain: str = NO_ADAIN,
        renew: int = 1,
        precision: str = FULL,
        preset: str = AS_SET,
    ) -> io.NodeOutput:
        given = {"weight": weight, "start": start, "end": end}
        weight, start, end = acting("Apply Lookahead KV Injection", preset, PRESETS, given)
        if start > end:
            raise ValueError(f"The start ({start}) is later than the end ({end}): set an end that is not before it.")
        everything = self_attentions(model)
        chosen = choose_blocks(everything, blocks)
        for subject in reference.subjects:
            check_subject(subject, everything)
        if mask is not None and not (mask > 0).any():
            logging.warning(
                "[LCM-Lookahead] the mask of a KV injection is empty, so it acts nowhere: leave it open, or invert it."
            )
        weights = weights or WeightFactors()
        layers = weights.of_layers([block.key for block in everything])
        chosen = tuple(block for block in chosen if layers[block.key] != 0)
        said = []
        for subject in reference.subjects:
            if weight * subject.weight != 0 and chosen:
                source = KVSource(
                    subject=subject,
                    blocks=chosen,
                    all_blocks=tuple(everything),
                    noise=noise,
                    noise_seed=noise_seed,
                    cache_bytes=int(cache_gb * 2**30),
                    kv_patcher=None if subject.encoder is None else subject.encoder.kv_patcher,
                    queries=adain == PICTURE,
                    renew=renew,
                    precision=precision,
                )
                injection = KVInjection(
                    source=source,
                    weight=weight * subject.weight,
                    mask=None if mask is None else mask.reshape(-1, *mask.shape[-2:]).float().clamp(0, 1),
                    when=When(start, end, weights.steps),
                    layers=layers,
                    adain=adain,
                )
                model = add_effect(model, injection)
                said.append(cost(source, model.model.get_dtype_inference().itemsize, end - start))
        return io.NodeOutput(model, ui=ui.PreviewText("\n".join(said)) if said else None)


def cost(source: KVSource, itemsize: int, share: float = 1.0) -> str:
    """A sentence on what a run takes: passes over the reference, and what is kept of them.

    itemsize: of the UNet; share: of the sampling in which it acts. How many steps lie there hangs on the scheduler,
    which the node does not see: they are counted as if they were even.
    """
    steps = max(1, math.ceil(STEPS * share - 1e-6))
    passes, a_pass = math.ceil(steps / source.renew), 2 * source.bytes_per_row(itemsize)
    fit = min(passes, source.cache_bytes // a_pass)
    kept = "all are" if fit == passes else f"{fit} {'is' if fit == 1 else 'are'}"
    acts = f", of which it acts in about {steps}" if steps < STEPS else ""
    return (
        f"A picture in {STEPS} steps{acts}: {passes} {'passes' if passes > 1 else 'pass'} over the reference, of "
        f"{_size(a_pass)} each and {_size(passes * a_pass)} together (half, where the negative is not asked for); "
        f"{kept} kept for the next run by cache_gb {source.cache_bytes / 2**30:.3g}."
    )


def _size(number: int) -> str:
    """Bytes in words."""
    return f"{number / 2**30:.3g} GB" if number >= 2**30 / 10 else f"{number / 2**20:.3g} MB"


def choose_blocks(blocks: list[KVBlock], name: str) -> tuple[KVBlock, ...]:
    """The self-attentions that a choice of the node means, in the order in which the host runs them."""
    deepest = max(block.level for block in blocks)
    chosen = {
        ALL: lambda block: True,
        COARSE: lambda block: block.level == deepest,
        FINE: lambda block: block.level < deepest,
        UP: lambda block: block.key[0] == "output",
        MIDDLE_UP: lambda block: block.key[0] != "input",
    }[name]
    return tuple(block for block in blocks if chosen(block))


def check_subject(subject: Subject, blocks: list[KVBlock]) -> None:
    """Raise ValueError, one sentence, where a reference lacks what KV injection needs or is of another base model."""
    if subject.latents is None:
        raise ValueError(
            "The reference was read without a VAE, which KV injection needs: connect vae at Encode Lookahead Reference."
        )
    if subject.kv_prompt is None:
        raise ValueError(
            "The reference has no prompt of its own, which KV injection needs: connect clip (or conditioning) at "
            "Encode Lookahead Reference."
        )
    channels = subject.latents.shape[1]
    if subject.latents.ndim != 4 or channels != 4:
        raise ValueError(
            f"The reference's latents have {channels} channels, and SDXL has 4: connect the VAE of the SDXL checkpoint."
        )
    text, values = subject.kv_prompt[0]
    context_width = blocks[0].context_width
    if text.shape[-1] != context_width or values.get("pooled_output") is None:
        raise ValueError(
            f"The reference's own prompt has text of width {text.shape[-1]}, and this MODEL reads {context_width} with "
            "a pooled output: connect the CLIP of the SDXL checkpoint at Encode Lookahead Reference."
        )
    if subject.encoder is not None and subject.encoder.kv_patcher is not None:
        check_kv_encoder(subject.encoder.name, subject.encoder.kv_patcher.model.widths, blocks)


def check_kv_encoder(name: str, widths: dict[str, tuple[int, int]], blocks: list[KVBlock]) -> None:
    """Raise ValueError, one sentence, where a KV encoder's layers, name -> (in, out), are not those of a model."""
    paths = {layer: layer.split(".", 1)[1].partition(".attn")[0] for layer in widths}
    known = {block.path: block for block in blocks}

    def fits(layer: str) -> bool:
        block = known.get(paths[layer])
        reads_text = layer.endswith(("attn2.to_k", "attn2.to_v"))
        return block is not None and widths[layer] == (block.context_width if reads_text else block.width, block.width)

    wrong = [layer for layer in widths if not fits(layer)] + sorted(known.keys() - paths.values())
    if wrong:
        raise ValueError(
            f"{name} was made for another base model: its KV encoder does not fit this MODEL, which has {len(blocks)} "
            f"self-attentions, at {wrong[0]}: use the encoder made for this model."
        )
