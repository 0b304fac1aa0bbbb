"""The node for guidance with three scales: text, text with reference KV, reference KV alone."""

from __future__ import annotations

import math
import uuid
from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ...lookahead.method.guidance import three_scale_guidance
from ...lookahead.method.reference_presets import GUIDER as PRESETS
from ..presets import AS_SET, acting, preset_input
from ..schema import schema
from .kv_injection import ActiveKVInjection
from .rows import When
from .wrappers import EffectContext, with_conds


class ThreeScaleGuider(comfy.samplers.CFGGuider):
    """Guidance over text, image prompt and reference KV; the host calls `predict_noise` once a model call.

    Where no reference KV acts it is plain classifier-free guidance at text + full (at text, when both other scales are
    0: nothing is then asked of the KV). Before the start and after the end of its scales it does not guide: the
    prediction is that of the prompt with all references (the scales are 0, 1, 0), in one evaluation.
    """

    when = When()

    def set_scales(self, text: float, full: float, kv: float, when: When = when) -> None:
        self.text, self.full, self.kv, self.when = text, full, kv, when
        self.cfg = text + full  # what nodes see that ask for the scale

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed=None
    ) -> Tensor:
        options = model_options or {}
        positive, negative = self.conds.get("positive"), self.conds.get("negative")
        if "sampler_cfg_function" in options:
            raise ValueError(
                "Another node replaces the guidance (a sampler CFG function, such as RescaleCFG or the old Perp-Neg), "
                "and the Lookahead Guider has its own: remove that node, or use CFGGuider."
            )
        guides = self.when.acts(timestep, self.inner_model.model_sampling)
        text_scale, full_scale, kv_scale = (self.text, self.full, self.kv) if guides else (0.0, 1.0, 0.0)
        if not EffectContext.of(options).acting(ActiveKVInjection) or (full_scale == 0 and kv_scale == 0):
            conds = {"positive": positive, "negative": negative}
            without_kv = with_conds(options, conds, without=ActiveKVInjection)
            return comfy.samplers.sampling_function(
                self.inner_model, x, timestep, negative, positive, text_scale + full_scale, without_kv, seed=seed
            )
        # Nodes that keep something for each condition know it by its uuid, so the passes must differ in it.
        apart = {"positive": _renamed(positive), "negative": _renamed(negative)}
        total = text_scale + full_scale + kv_scale
        alone = math.isclose(total, 1.0) and not options.get("disable_cfg1_optimization", False)
        unconditional = None if alone else apart["negative"]
        text = apart["positive"] if text_scale else None
        e_nt = e_nu = torch.zeros_like(x)  # as the host has it for what is not evaluated
        if text is not None or unconditional is not None:
            without_kv = with_conds(options, apart, without=ActiveKVInjection)
            e_nt, e_nu = self._evaluate([text, unconditional], x, timestep, without_kv)
        conds = [positive if full_scale else None, negative if kv_scale else None]
        e_ft, e_fu = self._evaluate(conds, x, timestep, options)
        cond = e_ft if full_scale else e_nt if text_scale else e_nu  # the last: only the reference guides
        out = [cond, e_nu]
        shown = [positive, None if alone else negative]
        common = {"timestep": timestep, "input": x, "sigma": timestep, "model": self.inner_model}
        for function in options.get("sampler_pre_cfg_function", []):
            arguments = {"conds": shown, "conds_out": out, "cond_scale": self.cfg, "model_options": options, **common}
            out = function(arguments)
        cond, e_nu = out[0], out[1]
        if full_scale:
            e_ft = cond
        else:
            e_nt = cond
        result = three_scale_guidance(e_nu, e_nt, e_fu, e_ft, text_scale, full_scale, kv_scale)
        for function in options.get("sampler_post_cfg_function", []):
            arguments = {
                "denoised": result,
                "cond": positive,
                "uncond": shown[1],
                "cond_scale": self.cfg,
                "cond_denoised": cond,
                "uncond_denoised": e_nu,
                "model_options": options,
                **common,
            }
            result = function(arguments)
        return result

    def _evaluate(self, conds: list, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> list[Tensor]:
        if "sampler_calc_cond_batch_function" in options:
            arguments = {"conds": conds, "input": x, "sigma": timestep, "model": self.inner_model}
            return options["sampler_calc_cond_batch_function"]({**arguments, "model_options": options})
        return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)


def _renamed(conds: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Copies of conditions under other names, the same in every step of a run."""
    return None if conds is None else [{**c, "uuid": uuid.uuid5(c["uuid"], "without KV")} for c in conds]


class LookaheadGuider(io.ComfyNode):
    """MODEL, CONDITIONING, CONDITIONING -> GUIDER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def scale(name: str, label: str, default: float, tooltip: str) -> io.Float.Input:
            within = {"min": 0.0, "max": 30.0, "step": 0.1, "round": 0.01}
            return io.Float.Input(name, display_name=label, default=default, tooltip=tooltip, **within)

        return schema(
            node_id="LookaheadGuider",
            display_name="Lookahead Guider",
            category="lookahead/sampling",
            description="Guidance with three scales, for SamplerCustomAdvanced: how much the prompt counts without and "
            "with the KV injection, and how much the KV injection itself. Without a KV injection it is the usual "
            "guidance at the sum of the first two.",
            search_aliases=["cfg guider", "guidance", "three scale", "kv guidance"],
            inputs=[
                io.Model.Input("model", tooltip="The model, with KV injection and image prompt applied."),
                io.Conditioning.Input("positive", tooltip="The prompt: what the picture should show."),
                io.Conditioning.Input("negative", tooltip="The negative prompt: what it should not show."),
                scale(
                    "text",
                    "text scale",
                    3.0,
                    "Guidance scale of prompt and image prompt without the KV injection: raise it when the picture "
                    "ignores the prompt's style. 0 saves one evaluation a step.",
                ),
                scale(
                    "full",
                    "text + KV scale",
                    2.0,
                    "Guidance scale of prompt and image prompt together with the KV injection: raise it for likeness. "
                    "0 saves one evaluation a step.",
                ),
                scale(
                    "kv",
                    "KV scale",
                    2.0,
                    "Guidance scale of the KV injection without any prompt: raise it to bring in the reference as it "
                    "is, lower it for freedom. 0 saves one evaluation and half of the reference pass a step.",
                ),
                preset_input(
                    PRESETS,
                    "Known good scales (text, text + KV, KV), written into the fields above: paper 3, 2, 2; more "
                    "likeness 2, 4, 2; more prompt 4, 1.5, 0.5; faster 3, 3, 0; without KV 5, 0, 0. A field that you "
                    "change goes back to as set below.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Start of the guidance, a share of the sampling from 0 (first step) to 1. Before it the "
                    "picture follows prompt and reference unguided, in one evaluation a step.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="End of the guidance, a share of the sampling from 0 to 1. An end before 1 saves time and "
                    "tames harsh colours; the last steps change little.",
                ),
            ],
            outputs=[io.Guider.Output("GUIDER", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        text: float = 3.0,
        full: float = 2.0,
        kv: float = 2.0,
        preset: str = AS_SET,
        start: float = 0.0,
        end: float = 1.0,
    ) -> io.NodeOutput:
        if start > end:
            raise ValueError(f"The start ({start}) is later than the end ({end}): set an end that is not before it.")
        text, full, kv = acting("Lookahead Guider", preset, PRESETS, {"text": text, "full": full, "kv": kv})
        guider = ThreeScaleGuider(model)
        guider.set_conds(positive, negative)
        guider.set_scales(text, full, kv, When(start, end))
        return io.NodeOutput(guider)
