"""The node that tunes a concept on its one picture, inside of the host."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ...lookahead.method.concept import NEAR, Concept
from ...lookahead.method.concept_input import TEMPLATES
from ...lookahead.method.concept_tuning import MOST_STEPS, Tuning, tune, words_to_try
from ..schema import schema
from ..sockets import CONCEPT
from .apply_concept import THE_CONCEPT_S
from .clip_words import check_words, dictionary_of
from .host_predictor import HostPredictor
from .predict_concept import check_blocks, square_of

THE_ENCODER_S = -1.0


class LookaheadTuneConcept(io.ComfyNode):
    """CONCEPT, models and its picture -> CONCEPT that is more like it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadTuneConcept",
            display_name="Tune Lookahead Concept",
            category="lookahead/concept",
            has_intermediate_output=True,
            description="Brings a predicted concept nearer to its picture in a few steps (12 usually): its word and "
            "its attention offsets are tuned, the model is not changed. Stopped on the way, it leaves nothing behind.",
            search_aliases=["DATE", "concept", "dreambooth", "finetune", "textual inversion training"],
            inputs=[
                CONCEPT.Input("concept", tooltip="From Predict Lookahead Concept; or one that was tuned, to go on."),
                io.Model.Input("model", tooltip="The SDXL model that the concept will be drawn with."),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Image.Input("image", tooltip="The picture that the concept was predicted from."),
                io.Int.Input(
                    "steps",
                    default=12,
                    min=0,
                    max=MOST_STEPS,
                    tooltip="Tuning steps, 0 to 100. More is more like the picture, "
                    "and less ready to follow the prompt.",
                ),
                io.Int.Input(
                    "batch",
                    default=8,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Noise levels of a step, one after another.",
                ),
                io.Float.Input(
                    "offset_rate",
                    default=THE_ENCODER_S,
                    min=-1.0,
                    max=0.1,
                    step=0.0001,
                    round=False,
                    advanced=True,
                    tooltip="Learning rate of the attention offsets, 0 to 0.1; -1 is the one that its encoder was made "
                    "for.",
                ),
                io.Float.Input(
                    "word_rate",
                    default=THE_ENCODER_S,
                    min=-1.0,
                    max=1.0,
                    step=0.001,
                    round=False,
                    advanced=True,
                    tooltip="Learning rate of the word, as a share of a component's usual size, 0 to 1; -1 is the one "
                    "that its encoder was made for.",
                ),
                io.Float.Input(
                    "blend",
                    default=THE_CONCEPT_S,
                    min=-1.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Blend of the two attention paths, 0 to 1, in tuning and so in drawing; -1 keeps the "
                    "concept's.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the noise that it is tuned under.",
                ),
                io.Int.Input(
                    "words",
                    default=0,
                    min=0,
                    max=NEAR,
                    advanced=True,
                    optional=True,
                    tooltip="Before the first step so many of the real words that it is nearest to are tried, and the "
                    "one that explains the picture best becomes its real word; 1 keeps the nearest, 0 does what its "
                    "encoder was made for. Each takes a third of a tuning step.",
                ),
            ],
            outputs=[
                CONCEPT.Output("CONCEPT", display_name="concept", tooltip="The tuned concept."),
                io.String.Output(
                    "LOSSES", display_name="losses", tooltip="The loss of every step, before it was taken."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        concept: Concept,
        model,
        clip,
        vae,
        image: Tensor,
        steps: int = 12,
        batch: int = 8,
        offset_rate: float = THE_ENCODER_S,
        word_rate: float = THE_ENCODER_S,
        blend: float = THE_CONCEPT_S,
        seed: int = 0,
        words: int = 0,
    ) -> io.NodeOutput:
        tuning = Tuning.of(
            concept,
            steps=steps,
            batch=batch,
            offset_rate=None if offset_rate < 0 else offset_rate,
            word_rate=None if word_rate < 0 else word_rate,
            blend=concept.blend if blend == THE_CONCEPT_S else blend,
            seed=seed,
            words=words or None,
        )
        check_words(clip, concept)
        check_blocks(model, concept)
        size = int(concept.about.get("size", 1024))
        square = square_of(image, size)
        latents = vae.encode(torch.cat([square, square.flip(2)]))
        known = dictionary_of(clip, words_to_try(concept, tuning))
        templates = concept.about.get("templates", "\n".join(TEMPLATES)).split("\n")
        bar = comfy.utils.ProgressBar(max(1, steps))

        def progress(step: int, loss: float) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(step, steps)

        with torch.inference_mode(False), torch.enable_grad():
            predictor = HostPredictor(model, clip, concept, templates, tuning.blend, size)
            views = model.model.process_latent_in(latents.clone()).to(predictor.device)
            known = known._replace(rows_l=known.rows_l.clone(), rows_g=known.rows_g.clone())
            with predictor:
                alpha_bar = predictor.alpha_bar.to(views)
                tuned, losses = tune(concept, views, alpha_bar, predictor, tuning, known, progress=progress)
        text = "\n".join(f"{n + 1}: {loss:.5f}" for n, loss in enumerate(losses))
        return io.NodeOutput(tuned, text, ui=ui.PreviewText(text))
