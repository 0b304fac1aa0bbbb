"""The training step: what its losses are, what their gradients reach, and what chance decides."""

import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from lcm_lookahead.lookahead.losses.identity import NONE, FaceReferences, IdentityLoss, embed
from lcm_lookahead.lookahead.method.resampler import ResamplerSizes
from lcm_lookahead.lookahead.vision.arcface import Recogniser
from lcm_lookahead.lookahead.vision.faces import TEMPLATE, Face
from lcm_lookahead.mini.files import weights
from lcm_lookahead.mini.plan import CONTEXT, SIZES
from lcm_lookahead.mini.stages import base
from lcm_lookahead.sdxl import lora
from lcm_lookahead.sdxl.encoder import Encoder
from lcm_lookahead.sdxl.shared_unet import Condition
from lcm_lookahead.trainer.gradients import gradients
from lcm_lookahead.trainer.lookahead import config
from lcm_lookahead.trainer.lookahead.alignment import consistency, score_distillation
from lcm_lookahead.trainer.lookahead.draws import draw
from lcm_lookahead.trainer.lookahead.step import Batch, Step, parts
from lcm_lookahead.trainer.seeds import order

RESAMPLER = ResamplerSizes(4, 64, 1, 1, 32, CONTEXT, 64)
FILES = {"base": "mini", "start": "a", "shortcut": "b", "vae": "c", "recogniser": "d"}
N = 3


def settings(**values):
    values = {"batch": N, "precision": "fp32", "checkpointing": "none"} | values
    model = FILES | values.pop("model", {})
    return config.from_values({"model": model, "data": {"source": "mini"}} | values)


@pytest.fixture(scope="module")
def unet():
    """All blocks of the mini world's, in half of their widths: no question here hangs on them."""
    torch.manual_seed(0)
    layout = replace(base.LAYOUT, channels=tuple(width // 2 for width in base.LAYOUT.channels))
    made = UNet2DConditionModel(sample_size=16, **layout.diffusers())
    made.set_attn_processor(AttnProcessor())
    return made


@pytest.fixture(scope="module")
def decoder():
    """Of TAESD's layout, in few channels."""
    torch.manual_seed(4)
    widths = {f"{half}_block_out_channels": (16,) * 4 for half in ("encoder", "decoder")}
    return AutoencoderTiny(**widths).eval().requires_grad_(False)


@pytest.fixture
def make_step(unet, decoder):
    """Steps over one UNet; each is taken out of it again."""
    made = []

    def make(**values):
        c = settings(**values)
        torch.manual_seed(1)
        encoder = Encoder(unet, RESAMPLER, *((2, 3) if c.model.kv else (0, 0)))
        # A new KV encoder has zeros, behind which half of its weights would get no gradient.
        encoder.kv.copy_from({k: torch.randn_like(v) * 0.05 for k, v in encoder.kv.tensors().items()})
        shortcut = lora.build(unet, 3, conv_rank=2).requires_grad_(False)
        for branch in shortcut.branches:
            branch.lora_up.weight.normal_(std=0.05)
        null = torch.randn(1, 5, 32)
        step = Step(c, unet, encoder, null, shortcut, lambda z: decoder.decode(z).sample)
        made.append(step)
        return step

    yield make
    for step in made:
        step.roles.eject()


def detect(pictures):
    """A face in every picture, except in those that are dark all over."""
    face = Face(torch.tensor([20.0, 20, 108, 108]), TEMPLATE + 8, 1.0)
    return [[face] if picture.std() > 0 else [] for picture in pictures]


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(3)

    def text():
        time_ids = torch.tensor([128.0, 128, 0, 0, 128, 128]).expand(N, 6)
        pooled = torch.randn(N, SIZES["text"]["width_g"], generator=g)
        return Condition(torch.randn(N, 77, CONTEXT, generator=g), pooled, time_ids)

    recogniser = Recogniser(weights.face_recogniser(), "mini")
    width = len(recogniser(torch.rand(1, 3, 112, 112, generator=g))[0])
    embeddings = torch.nn.functional.normalize(torch.randn(N, width, generator=g), dim=-1)
    people = FaceReferences(embeddings, TEMPLATE.expand(N, 5, 2), torch.full((N, 2), 128))
    target, reference = torch.randn(2, N, 4, 16, 16, generator=g)
    features = torch.randn(N, 5, 32, generator=g)
    loss = IdentityLoss(recogniser, detect, people, NONE)
    return Batch([f"sample {n}" for n in range(N)], target, reference, text(), text(), features, loss)


@pytest.fixture
def draws():
    """Nothing dropped, mid-way time steps: gradients of a random UNet vanish nowhere."""
    drawn = draw(settings(), range(N), (4, 16, 16))
    none = torch.zeros(N, dtype=torch.bool)
    t = torch.tensor([200, 500, 700])
    return replace(drawn, no_text=none, no_image_prompt=none, no_kv=none, t=t, t_lookahead=t + 50)


def run(step, batch, draws, **options):
    step.encoder.zero_grad(set_to_none=True)
    trained = list(step.encoder.parameters())
    return gradients(step, parts(step.config), [(batch, draws)], trained, **options)


def test_each_loss_reaches_every_trained_tensor_and_nothing_else(make_step, batch, draws):
    step = make_step()
    for part in ("diffusion", "lookahead"):
        step.encoder.zero_grad(set_to_none=True)
        outcome = step(part, batch, draws)
        assert outcome.valid.all()
        outcome.loss.backward()
        silent = [n for n, p in step.encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not silent, part
        assert all(p.grad is None for m in (step.unet, step.shortcut) for p in m.parameters())


def test_the_diffusion_loss_is_the_squared_error_of_the_noise(make_step, batch, draws):
    step = make_step()
    outcome = step("diffusion", batch, draws)
    assert torch.allclose(outcome.loss, outcome.values.mean()) and outcome.values.shape == (N,)
    predicted, _ = step._predict(batch, draws, draws.t)
    assert torch.allclose(outcome.loss, torch.nn.functional.mse_loss(predicted, draws.noise))


@pytest.mark.parametrize("lookahead", [{}, {"semantic_alignment": 3.0, "layout_alignment": 2.0}])
def test_checkpointing_changes_no_bit_of_the_gradients(make_step, batch, draws, lookahead):
    found = []
    for mode in ("none", "all"):
        step = make_step(checkpointing=mode, lookahead=lookahead)
        outcomes, _ = run(step, batch, draws)
        found.append([outcomes["lookahead"].loss, *(p.grad for p in step.encoder.parameters())])
        step.roles.eject()
        step.roles.inject(mode)  # for the fixture, which ejects
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_two_graphs_never_stand_in_memory_together(make_step, batch, draws):
    step, seen = make_step(), []
    export = step.roles.export

    def watched(*inputs):
        assert not [tensor for tensor in (ref() for ref in seen) if tensor is not None]
        kv = export(*inputs)
        seen.extend(weakref.ref(tensor) for pair in kv.values() for tensor in pair)
        return kv

    step.roles.export = watched
    run(step, batch, draws)
    assert len(seen) == 2 * 2 * len(step.encoder.paths)


def test_the_norms_are_those_of_each_loss_alone_and_measuring_changes_no_gradient(make_step, batch, draws):
    step = make_step()
    alone = {}
    for part in ("diffusion", "lookahead"):
        step.encoder.zero_grad(set_to_none=True)
        step(part, batch, draws).loss.backward()
        alone[part] = torch.nn.utils.get_total_norm([p.grad for p in step.encoder.parameters()])
    run(step, batch, draws)
    expected = [p.grad.clone() for p in step.encoder.parameters()]
    _, norms = run(step, batch, draws, measure=True)
    assert norms.keys() == alone.keys()
    assert all(torch.allclose(norms[k], alone[k], rtol=1e-3) for k in alone)
    assert all(torch.equal(a, p.grad) for a, p in zip(expected, step.encoder.parameters(), strict=True))


def test_samples_without_a_face_or_without_any_reference_do_not_count(make_step, batch, draws):
    step = make_step(lookahead={"weight": 1.0})
    everyone = step("lookahead", batch, draws)
    blind = replace(
        draws,
        no_image_prompt=torch.tensor([False, True, True]),
        no_kv=torch.tensor([False, True, False]),
    )
    outcome = step("lookahead", batch, blind)
    assert outcome.valid.tolist() == [True, False, True]
    assert torch.allclose(outcome.loss, outcome.values[[0, 2]].sum() / N)
    decode = step.decode_preview

    def faceless(z):  # the first picture is a blank
        pictures = decode(z)
        return torch.cat([torch.zeros_like(pictures[:1]), pictures[1:]])

    step.decode_preview = faceless
    outcome = step("lookahead", batch, draws)
    assert outcome.valid.tolist() == [False, True, True]
    assert torch.allclose(outcome.loss, everyone.values[1:].sum() / N, atol=1e-5)


def test_the_arms_differ_as_they_should(make_step, batch, draws):
    at_0 = replace(draws, strength=torch.zeros(N))
    shortcut, x0 = make_step(), None
    fast, base_like = shortcut("lookahead", batch, draws), shortcut("lookahead", batch, at_0)
    shortcut.roles.eject()
    x0 = make_step(lookahead={"arm": "x0"})
    plain = x0("lookahead", batch, draws)
    assert torch.allclose(plain.values, base_like.values, atol=1e-4)  # a shortcut at strength 0 is the base
    assert not torch.allclose(plain.values, fast.values, atol=1e-3)
    x0.roles.eject()
    without = make_step(model={"kv": False})
    assert not without.encoder.kv and without.encoder.groups().keys() == {"adapter"}
    other = replace(batch, reference=batch.reference + 1)
    assert torch.equal(without("diffusion", batch, draws).loss, without("diffusion", other, draws).loss)
    assert parts(settings(lookahead={"arm": "none"})) == ("diffusion",)
    shortcut.roles.inject(), x0.roles.inject()


@pytest.mark.parametrize("align", ["sds", "consistency"])
def test_the_other_alignments_reach_everything_trained_and_add_to_the_loss(make_step, batch, draws, align):
    plain = make_step(lookahead={"full_strength": 1.0})
    draws = replace(draws, strength=torch.ones(N))
    before = plain("lookahead", batch, draws)
    plain.roles.eject()
    step = make_step(lookahead={"align": align, "align_weight": 2.0})
    outcome = step("lookahead", batch, draws)
    assert torch.allclose(outcome.loss, before.loss + 2 * outcome.terms["alignment"].mean(), rtol=1e-4)
    assert (outcome.terms["alignment"] > 0).all()
    step.decode_preview = lambda z: torch.zeros(N, 3, 128, 128)  # no face: the alignment is alone
    step.encoder.zero_grad(set_to_none=True)
    step("lookahead", batch, draws).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in step.encoder.parameters())
    assert (draw(step.config, range(9), (1, 1, 1)).strength == 1).all()
    plain.roles.inject()


def test_score_distillation_pulls_the_preview_where_the_base_would_have_it(make_step, batch, draws):
    step = make_step()
    latent, other = torch.randn(2, N, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    latent.requires_grad_(True)
    score_distillation(lambda z, d, t, strength: other, step.alpha_bar, latent, draws).sum().backward()
    weight = (1 - step.alpha_bar[draws.t_align]).view(-1, 1, 1, 1)
    expected = weight * (other - draws.noise_align) / latent[0].numel()
    assert torch.allclose(latent.grad, expected, atol=1e-7)


def test_the_consistency_loss_is_nothing_where_every_step_sees_the_same_picture(make_step, batch, draws):
    step, t = make_step(), draws.t_lookahead
    z_t = step.noised(batch.target, draws.noise, t)
    knowing = consistency(lambda z, d, t, s: draws.noise, step.alpha_bar, batch.target, z_t, t, draws)
    guessing = consistency(lambda z, d, t, s: draws.noise * 0.9, step.alpha_bar, batch.target, z_t, t, draws)
    assert knowing.max() < 1e-3 < 0.05 < guessing.min()


def test_weighing_by_strength_is_an_option(make_step, batch, draws):
    weighed = make_step(lookahead={"weigh_by_strength": True, "weight": 2.0})("lookahead", batch, draws)
    assert torch.allclose(weighed.loss, 2 * (weighed.values * draws.strength).mean())


def test_what_is_dropped_is_dropped_for_that_sample_alone(make_step, batch, draws):
    step = make_step()
    full = step("diffusion", batch, draws).values
    second = torch.tensor([False, True, False])
    for name in ("no_text", "no_image_prompt", "no_kv"):
        values = step("diffusion", batch, replace(draws, **{name: second})).values
        assert (values != full).tolist() == [False, True, False] or (
            (values - full).abs()[[0, 2]].max() < 1e-5 < (values - full).abs()[1]
        )
    # Without text, neither decoder nor KV encoder sees any of it.
    blank = Condition(batch.text.context * 0, batch.text.pooled * 0, batch.text.time_ids)
    silent = replace(draws, no_text=torch.ones(N, dtype=torch.bool))
    expected = step("diffusion", replace(batch, text=blank, reference_text=blank), draws).values
    assert torch.allclose(step("diffusion", batch, silent).values, expected, atol=1e-6)


def test_draws_have_the_shares_that_the_configuration_says():
    c = settings(drop={"text": 0.1, "image_prompt": 0.2, "both": 0.15, "kv": 0.3})
    d = draw(c, range(4000), (1, 1, 1))
    text, image, both = d.no_text & ~d.no_image_prompt, d.no_image_prompt & ~d.no_text, d.no_text & d.no_image_prompt
    shares = [x.float().mean().item() for x in (text, image, both, d.no_kv, both & d.no_kv, d.strength == 1)]
    assert shares == pytest.approx([0.1, 0.2, 0.15, 0.3, 0.045, 0.5], abs=0.03)
    rest = d.strength[d.strength < 1]
    assert 0.1 <= rest.min() < 0.12 and rest.mean().item() == pytest.approx(0.55, abs=0.02)


def test_draws_and_order_belong_to_the_sample_not_to_the_batch():
    whole, part = (draw(settings(), numbers, (4, 2, 2)) for numbers in (range(8), [5, 2]))
    assert all(torch.equal(getattr(whole, k)[[5, 2]], getattr(part, k)) for k in vars(part))
    assert len(set(whole.noise.flatten().tolist())) > 100
    everyone = order(7, 0, range(21))
    assert [sorted(everyone[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert everyone[:7] != everyone[7:14] and order(7, 0, [9, 3]) == [everyone[9], everyone[3]]
    assert order(7, 1, range(7)) != everyone[:7]


# -- telling people apart


def test_contrast_adds_infonce_over_the_people_of_the_batch(make_step, batch, draws):
    """Against the formula written out, by the embeddings of the previews that a plain step compares."""
    plain, kept = make_step(), []
    decode = plain.decode_preview
    plain.decode_preview = lambda z: kept.append(decode(z)) or kept[-1]
    before = plain("lookahead", batch, draws)
    after = make_step(lookahead={"contrast": 0.5})("lookahead", batch, draws)
    values, valid, contrast = batch.loss.among(kept[0].float())
    assert torch.equal(after.values, before.values) and torch.equal(values.detach(), after.values)
    people = batch.loss.references.embeddings
    for row in range(N):
        if not valid[row]:
            assert contrast[row] == 0
            continue
        picture = (kept[0][row : row + 1].float().clamp(-1, 1) + 1) / 2
        cosines = embed(batch.loss.recogniser, picture, TEMPLATE[None] + 8)[0] @ people.T
        shares = (cosines / 0.1).exp()
        assert contrast[row].item() == pytest.approx(-(shares[row] / shares.sum()).log().item(), abs=1e-3)
    added = after.loss - before.loss
    assert added.item() == pytest.approx(0.5 * contrast.sum().item() / N, rel=1e-4) and added > 0
    assert torch.equal(after.terms["contrast"], contrast.detach()) and before.terms == {}
    half = replace(draws, strength=torch.full((N,), 0.5))
    weighing = {"contrast": 0.5, "weigh_by_strength": True}
    weighed, alone = (
        make_step(lookahead=more)("lookahead", batch, half) for more in (weighing, weighing | {"contrast": 0})
    )
    said = weighed.terms["contrast"]  # without any weight
    assert (weighed.loss - alone.loss).item() == pytest.approx(0.5 * 0.5 * said.sum().item() / N, rel=1e-3)


# -- PuLID's alignment of passes with and without the person

ALIGNED = {"semantic_alignment": 3.0, "layout_alignment": 2.0}


def asked_of_the_text(unet, predict):
    """Queries and keys of all cross-attentions during a pass, by hooks on the layers."""
    found, hooks = {}, []

    def keep(path, layer):
        def note(_, __, out):
            found.setdefault(path, {})[layer] = out.double()

        return note

    for path, module in unet.named_modules():
        attention, _, layer = path.rpartition(".")
        if attention.endswith("attn2") and layer in ("to_q", "to_k"):
            hooks.append(module.register_forward_hook(keep(attention, layer)))
    with torch.no_grad():
        predict()
    for hook in hooks:
        hook.remove()
    return found


def test_the_person_is_aligned_to_what_the_frozen_models_ask_the_text(make_step, batch, draws):
    """Against the formula written out word by word, over diffusers' own attention for the pass without the person."""
    plain = make_step()
    before = plain("lookahead", batch, draws)
    assert before.terms == {}
    plain.roles.eject()
    step = make_step(lookahead=ALIGNED)
    z_t = step.noised(batch.target, draws.noise, draws.t_lookahead)
    uncond = torch.tensor([False, True, False])
    draws = replace(draws, no_image_prompt=uncond, no_kv=uncond)
    own = asked_of_the_text(step.unet, lambda: step._predict(batch, draws, draws.t_lookahead, draws.strength))
    outcome = step("lookahead", batch, draws)
    step.roles.eject()
    step.shortcut.attach(step.unet)

    def without():
        with step.shortcut.at(draws.strength):
            step.unet(z_t, draws.t_lookahead, batch.text.context, added_cond_kwargs=batch.text.added)

    others = asked_of_the_text(step.unet, without)
    step.shortcut.detach()
    assert own.keys() == others.keys() and len(own) == 17
    semantic, layout = torch.zeros(2, N, dtype=torch.float64)
    for path, asked in own.items():
        heads = step.unet.get_submodule(path).heads
        for row in range(N):
            layout[row] += (asked["to_q"][row] - others[path]["to_q"][row]).square().mean() / len(own)
            squares = []
            for head in range(heads):
                means = []
                for read in (asked, others[path]):
                    q, k = (read[name][row].chunk(heads, -1)[head] for name in ("to_q", "to_k"))
                    means.append(torch.stack([(q @ word / len(word) ** 0.5).softmax(0) @ q for word in k]))
                squares.append((means[0] - means[1]).square().mean())
            semantic[row] += torch.stack(squares).mean() / len(own)
    assert (semantic[~uncond] > 1e-6).all() and (layout[~uncond] > 1e-6).all()
    for name, expected in {"semantic": semantic, "layout": layout}.items():
        expected = torch.where(uncond, 0.0, expected)  # a sample without a person has nothing to keep
        assert torch.allclose(outcome.terms[name].double(), expected, rtol=1e-3, atol=1e-9), name
    step.roles.inject(), plain.roles.inject()


def test_the_alignment_adds_to_the_loss_by_its_weights_and_reaches_everything_trained(make_step, batch, draws):
    plain = make_step()
    before = plain("lookahead", batch, draws).loss
    plain.roles.eject()
    step = make_step(lookahead=ALIGNED)
    outcome = step("lookahead", batch, draws)
    added = 3 * outcome.terms["semantic"].mean() + 2 * outcome.terms["layout"].mean()
    assert torch.allclose(outcome.loss, before + added, rtol=1e-5)
    step.decode_preview = lambda z: torch.zeros(N, 3, 128, 128)  # no face: the alignment is alone
    step.encoder.zero_grad(set_to_none=True)
    step("lookahead", batch, draws).loss.backward()
    silent = [n for n, p in step.encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert len(silent) == 2, silent  # what the last block's image prompt adds comes after the last question to the text
    assert all(p.grad is None for m in (step.unet, step.shortcut) for p in m.parameters())
    plain.roles.inject()
