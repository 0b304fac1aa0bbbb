"""The node that encodes a prompt with a concept in it."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ...lookahead.method.concept import Concept
from ...lookahead.method.concept_input import PLACEHOLDER, with_word
from ..schema import schema
from ..sockets import CONCEPT
from .clip_words import check_words, encode, hard_words, pooled_of, prompt_tokens, soft_words, with_words
from .concept_effect import HARD

BLENDED, SOFT, HARD_WORD = "blended", "soft", "hard"


class LookaheadEncodeConceptPrompt(io.ComfyNode):
    """CLIP, CONCEPT and a text with S* -> CONDITIONING of the soft prompt, with the hard one inside."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadEncodeConceptPrompt",
            display_name="Encode Concept Prompt",
            category="lookahead/concept",
            has_intermediate_output=True,
            description="Encodes a prompt in which S* stands for the concept. The same prompt with the concept's real "
            "word in its place goes along, for the second attention path of Apply Lookahead Concept.",
            search_aliases=["DATE", "concept", "clip text encode", "placeholder", "S*"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of the checkpoint that the concept was made with."),
                CONCEPT.Input("concept", tooltip="From Predict, Tune or Load Lookahead Concept."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default=f"a photo of a {PLACEHOLDER}",
                    tooltip=f"The prompt, with {PLACEHOLDER} once, such as: a comic of a {PLACEHOLDER} on a beach. "
                    f"Weights and BREAK work as elsewhere.",
                ),
                io.Combo.Input(
                    "pooled",
                    options=[BLENDED, SOFT, HARD_WORD],
                    default=BLENDED,
                    tooltip="Which prompt gives the pooled text, which enters the model once: soft, hard, or both by "
                    "the concept's blend (as it was tuned).",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "CONDITIONING", display_name="conditioning", tooltip="For the sampler's positive."
                ),
                io.String.Output(
                    "HARD", display_name="hard prompt", tooltip="The prompt with the concept's real word."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, concept: Concept, text: str, pooled: str = BLENDED) -> io.NodeOutput:
        check_words(clip, concept)
        tokens, place = prompt_tokens(clip, text)
        hard_prompt = with_word(text, concept.word)
        soft = clip.encode_from_tokens_scheduled(with_words(tokens, place, soft_words(concept)))
        hard, hard_pooled = encode(clip, with_words(tokens, place, hard_words(concept)))
        out = []
        for cond, values in soft:
            chosen = pooled_of(pooled, concept.blend, values["pooled_output"], hard_pooled)
            out.append([cond, {**values, "pooled_output": chosen, HARD: hard}])
        return io.NodeOutput(out, hard_prompt, ui=ui.PreviewText(hard_prompt))
