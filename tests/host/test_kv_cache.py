"""What is kept of reference passes: when a run makes none, what changes bring them back, and the bound."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch

LATENT = (1, 4, 8, 8)
STEPS = 2
UNET = json.loads((Path(__file__).resolve().parents[2] / "mini/sizes.json").read_text())["unet"]
_, MIDDLE, DEEP = (UNET["model_channels"] * m for m in UNET["channel_mult"])
A_LEVEL = 4 * 2 * (5 * 16 * MIDDLE + 12 * 4 * DEEP)  # bytes: normed inputs of both roles in float32


@pytest.fixture
def texts(mini):
    return mini.text(1), mini.text(2)


@pytest.fixture
def draw(mini, texts, tools):
    """draw(model) -> a picture of a few steps and how many times the reference was evaluated for it."""
    with tools.watch(mini, positive=texts[0], negative=texts[1]) as watch:

        def run(model, latent=LATENT, **options):
            watch.clear()
            out = tools.sample(model, *texts, torch.zeros(latent), steps=STEPS, **options)
            return out, sum(len(set(one.names)) for one in watch.references)

        yield run


@pytest.fixture
def reference(mini, tools):
    return tools.kv_reference(mini, tools.picture(1))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.contract
def test_a_second_run_makes_no_reference_pass_and_gives_the_same_bits(mini, tools, draw, trained, pictures):
    encoder = tools.kv_encoder(mini) if trained else None
    reference = tools.kv_reference(mini, tools.picture(1), encoder=encoder)
    latent = (pictures, *LATENT[1:])
    first, cold = draw(tools.inject(mini.model, reference), latent)
    second, replayed = draw(tools.inject(mini.model, reference), latent)
    assert cold == 2 * STEPS and replayed == 0 and torch.equal(second, first)
    none, again = draw(tools.inject(mini.model, reference, cache_gb=0.0), latent)
    assert torch.equal(none, first)


CHANGES = {
    "seed": lambda world, tools: {"seed": 2},
    "number of pictures": lambda world, tools: {"latent": (2, *LATENT[1:])},
    "LoRA": lambda world, tools: {"model": tools.with_lora(world.model)},
    "strength of a LoRA": lambda world, tools: {"model": tools.with_lora(tools.with_lora(world.model), 9)},
    "v-prediction": lambda world, tools: {"model": sampled_as(tools, world, "v_prediction", False)},
    "zero terminal noise": lambda world, tools: {"model": sampled_as(tools, world, "eps", True)},
    "fixed noise": lambda world, tools: {"noise": "fixed"},
    "blocks": lambda world, tools: {"blocks": "coarse"},
    "schedule": lambda world, tools: {"sigmas": torch.tensor([9.0, 3.0, 0.0])},
}


def sampled_as(tools, world, kind, zsnr):
    return tools.host_node("nodes_model_advanced", "ModelSamplingDiscrete", world.model, kind, zsnr)


def split(options, model):
    """Options of the node and of the run."""
    of_node = {k: options[k] for k in ("noise", "noise_seed", "blocks", "weight", "cache_gb") if k in options}
    return options.get("model", model), of_node, {k: v for k, v in options.items() if k not in {*of_node, "model"}}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_reference_pass_depends_on_brings_it_back(mini, tools, reference, draw, change):
    draw(tools.inject(mini.model, reference))
    model, of_node, of_run = split(CHANGES[change](mini, tools), mini.model)
    changed, evaluated = draw(tools.inject(model, reference, **of_node), **of_run)
    assert evaluated == 2 * STEPS
    again, evaluated = draw(tools.inject(model, reference, **of_node), **of_run)
    assert evaluated == 0 and torch.equal(again, changed)


def test_another_reference_or_encoder_is_read_anew(mini, tools, draw):
    encoder = tools.kv_encoder(mini)
    draw(tools.inject(mini.model, tools.kv_reference(mini, tools.picture(1), encoder=encoder)))
    for picture, options in (
        (tools.picture(2), {"encoder": encoder}),
        (tools.picture(1), {"encoder": tools.kv_encoder(mini, seed=9)}),
        (tools.picture(1), {"encoder": encoder, "size": 80}),
    ):
        assert draw(tools.inject(mini.model, tools.kv_reference(mini, picture, **options)))[1] == 2 * STEPS


def test_what_it_does_not_depend_on_brings_no_pass_back(mini, tools, draw):
    reference = tools.kv_reference(mini, tools.picture(1), encoder=tools.kv_encoder(mini))
    plain, _ = draw(tools.inject(mini.model, reference))
    other_guider = tools.guider(tools.inject(mini.model, reference), mini.text(1), mini.text(1), 3.0)
    for out, evaluated in (
        draw(tools.inject(mini.model, reference), cfg=4.0),
        draw(tools.inject(mini.model, reference, weight=0.5)),
        draw(tools.inject(mini.model, reference, mask=torch.ones(1, 64, 64), weight=0.7)),
        draw(tools.inject(tools.apply(mini.model, reference), reference)),
        draw(mini.model, guider=other_guider),
    ):
        assert evaluated == 0 and not torch.equal(out, plain)


def test_only_the_half_that_is_missing_is_evaluated(mini, tools, reference, draw):
    model = tools.inject(mini.model, reference)
    assert draw(model, cfg=1.0)[1] == STEPS
    with_both, evaluated = draw(model)
    assert evaluated == STEPS
    assert torch.equal(draw(model)[0], with_both)


def test_fixed_noise_is_evaluated_once_for_all_seeds_and_numbers_of_pictures(mini, tools, reference, draw):
    model = tools.inject(mini.model, reference, noise="fixed")
    first, evaluated = draw(model)
    assert evaluated == 2 * STEPS
    assert draw(model, seed=2)[1] == draw(model, (3, *LATENT[1:]))[1] == 0


def test_pictures_given_one_each_stay_apart_after_a_smaller_batch(mini, tools, draw):
    """With fixed noise a run of one image reads less than a run of three."""

    def each(**options):
        reference = tools.kv_reference(mini, tools.picture(4, n=3), several="one per picture")
        return tools.inject(mini.model, reference, noise="fixed")

    model, three = each(), (3, *LATENT[1:])
    draw(model)
    assert torch.equal(draw(model, three)[0], draw(each(), three)[0])


def test_two_nodes_with_one_reference_share_what_is_kept(mini, tools, reference, draw):
    model = tools.inject(tools.inject(mini.model, reference, weight=0.5), reference, weight=0.3)
    assert draw(model)[1] == 2 * STEPS


@pytest.mark.contract
def test_an_interrupted_run_leaves_what_is_right(mini, tools, reference, draw):
    import comfy.model_management

    def interrupt(*_):
        comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    model = tools.inject(mini.model, reference)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        draw(model, callback=interrupt)
    after, evaluated = draw(model)
    assert 0 < evaluated < 2 * STEPS
    assert torch.equal(after, draw(tools.inject(mini.model, tools.kv_reference(mini, tools.picture(1))))[0])


@pytest.mark.contract
def test_the_cache_goes_with_its_reference(mini, tools, draw):
    reference = tools.kv_reference(mini, tools.picture(1))
    draw(tools.inject(mini.model, reference))
    cache = weakref.ref(reference.subjects[0].cache)
    assert cache().size() == STEPS * A_LEVEL
    del reference
    draw(mini.model)  # the host holds on to the last MODEL that it ran
    gc.collect()
    assert cache() is None


# -- the bound


def logged(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "LCM-Lookahead" in r.getMessage()]


def test_a_run_larger_than_the_bound_keeps_what_fits_and_says_so_once(mini, tools, reference, draw, caplog):
    model = tools.inject(mini.model, reference, cache_gb=1.5 * A_LEVEL / 2**30)
    cache = reference.subjects[0].cache
    for expected in (2 * STEPS, 2, 2):  # one level is kept, and of the other not even a half
        with caplog.at_level("WARNING"):
            caplog.clear()
            out, evaluated = draw(model)
        (said,) = logged(caplog)
        assert "1 of 2 noise levels" in said and evaluated == expected and cache.size() == A_LEVEL
    assert torch.equal(out, draw(tools.inject(mini.model, tools.kv_reference(mini, tools.picture(1))))[0])


def test_a_cache_of_0_keeps_nothing_and_says_nothing(mini, tools, reference, draw, caplog):
    model = tools.inject(mini.model, reference, cache_gb=0.0)
    with caplog.at_level("WARNING"):
        assert draw(model)[1] == draw(model)[1] == 2 * STEPS
    assert logged(caplog) == [] and reference.subjects[0].cache.size() == 0


def test_whole_earlier_runs_make_way_oldest_first(mini, tools, reference, draw):
    model = tools.inject(mini.model, reference, cache_gb=2.1 * STEPS * A_LEVEL / 2**30)

    def evaluated(seed):
        return draw(model, seed=seed)[1]

    assert evaluated(1) == evaluated(2) == 2 * STEPS
    assert evaluated(1) == 0  # now the second is the oldest
    assert evaluated(3) == 2 * STEPS
    assert evaluated(1) == evaluated(3) == 0 and evaluated(2) == 2 * STEPS


def test_nodes_of_one_run_do_not_push_each_other_out(mini, tools, reference, draw):
    """The same reference in two nodes that read different blocks, in a cache for one and a half of them."""
    bound = {"cache_gb": 1.5 * STEPS * A_LEVEL / 2 / 2**30}
    model = tools.inject(mini.model, reference, blocks="coarse", **bound)
    model = tools.inject(model, reference, blocks="fine", **bound)
    cold, second, third = (draw(model)[1] for _ in range(3))
    assert cold == 4 * STEPS and 0 < second < cold and third == second


@pytest.fixture
def cache(pack):
    return pack.module("nodes.reference.kv_cache").KVCache()


def entry(size: int):
    """What an evaluation of one role gives, of so many bytes."""
    return {True: {("middle", 0, 0): [(torch.zeros(size // 2, dtype=torch.uint8),) * 2]}}


def test_the_bound_holds_and_runs_of_the_same_sampling_stay(cache):
    a, b, c = ("a",), ("b",), ("c",)
    assert cache.put(a, 1.0, entry(40), 100) and cache.put(b, 1.0, entry(40), 100)
    assert cache.size() == 80 and cache.size([a]) == 40
    assert cache.put(c, 1.0, entry(20), 100) and list(cache.runs) == [a, b, c]
    assert cache.put(c, 2.0, entry(20), 100) and list(cache.runs) == [b, c]
    assert not cache.put(c, 3.0, entry(40), 100, current=[b, c])
    assert cache.size() == 80 and cache.get(c, (3.0, True)) is None
    assert cache.get(b, (1.0, True)) and list(cache.runs) == [c, b]
    assert not cache.put(("d",), 1.0, entry(102), 100) and list(cache.runs) == [c, b]
