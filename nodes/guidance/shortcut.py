"""The node that says how to look ahead: a few-step model and a decoder for its previews."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..conditioning.unet_blocks import cross_attentions
from ..schema import schema
from ..sockets import SHORTCUT

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

ONE_STEP, PLAIN_X0 = "one-step", "plain x0"


@dataclass(frozen=True, eq=False)
class Shortcut:
    """LOOKAHEAD_SHORTCUT carries how to look ahead in one step.

    model: the base with a few-step LoRA, or a distilled model; vae: decodes previews; one_step: use the model (with the
    scaling of consistency models), else the x0 prediction of the model that is sampled. networks: what was made of the
    LoRA for a base, by the base's patches; it alone changes.
    """

    model: ModelPatcher
    vae: VAE
    one_step: bool = True
    networks: dict[Any, ModelPatcher | None] = field(default_factory=dict)


class LookaheadShortcut(io.ComfyNode):
    """MODEL, VAE -> SHORTCUT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadShortcut",
            display_name="Lookahead Shortcut",
            category="lookahead/sampling",
            description="How to look ahead from the middle of a run: the sampled model with a few-step LoRA (LCM-LoRA, "
            "DMD2, Hyper-SD, Lightning) and a VAE for the previews, best TAESD.",
            search_aliases=["lcm", "lightning", "turbo", "hyper-sd", "dmd2", "preview", "few-step", "taesd"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that is sampled, with a few-step LoRA by LoraLoaderModelOnly: the LoRA runs "
                    "beside the loaded model and costs no second one. A distilled checkpoint works as well, and is "
                    "loaded beside the sampled model (about 5 GB for SDXL).",
                ),
                io.Vae.Input(
                    "vae",
                    tooltip="Decodes the previews. TAESD (taesdxl in VAELoader) is fast and small; the full VAE takes "
                    "much more time and memory.",
                ),
                io.Combo.Input(
                    "kind",
                    options=[ONE_STEP, PLAIN_X0],
                    default=ONE_STEP,
                    tooltip="one-step looks ahead with the few-step model; plain x0 with what the sampled model itself "
                    "predicts, which is blurred early on: the baseline to compare with.",
                ),
            ],
            outputs=[
                SHORTCUT.Output(
                    "SHORTCUT", display_name="shortcut", tooltip="For Lookahead Guidance Sampler and Preview Grid."
                )
            ],
        )

    @classmethod
    def execute(cls, model, vae, kind: str = ONE_STEP) -> io.NodeOutput:
        cross_attentions(model)  # says what is wrong with a model that is not SDXL
        if getattr(vae, "latent_channels", 4) != 4:
            raise ValueError(
                f"This VAE has latents of {vae.latent_channels} channels, and SDXL has 4: connect taesdxl or the VAE "
                "of an SDXL checkpoint."
            )
        return io.NodeOutput(Shortcut(model, vae, one_step=kind == ONE_STEP))
