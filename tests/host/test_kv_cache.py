"""What is kept of reference passes: when a run makes none, what changes bring them back, and the bound."""

import gc
import weakref

import pytest
import torch
from host_tools import interrupt
from tensors import relative
from worlds import TINY

LATENT = (1, 4, 8, 8)
STEPS = 2
_, MIDDLE, DEEP = TINY["channels"]
A_LEVEL = 4 * 2 * (5 * 16 * MIDDLE + 12 * 4 * DEEP)  # bytes: normed inputs of both roles in float32


@pytest.fixture
def draw(tiny, texts, tools):
    """draw(model) -> a picture of a few steps and how many times the reference was evaluated for it."""
    with tools.watch(tiny, positive=texts[0], negative=texts[1]) as watch:

        def run(model, latent=LATENT, **options):
            watch.clear()
            out = tools.sample(model, *texts, torch.zeros(latent), steps=STEPS, **options)
            return out, sum(len(set(one.names)) for one in watch.references)

        yield run


@pytest.fixture
def reference(tiny, tools):
    return tools.kv_reference(tiny, tools.picture(1))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.contract
def test_a_second_run_makes_no_reference_pass_and_gives_the_same_bits(tiny, tools, draw, trained, pictures):
    encoder = tools.kv_encoder(tiny) if trained else None
    reference = tools.kv_reference(tiny, tools.picture(1), encoder=encoder)
    latent = (pictures, *LATENT[1:])
    first, cold = draw(tools.inject(tiny.model, reference), latent)
    second, replayed = draw(tools.inject(tiny.model, reference), latent)
    assert cold == 2 * STEPS and replayed == 0 and torch.equal(second, first)
    none, again = draw(tools.inject(tiny.model, reference, cache_gb=0.0), latent)
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
    "precision": lambda world, tools: {"precision": "8 bit"},
    "schedule": lambda world, tools: {"sigmas": torch.tensor([9.0, 3.0, 0.0])},
}


def sampled_as(tools, world, kind, zsnr):
    return tools.host_node("nodes_model_advanced", "ModelSamplingDiscrete", world.model, kind, zsnr)


def split(options, model):
    """Options of the node and of the run."""
    names = ("noise", "noise_seed", "blocks", "weight", "cache_gb", "precision")
    of_node = {k: options[k] for k in names if k in options}
    return options.get("model", model), of_node, {k: v for k, v in options.items() if k not in {*of_node, "model"}}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_reference_pass_depends_on_brings_it_back(tiny, tools, reference, draw, change):
    draw(tools.inject(tiny.model, reference))
    model, of_node, of_run = split(CHANGES[change](tiny, tools), tiny.model)
    changed, evaluated = draw(tools.inject(model, reference, **of_node), **of_run)
    assert evaluated == 2 * STEPS
    again, evaluated = draw(tools.inject(model, reference, **of_node), **of_run)
    assert evaluated == 0 and torch.equal(again, changed)


def test_another_reference_or_encoder_is_read_anew(tiny, tools, draw):
    encoder = tools.kv_encoder(tiny)
    draw(tools.inject(tiny.model, tools.kv_reference(tiny, tools.picture(1), encoder=encoder)))
    for picture, options in (
        (tools.picture(2), {"encoder": encoder}),
        (tools.picture(1), {"encoder": tools.kv_encoder(tiny, seed=9)}),
        (tools.picture(1), {"encoder": encoder, "size": 80}),
    ):
        assert draw(tools.inject(tiny.model, tools.kv_reference(tiny, picture, **options)))[1] == 2 * STEPS


def test_what_it_does_not_depend_on_brings_no_pass_back(tiny, tools, draw):
    reference = tools.kv_reference(tiny, tools.picture(1), encoder=tools.kv_encoder(tiny))
    plain, _ = draw(tools.inject(tiny.model, reference))
    other_guider = tools.guider(tools.inject(tiny.model, reference), tiny.text(1), tiny.text(1), 3.0)
    for out, evaluated in (
        draw(tools.inject(tiny.model, reference), cfg=4.0),
        draw(tools.inject(tiny.model, reference, weight=0.5)),
        draw(tools.inject(tiny.model, reference, mask=torch.ones(1, 64, 64), weight=0.7)),
        draw(tools.inject(tools.apply(tiny.model, reference), reference)),
        draw(tiny.model, guider=other_guider),
    ):
        assert evaluated == 0 and not torch.equal(out, plain)


def test_only_the_half_that_is_missing_is_evaluated(tiny, tools, reference, draw):
    model = tools.inject(tiny.model, reference)
    assert draw(model, cfg=1.0)[1] == STEPS
    with_both, evaluated = draw(model)
    assert evaluated == STEPS
    assert torch.equal(draw(model)[0], with_both)


def test_fixed_noise_is_evaluated_once_for_all_seeds_and_numbers_of_pictures(tiny, tools, reference, draw):
    model = tools.inject(tiny.model, reference, noise="fixed")
    first, evaluated = draw(model)
    assert evaluated == 2 * STEPS
    assert draw(model, seed=2)[1] == draw(model, (3, *LATENT[1:]))[1] == 0


def test_pictures_given_one_each_stay_apart_after_a_smaller_batch(tiny, tools, draw):
    """With fixed noise a run of one image reads less than a run of three."""

    def each(**options):
        reference = tools.kv_reference(tiny, tools.picture(4, n=3), several="one per picture")
        return tools.inject(tiny.model, reference, noise="fixed")

    model, three = each(), (3, *LATENT[1:])
    draw(model)
    assert torch.equal(draw(model, three)[0], draw(each(), three)[0])


def test_two_nodes_with_one_reference_share_what_is_kept(tiny, tools, reference, draw):
    model = tools.inject(tools.inject(tiny.model, reference, weight=0.5), reference, weight=0.3)
    assert draw(model)[1] == 2 * STEPS


@pytest.mark.contract
def test_an_interrupted_run_leaves_what_is_right(tiny, tools, reference, draw):
    import comfy.model_management

    model = tools.inject(tiny.model, reference)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        draw(model, callback=interrupt)
    after, evaluated = draw(model)
    assert 0 < evaluated < 2 * STEPS
    assert torch.equal(after, draw(tools.inject(tiny.model, tools.kv_reference(tiny, tools.picture(1))))[0])


@pytest.mark.contract
def test_the_cache_goes_with_its_reference(tiny, tools, draw):
    reference = tools.kv_reference(tiny, tools.picture(1))
    draw(tools.inject(tiny.model, reference))
    cache = weakref.ref(reference.subjects[0].cache)
    assert cache().size() == STEPS * A_LEVEL
    del reference
    draw(tiny.model)  # the host holds on to the last MODEL that it ran
    gc.collect()
    assert cache() is None


# -- the bound


def logged(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "LCM-Lookahead" in r.getMessage()]


def test_a_run_larger_than_the_bound_keeps_what_fits_and_says_so_once(tiny, tools, reference, draw, caplog):
    model = tools.inject(tiny.model, reference, cache_gb=1.5 * A_LEVEL / 2**30)
    cache = reference.subjects[0].cache
    for expected in (2 * STEPS, 2, 2):  # one level is kept, and of the other not even a half
        with caplog.at_level("WARNING"):
            caplog.clear()
            out, evaluated = draw(model)
        (said,) = logged(caplog)
        assert "1 of 2 noise levels" in said and evaluated == expected and cache.size() == A_LEVEL
    assert torch.equal(out, draw(tools.inject(tiny.model, tools.kv_reference(tiny, tools.picture(1))))[0])


def test_a_cache_of_0_keeps_nothing_and_says_nothing(tiny, tools, reference, draw, caplog):
    model = tools.inject(tiny.model, reference, cache_gb=0.0)
    with caplog.at_level("WARNING"):
        assert draw(model)[1] == draw(model)[1] == 2 * STEPS
    assert logged(caplog) == [] and reference.subjects[0].cache.size() == 0


def test_whole_earlier_runs_make_way_oldest_first(tiny, tools, reference, draw):
    model = tools.inject(tiny.model, reference, cache_gb=2.1 * STEPS * A_LEVEL / 2**30)

    def evaluated(seed):
        return draw(model, seed=seed)[1]

    assert evaluated(1) == evaluated(2) == 2 * STEPS
    assert evaluated(1) == 0  # now the second is the oldest
    assert evaluated(3) == 2 * STEPS
    assert evaluated(1) == evaluated(3) == 0 and evaluated(2) == 2 * STEPS


def test_nodes_of_one_run_do_not_push_each_other_out(tiny, tools, reference, draw):
    """The same reference in two nodes that read different blocks, in a cache for one and a half of them."""
    bound = {"cache_gb": 1.5 * STEPS * A_LEVEL / 2 / 2**30}
    model = tools.inject(tiny.model, reference, blocks="coarse", **bound)
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


# -- what is kept: normed inputs, in full precision or in 8 bit


def test_in_8_bit_the_picture_is_nearly_the_same_and_no_cache_changes_it(tiny, tools, reference, draw):
    full = draw(tools.inject(tiny.model, reference))[0]
    eight, evaluated = draw(tools.inject(tiny.model, reference, precision="8 bit"))
    assert evaluated == 2 * STEPS  # what was kept in full precision is not for it
    assert 0 < relative(eight, full) < 5e-3
    for bound in (2.0, 0.0):
        assert torch.equal(draw(tools.inject(tiny.model, reference, precision="8 bit", cache_gb=bound))[0], eight)


@pytest.mark.parametrize("adain", ["off", "picture to the reference"])
@pytest.mark.parametrize("precision", ["full", "8 bit"])
def test_what_is_kept_is_as_large_as_the_node_counts_it(tiny, tools, reference, draw, precision, adain):
    model = tools.inject(tiny.model, reference, precision=precision, adain=adain)
    source = model.model_options["transformer_options"]["lookahead"].effects[0].source
    draw(model)
    assert reference.subjects[0].cache.size() == 2 * STEPS * source.bytes_per_row(4)


def test_only_the_prompt_is_kept_where_nothing_asks_for_the_negative(tiny, texts, tools, reference, draw):
    guider = tools.three_scales(tools.inject(tiny.model, reference), *texts, 2.0, 1.0, 0.0)
    assert draw(tiny.model, guider=guider)[1] == STEPS
    assert reference.subjects[0].cache.size() == STEPS * A_LEVEL / 2


def test_a_lora_as_a_hook_does_not_reach_what_is_replayed(tiny, texts, tools, reference):
    (text, options), negative = texts[0][0], texts[1]
    hooked = [[text, {**options, "hooks": tools.with_lora(tiny.model, hook=True)}]]

    def drawn(**bound):
        model = tools.inject(tiny.model, reference, **bound)
        return tools.sample(model, hooked, negative, torch.zeros(LATENT), steps=STEPS)

    cold = drawn()
    assert torch.equal(drawn(), cold) and torch.equal(drawn(cache_gb=0.0), cold)


@pytest.fixture
def sdxl_source(pack):
    """sdxl_source(**settings) is the source of a reference of 1024x1024 for SDXL's 70 self-attentions, by shapes."""
    names = pack.module("lookahead.files.block_names")
    blocks = pack.module("nodes.conditioning.unet_blocks")
    passes = pack.module("nodes.conditioning.reference_pass")
    subject = pack.module("nodes.reference.subject").Subject(
        None, None, None, None, None, latents=torch.empty(1, 4, 128, 128, device="meta")
    )
    everything = []
    for name in names.block_names():
        level = names.level_of(name.host)
        everything.append(blocks.KVBlock(name.host, name.diffusers, {1: 640, 2: 1280}[level], level, 2048))
    assert len(everything) == 70
    return lambda **settings: passes.KVSource(subject, tuple(everything), tuple(everything), **settings)


def test_30_steps_of_sdxl_at_1024_fit_into_6_gb(sdxl_source, pack):
    plain, eight = sdxl_source(), sdxl_source(precision="8 bit", renew=4, cache_bytes=6 << 30)
    keys_values = 2 * plain.numel_per_row()  # bytes of keys and values in 16 bit
    assert plain.bytes_per_row(2) == keys_values / 2 and eight.bytes_per_row(2) < keys_values / 4 * 1.01
    assert 2 * 30 * eight.bytes_per_row(2) <= 6 * 2**30  # even where every step makes a pass
    cost = pack.module("nodes.conditioning.apply_kv_injection").cost
    assert "8 passes" in cost(eight, 2) and "all are kept" in cost(eight, 2)
    assert "5 are kept" in cost(plain, 2) and "30 passes" in cost(plain, 2)
    assert "acts in about 12: 12 passes" in cost(plain, 2, 0.4) and "acts" not in cost(plain, 2)
    roomy = sdxl_source(cache_bytes=5 << 30)  # as the note of workflow 02 says
    assert "all are kept" in cost(roomy, 2, 0.4) and "all" not in cost(roomy, 2, 0.5)


# -- the reference is read in some of the steps


@pytest.fixture
def renewed(pack):
    return pack.module("nodes.conditioning.reference_pass").renewed


def test_passes_lie_at_equal_parts_of_the_sampling(renewed):
    even = [1 - n / 12 for n in range(13)]
    levels = [at for _, at in renewed(even, 4, lambda sigma: 1 - sigma)]
    assert levels == [even[n - n % 4] for n in range(12)]
    late = [2.0**-n for n in range(9)]  # most steps are small ones at the end: these share a pass
    found = renewed(late, 2, lambda sigma: 1 - sigma)
    assert [sigma for sigma, _ in found] == late[:-1]
    assert [at for _, at in found] == [1.0, 0.5, 0.25, *5 * [0.25]]
    assert renewed([3.0, 0.0], 4, lambda sigma: 0.5) == [(3.0, 3.0)]


@pytest.mark.parametrize("sampler, start, first, passes", [("euler", 0, 0, 2), ("heun", 0, 0, 2), ("euler", 0.5, 3, 1)])
def test_with_renew_most_steps_make_no_pass(tiny, texts, tools, reference, sampler, start, first, passes):
    """Also in samplers that ask for a level twice, and from the first step in which the reference acts."""
    model = tools.inject(tiny.model, reference, renew=3, start=start)
    with tools.watch(tiny, positive=texts[0], negative=texts[1]) as watch:

        def run():
            watch.clear()
            options = {"steps": 6, "sampler": sampler}
            return tools.sample(model, *texts, torch.zeros(LATENT), **options), [one.t for one in watch.references]

        picture, levels = run()
        assert len(levels) == passes and levels[0] == watch.passes[first].t
        again, none = run()
    assert none == [] and torch.equal(again, picture)
    kept = next(iter(reference.subjects[0].cache.runs.values()))
    assert len(kept) == 2 * passes


def test_renew_of_1_reads_each_step_as_before_and_a_larger_one_shares_what_is_kept(tiny, tools, reference, draw):
    plain, _ = draw(tools.inject(tiny.model, reference))
    assert torch.equal(draw(tools.inject(tiny.model, reference, renew=1))[0], plain)
    fewer, evaluated = draw(tools.inject(tiny.model, reference, renew=2))
    assert evaluated == 0 and not torch.equal(fewer, plain)
