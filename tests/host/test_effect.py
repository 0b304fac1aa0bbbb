"""The seam of effects: methods that the wrappers have never heard of act beside image prompt and KV injection."""

import ast
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

LATENT = (2, 4, 8, 8)


@pytest.fixture
def seam(pack):
    return pack.module("nodes.conditioning.effect")


@pytest.fixture
def add_effect(pack):
    return pack.module("nodes.conditioning.wrappers").add_effect


@pytest.fixture
def nothing(seam):
    """An effect that overrides no hook."""

    class Nothing(seam.Effect):
        pass

    return Nothing()


@pytest.fixture
def scaled(seam, pack, tiny):
    """scaled(factor, ...) -> an effect that scales what comes out of every cross-attention, within the image prompt."""
    rows, blocks = pack.module("nodes.conditioning.rows"), pack.module("nodes.conditioning.unet_blocks")
    keys = [block.key for block in blocks.cross_attentions(tiny.model)]

    @dataclass(frozen=True, eq=False)
    class Scaled(seam.Effect):
        factor: float
        when: Any = field(default_factory=rows.When)
        patchers: tuple = ()
        calls: list = field(default_factory=list)

        def additional_models(self):
            return self.patchers

        @classmethod
        def estimated_rows(cls, effects, model, noise_shape):
            return seam.EstimatedRows(kept=10 * len(effects), evaluated=3)

        def begin(self, run):
            self.calls.append(("begin", tuple(run.noise.shape), run.seed))
            return ActiveScaled(self)

    class ActiveScaled(seam.ActiveEffect):
        order = 50

        def prefetch(self, model, timestep, roles, active):
            self.effect.calls.append(("prefetch", float(timestep[0]), set(roles)))

        def evaluate(self, evaluation):
            self.effect.calls.append(("evaluate", float(evaluation.timestep[0]), evaluation.roles))
            return self.effect.factor

        @classmethod
        def cross_attentions(cls, acting, unet_pass, attn2):
            for active in acting:
                active.effect.calls.append(("pass", list(unet_pass.layout)))
            factors = [unet_pass.evaluated[active] for active in acting]
            return attn2 | {key: scale(attn2.get(key), factors) for key in keys}

        def summary(self):
            return f"scaled by {self.effect.factor}."

    def scale(inner, factors):
        def replacement(q, k, v, extra):
            out = inner(q, k, v, extra) if inner else blocks.host_attention(extra)(q, k, v, extra["n_heads"])
            for factor in factors:
                out = out * factor
            return out

        return replacement

    def by_the_host(model, factor):
        """The same by the host's own means, which our effects take for another node's."""
        model = model.clone()
        for group, number, index in keys:
            model.set_model_attn2_replace(scale(None, [factor]), group, number, index)
        return model

    Scaled.by_the_host = staticmethod(by_the_host)
    return Scaled


@pytest.fixture
def reference(tiny, tools):
    return tools.kv_reference(tiny, tools.picture(1), encoder=tools.kv_encoder(tiny))


@pytest.fixture
def both(reference, tools):
    """both(model) -> with image prompt and KV injection."""
    return lambda model: tools.inject(tools.apply(model, reference, weight=0.8), reference, weight=0.6)


@pytest.fixture
def draw(tiny, tools):
    texts = tiny.text(1), tiny.text(2)

    def run(model, three_scales=True, **options):
        guider = tools.three_scales(model, *texts) if three_scales else None
        return tools.sample(model, *texts, torch.zeros(LATENT), guider=guider, **{"steps": 2, **options})

    return run


def test_the_wrappers_know_no_effect(pack):
    path = pack.module("nodes.conditioning.wrappers").__file__
    with open(path, encoding="utf-8") as file:
        imports = [node for node in ast.walk(ast.parse(file.read())) if isinstance(node, ast.ImportFrom) and node.level]
    assert {node.module for node in imports} == {"effect", "rows"}


def test_an_effect_without_hooks_is_bit_equal_to_none(tiny, nothing, add_effect, both, draw):
    assert torch.equal(draw(add_effect(tiny.model, nothing)), draw(tiny.model))
    expected = draw(both(tiny.model))
    assert not torch.equal(expected, draw(tiny.model))
    assert torch.equal(draw(both(add_effect(tiny.model, nothing))), expected)
    assert torch.equal(draw(add_effect(both(tiny.model), nothing)), expected)


def test_an_effect_acts_within_the_image_prompt_and_beside_the_kv_injection(tiny, scaled, add_effect, both, draw):
    """Bit for bit as the host's own replacement of the cross-attentions does, wherever its node stands."""

    def once(model):
        return draw(model, steps=1)

    plain, expected = once(both(tiny.model)), once(both(scaled.by_the_host(tiny.model, 0.5)))
    assert not torch.allclose(expected, plain, atol=1e-2)
    assert torch.equal(once(both(add_effect(tiny.model, scaled(0.5)))), expected)
    assert torch.equal(once(add_effect(both(tiny.model), scaled(0.5))), expected)
    assert torch.equal(once(add_effect(both(tiny.model), scaled(1.0))), plain)


def test_effects_of_one_class_act_together_and_clones_do_not_share_later_ones(tiny, scaled, add_effect, draw):
    first = add_effect(tiny.model, scaled(0.5))
    second = add_effect(first, scaled(0.5))
    assert torch.equal(draw(second, three_scales=False), draw(scaled.by_the_host(tiny.model, 0.25), three_scales=False))
    assert torch.equal(draw(first, three_scales=False), draw(scaled.by_the_host(tiny.model, 0.5), three_scales=False))


def test_each_hook_is_called_when_the_seam_says(tiny, scaled, add_effect, draw, caplog):
    effect = scaled(0.5)
    with caplog.at_level("WARNING"):
        draw(add_effect(tiny.model, effect), three_scales=False)
    names = [call[0] for call in effect.calls]
    assert names == ["begin", *["evaluate", "pass"] * 2] and effect.calls[0] == ("begin", LATENT, 1)
    assert [call[2] for call in effect.calls if call[0] == "evaluate"] == [{True, False}] * 2
    rows = [(image, role) for role in (True, False) for image in (0, 1)]
    assert all(sorted(call[1]) == sorted(rows) for call in effect.calls if call[0] == "pass")
    assert [r.getMessage() for r in caplog.records].count("[LCM-Lookahead] scaled by 0.5.") == 1


def test_an_effect_is_bound_to_its_part_of_the_sampling(tiny, scaled, add_effect, draw, pack):
    when = pack.module("nodes.conditioning.rows").When(0.5, 1.0)
    effect, everywhere = scaled(0.5, when), scaled(0.5)
    for one in (effect, everywhere):
        draw(add_effect(tiny.model, one), three_scales=False, steps=4)
    levels, all_levels = ({c[1] for c in e.calls if c[0] == "evaluate"} for e in (effect, everywhere))
    middle = tiny.model.get_model_object("model_sampling").percent_to_sigma(0.5)
    assert levels == {level for level in all_levels if level <= middle} and 0 < len(levels) < len(all_levels)


def test_what_is_prefetched_is_of_the_effects_that_act(tiny, scaled, add_effect, pack):
    wrappers = pack.module("nodes.conditioning.wrappers")
    when = pack.module("nodes.conditioning.rows").When(0.5, 1.0)
    late, always = scaled(0.5, when), scaled(0.5)
    run = wrappers.SamplingRun(tuple(effect.begin(_Start()) for effect in (late, always)))
    options = wrappers.EffectContext(run=run).put_into({})
    sigma = tiny.model.get_model_object("model_sampling").percent_to_sigma(0.1)
    wrappers.prefetch(options, tiny.model.model, torch.tensor([sigma]), {True})
    assert always.calls[1:] == [("prefetch", pytest.approx(sigma), {True})] and late.calls[1:] == []
    wrappers.prefetch({}, tiny.model.model, torch.tensor([sigma]), {True})  # outside of a run


class _Start:
    noise, seed = torch.zeros(LATENT), 0


def test_the_host_loads_an_effect_s_networks_and_counts_its_memory(tiny, scaled, add_effect, draw, monkeypatch):
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sampler_helpers

    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(torch.nn.Linear(2, 2), load_device=cpu, offload_device=cpu)
    shapes, prepare = [], comfy.sampler_helpers._prepare_sampling

    def recorded(model, noise_shape, *args, **kwargs):
        shapes.append(list(noise_shape))
        return prepare(model, noise_shape, *args, **kwargs)

    monkeypatch.setattr(comfy.sampler_helpers, "_prepare_sampling", recorded)
    model = add_effect(add_effect(tiny.model, scaled(0.5, patchers=(patcher,))), scaled(0.5, patchers=(patcher,)))
    assert len(model.get_additional_models()) == 1
    draw(model, three_scales=False)
    assert any(patcher.is_clone(loaded.model) for loaded in comfy.model_management.current_loaded_models)
    draw(tiny.model, three_scales=False)
    assert shapes == [[LATENT[0] + 20, *LATENT[1:]], list(LATENT)]


def test_the_context_is_shared_unchanged_by_all_copies_of_the_host(tiny, nothing, add_effect, scaled):
    import comfy.model_patcher
    from comfy.patcher_extension import merge_nested_dicts

    model = add_effect(tiny.model, nothing)
    context = model.model_options["transformer_options"]["lookahead"]
    copies = [
        model.clone().model_options,
        comfy.model_patcher.create_model_options_clone(model.model_options),
        merge_nested_dicts({"transformer_options": {"patches": {}}}, model.model_options),
    ]
    assert all(options["transformer_options"]["lookahead"] is context for options in copies)
    more = add_effect(model, scaled(0.5)).model_options["transformer_options"]["lookahead"]
    assert len(more.effects) == 2 and context.effects == (nothing,)
    with pytest.raises(AttributeError):
        context.effects = ()
