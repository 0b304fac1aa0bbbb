"""KV injection and the three-scale guider in the real host against the plain oracle of `kv_oracle.py`.

Both sides get the same weights, latents, noise, text and image prompt, in float32. The picture is not square, and the
reference, which is, has another size.
"""

import copy
import dataclasses
import functools
from dataclasses import dataclass

import kv_cases
import kv_oracle as oracle
import pytest
import torch
from kv_cases import BOUND, GUIDED_BOUND, SCALES, SEED, SIDE, SIZES, STEPS, Case, Host, flat, named, worst
from tensors import randn, relative

encoder_of, host = kv_cases.encoder_of, kv_cases.host  # fixtures
NOISE_SEED = 8


@pytest.fixture(scope="module")
def cases(worlds, tools, tmp_path_factory):
    """`cases("mini")` and `cases("sdxl")`, each built once."""
    built = {}

    def case(kind: str) -> Case:
        if kind not in built:
            with torch.inference_mode():
                world = kv_cases.load_world(kind, worlds, tools, tmp_path_factory.mktemp(kind))
                unet = tools.diffusers_unet(world)
                image = tools.picture(1)
                tokens, null_tokens = kv_cases.image_tokens(unet, world, image)
                lora = oracle.random_lora(unet, seed=31)
                built[kind] = Case(world, unet, lora, tokens, null_tokens, SIZES[kind], image)
        return built[kind]

    return case


@pytest.fixture(params=["mini", "sdxl"])
def case(request, cases) -> Case:
    return cases(request.param)


# --- the oracle by itself


def test_the_oracle_without_reference_is_plain_diffusers(case):
    x, t, context, pooled, time_ids = case.asked_of_picture(0, case.positive)
    added = {"text_embeds": pooled, "time_ids": time_ids}
    plain = case.unet(x, t, encoder_hidden_states=context, added_cond_kwargs=added).sample
    assert relative(case.predict(0, True, prompt=False), plain) < 1e-5
    empty = {name: (k[:, :0], v[:, :0]) for name, (k, v) in case.export(0, case.kv_prompt).items()}
    assert torch.equal(case.predict(0, True, empty, prompt=False), case.predict(0, True, prompt=False))


def test_the_oracle_exports_the_bases_own_projections_without_lora(case):
    """And with all deltas zero; and the picture as its own reference changes nothing. In float64, since the oracle and
    diffusers round differently, and trained weights amplify that."""
    unet = copy.deepcopy(case.unet).double()
    question = [v.double() for v in case.asked_of_picture(0, case.positive)]
    seen = {}
    for name, block in oracle.blocks(unet).items():
        for which in "kv":
            getattr(block.attn1, f"to_{which}").register_forward_hook(
                lambda _, __, out, at=(name, which): seen.setdefault(".".join(at), out)
            )
    x, t, context, pooled, time_ids = question
    added = {"text_embeds": pooled, "time_ids": time_ids}
    plain = unet(x, t, encoder_hidden_states=context, added_cond_kwargs=added).sample
    own = {name: (seen[f"{name}.k"], seen[f"{name}.v"]) for name in oracle.blocks(unet)}
    zero = {k: (torch.zeros_like(v) if "lora_B" in k else v).double() for k, v in case.lora.items()}
    for lora in ({}, zero):
        assert worst(flat(oracle.export(unet, *question, lora)), flat(own)) < 1e-9
    assert relative(oracle.predict(unet, *question, kv=own), plain) < 1e-9


def test_the_oracles_lora_has_the_names_of_the_encoder_file_and_all_of_them_act(case):
    count = len(oracle.blocks(case.unet))
    encoder = {k for k in case.lora if k.startswith("kv_encoder.")}
    assert len(encoder) == (count - 1) * 8 * 2 and len(case.lora) - len(encoder) == count * 2 * 2
    last = oracle.last_block(case.unet)
    assert last == f"up_blocks.1.attentions.2.transformer_blocks.{1 if count == 70 else 0}"
    assert not any(last in k for k in encoder)
    kv = flat(case.export(0, case.kv_prompt))
    assert all(relative(kv[k], v) > 0.1 for k, v in flat(case.export(0, case.kv_prompt, lora={})).items())


def test_the_oracles_last_block_has_dead_layers(case):
    """What the last block's attentions and feed-forward give reaches no exported keys and values."""
    last = oracle.blocks(case.unet)[oracle.last_block(case.unet)]
    before = case.export(0, case.kv_prompt)
    layers = [last.attn1.to_out[0], last.attn2.to_out[0], last.ff.net[2]]
    for layer in layers:
        layer.weight.data *= -1.5
    try:
        after = case.export(0, case.kv_prompt)
    finally:
        for layer in layers:
            layer.weight.data /= -1.5
    assert worst(flat(after), flat(before)) == 0


def test_the_oracles_guidance_is_plain_cfg_where_the_reference_has_no_effect():
    e_u, e_t = randn(1, 4, 8, 8, seed=1), randn(1, 4, 8, 8, seed=2)
    torch.testing.assert_close(oracle.guided(e_u, e_t, e_u, e_t, 3.0, 2.0, 2.0), e_u + 5 * (e_t - e_u))
    a, b = randn(1, 4, 8, 8, seed=3), randn(1, 4, 8, 8, seed=4)
    torch.testing.assert_close(oracle.guided(e_u, e_t, a, b, 3.0, 2.0, 2.0), -6 * e_u + 3 * e_t + 2 * b + 2 * a)


# --- the host's side


@dataclass
class Answers:
    """For each sigma: the four predictions, the guided result for each set of scales, and reference KV."""

    predictions: list[dict]
    guided: dict[tuple, list]
    exported: list[dict]  # of the conditional rows
    exported_null: list[dict]


@pytest.fixture(scope="module")
def answers(cases, tools, encoder_of):
    """What the nodes answer, asked for once a case."""

    @functools.cache
    def of(kind: str) -> Answers:
        with torch.inference_mode():
            host = Host(cases(kind), tools, encoder_of)
            guided = {scales: host.guided(scales) for scales in SCALES}
            return Answers(host.predictions(), guided, host.exported(True), host.exported(False))

    return of


@pytest.fixture(scope="module")
def expectations(cases):
    """What the oracle answers, asked for once a case."""

    @functools.cache
    def of(kind: str) -> Answers:
        with torch.inference_mode():
            case, each = cases(kind), range(len(STEPS))
            kv = [case.both(n) for n in each]
            four = [case.expected(n, kv[n]) for n in each]
            guided = {scales: [oracle.guided(**four[n], **named(scales)) for n in each] for scales in SCALES}
            return Answers(four, guided, [pair[0] for pair in kv], [pair[1] for pair in kv])

    return of


@pytest.mark.parametrize("kind", SIZES)
def test_exported_keys_and_values_agree_with_the_oracle(answers, expectations, kind):
    found, expected = answers(kind), expectations(kind)
    for n in range(len(STEPS)):
        conditional = worst(flat(found.exported[n]), flat(expected.exported[n]))
        unconditional = worst(flat(found.exported_null[n]), flat(expected.exported_null[n]))
        print(f"relative rms difference {conditional:.1e}, {unconditional:.1e}")
        assert conditional < BOUND and unconditional < BOUND


@pytest.mark.parametrize("kind", SIZES)
def test_noise_predictions_agree_with_the_oracle(answers, expectations, kind):
    for found, expected in zip(answers(kind).predictions, expectations(kind).predictions, strict=True):
        print({name: f"{relative(found[name], expected[name]):.1e}" for name in expected})
        assert worst(found, expected) < BOUND
        assert relative(expected["e_ft"], expected["e_nt"]) > 0.01  # the reference does something here
        assert relative(expected["e_fu"], expected["e_nu"]) > 0.01


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("kind", SIZES)
def test_guided_results_agree_with_the_oracle(answers, expectations, kind, scales):
    for found, expected in zip(answers(kind).guided[scales], expectations(kind).guided[scales], strict=True):
        print(f"relative rms difference {relative(found, expected):.1e}")
        assert relative(found, expected) < GUIDED_BOUND


@pytest.mark.parametrize("trained", [True, False])
def test_the_reference_acts_without_an_image_prompt_as_in_the_oracle(case, host, trained):
    """A trained encoder, and none at all."""
    side = host(case, trained=trained, prompt=trained)
    model = side.tools.run("LookaheadApplyKVInjection", case.world.model, side.reference)
    for cfg, conditional in ((1.0, True), (0.0, False)):
        found = side.plain(model, cfg)
        for n in range(len(STEPS)):
            kv = case.export(n, case.kv_prompt if conditional else case.zeros, lora=None if trained else {})
            assert relative(found[n], case.predict(n, conditional, kv, prompt=False)) < BOUND


def test_an_alpha_in_the_file_scales_the_low_rank_weights(cases, host):
    case = dataclasses.replace(cases("mini"), alpha=2.0)
    found = host(case).plain(host(case).with_kv, 1.0)
    for n in range(len(STEPS)):
        assert relative(found[n], case.predict(n, True, case.export(n, case.kv_prompt))) < BOUND
        full = cases("mini").export(n, case.kv_prompt)
        assert relative(found[n], case.predict(n, True, full)) > 10 * BOUND


NOISES = {
    # name: size of the picture's latents, options, the noise given to the guider -> that of the reference
    "of the run": ((SIDE, SIDE), {}, lambda given: given),
    "of the run's seed, where the sizes differ": ((12, 20), {}, lambda _: randn(1, 4, SIDE, SIDE, seed=SEED)),
    "of the run's seed, where there is none": (
        (SIDE, SIDE),
        {"nothing": True},
        lambda _: randn(1, 4, SIDE, SIDE, seed=SEED),
    ),
    "fixed": (
        (SIDE, SIDE),
        {"noise": "fixed", "noise_seed": NOISE_SEED},
        lambda _: randn(1, 4, SIDE, SIDE, seed=NOISE_SEED),
    ),
}


@pytest.mark.parametrize("name", NOISES)
def test_the_reference_is_noised_with_the_noise(cases, host, name):
    latent, options, expected_noise = NOISES[name]
    options = dict(options)
    case = dataclasses.replace(cases("mini"), latent=latent)
    noise = case.noise * 0 if options.pop("nothing", False) else case.noise
    side = host(case, **options)
    found = side.plain(side.with_kv, 1.0, noise=noise)
    for n in range(len(STEPS)):
        kv = case.export(n, case.kv_prompt, noise=expected_noise(noise))
        assert relative(found[n], case.predict(n, True, kv)) < BOUND


@pytest.mark.parametrize("scales", SCALES)
def test_each_image_of_a_batch_has_the_reference_under_its_own_noise(cases, host, scales):
    case = dataclasses.replace(cases("mini"), latent=(SIDE, SIDE))
    noise, x = randn(3, 4, SIDE, SIDE, seed=41), randn(3, 4, SIDE, SIDE, seed=42)
    found = host(case).guided(scales, noise=noise, x=x)
    for n in range(len(STEPS)):
        for row in range(3):
            case.x = x[row : row + 1]
            four = case.expected(n, case.both(n, noise=noise[row : row + 1]))
            assert relative(found[n][row], oracle.guided(*four.values(), *scales)[0]) < GUIDED_BOUND


# --- the comparison is sharp enough


def without_lora_in(case, block: str) -> dict:
    return {k: v for k, v in case.lora.items() if not k.startswith(f"kv_encoder.{block}.")}


def exported_from_the_tuned_projection(case) -> dict:
    """The export's delta with the pass's own added to it: B @ A + B' @ A' is [B, B'] @ [A, A']."""
    lora = dict(case.lora)
    for name in oracle.blocks(case.unet):
        for layer in oracle.EXPORT_LAYERS:
            for half, dim in (("A", 0), ("B", 1)):
                export, own = (f"{kind}.{name}.{layer}.lora_{half}.weight" for kind in ("kv_export", "kv_encoder"))
                if own in lora:
                    lora[export] = torch.cat([lora[export], lora[own]], dim=dim)
    return lora


def swapped(kv: dict) -> dict:
    return {name: (v, k) for name, (k, v) in kv.items()}


def without_middle(kv: dict) -> dict:
    return {name: pair for name, pair in kv.items() if not name.startswith("mid_block")}


MISTAKES = {
    "LoRA missing in one block": lambda case, n: case.both(
        n, lora=without_lora_in(case, "down_blocks.1.attentions.0.transformer_blocks.0")
    ),
    "export from the tuned projection": lambda case, n: case.both(n, lora=exported_from_the_tuned_projection(case)),
    "wrong noise": lambda case, n: case.both(n, noise=randn(1, 4, SIDE, SIDE, seed=SEED + 1)),
    "kappa_0 from the negative prompt": lambda case, n: case.both(n, null_text=case.negative),
    "keys and values swapped": lambda case, n: tuple(map(swapped, case.both(n))),
    "middle block skipped": lambda case, n: tuple(map(without_middle, case.both(n))),
}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_oracle_fails_each_comparison(cases, answers, expectations, kind, mistake):
    """By more than twice the bound at one sigma: the mini world's middle is its weakest part."""
    case, found, without = cases(kind), answers(kind), expectations(kind).predictions
    failures, fails = [], False
    for n in range(len(STEPS)):
        kv, kv_null = MISTAKES[mistake](case, n)
        wrong = {**without[n], "e_fu": case.predict(n, False, kv_null), "e_ft": case.predict(n, True, kv)}
        in_guided = relative(found.guided[SCALES[0]][n], oracle.guided(**wrong, **named(SCALES[0])))
        failures.append((worst(found.predictions[n], wrong), in_guided))
        if "skipped" not in mistake:  # which is no mistake of the export
            assert worst(flat(found.exported_null[n]), flat(kv_null)) > 10 * BOUND
        fails = max(p for p, _ in failures) > 2 * BOUND and max(g for _, g in failures) > 2 * GUIDED_BOUND
        if fails:
            break
    print(mistake, *(f"predictions {p:.1e}, guided {g:.1e}" for p, g in failures), sep="; ")
    assert fails
