"""Round trip: an encoder that was trained for a few steps answers in the nodes as it does in the trainer."""

import kv_cases
import pytest
import torch
from kv_cases import STEPS, flat, worst
from tensors import relative

RATES = ["optimiser.adapter_rate=1e-3", "optimiser.kv_rate=0.02", "optimiser.warmup=0"]  # two steps must show


@pytest.fixture(scope="module")
def trained(pack, tmp_path_factory):
    """The step after its training, and the encoder file where the nodes look for it."""
    names = ("trainer.config", "trainer.lookahead.config", "cli.assemble", "trainer.train")
    configs, config, assembling, train = map(pack.module, names)
    out = tmp_path_factory.mktemp("run")
    overrides = [
        f"out={out}",
        "name=round_trip",
        "steps=2",
        "batch=2",
        "data.people=2",
        "validate_every=0",
        "precision=fp32",
    ]
    c = config.load(configs.CONFIGS / "mini.yaml", [*overrides, *RATES])
    with torch.inference_mode(False), torch.enable_grad():
        recipe, source = assembling.assemble(c)
        written = train.train(c, recipe, source)
    there = pack.base / kv_cases.MODELS / written.name
    there.parent.mkdir(parents=True, exist_ok=True)
    there.write_bytes(written.read_bytes())
    yield recipe.losses, there.name
    there.unlink()


@pytest.fixture(scope="module")
def sides(pack, trained, worlds, tools, tmp_path_factory):
    """The nodes in the host, and the trainer's own answers to the same questions."""
    step, name = trained
    with torch.inference_mode():
        world = kv_cases.load_world("mini", worlds, tools, tmp_path_factory.mktemp("mini"))
        case = kv_cases.Case(world, None, {}, None, None, kv_cases.SIZES["mini"], tools.picture(1))
        loaded = pack.nodes["LookaheadLoadEncoder"].execute(name).result[0]
        return kv_cases.Host(case, tools, lambda _: loaded), Trainer(pack, step, case)


class Trainer:
    """The answers of the trainer's step to a case's questions."""

    def __init__(self, pack, step, case):
        from comfy.clip_model import clip_preprocess

        self.condition, self.step, self.case = pack.module("sdxl.shared_unet").Condition, step, case
        clip = case.world.clip_vision
        pixels = clip_preprocess(case.image, size=clip.image_size, mean=clip.image_mean, std=clip.image_std)
        seen = clip.model(pixel_values=pixels, intermediate_output=-2)[1].float()
        self.tokens = [step.encoder.image_proj(features) for features in (step.null_features, seen)]

    def export(self, n: int, conditional: bool) -> dict:
        latents = self.case.vae.latents * kv_cases.LATENT_SCALE
        text = self.case.kv_prompt if conditional else self.case.zeros
        x, _, *rest = self.case.asked(latents, self.case.reference_noise, n, text)
        return self.step.roles.export(x, torch.tensor([STEPS[n]]), self.condition(*rest))

    def predictions(self, n: int) -> dict[str, torch.Tensor]:
        def predict(conditional: bool, kv: dict | None) -> torch.Tensor:
            text = self.case.positive if conditional else self.case.negative
            x, _, *rest = self.case.asked_of_picture(n, text)
            t, prompt = torch.tensor([STEPS[n]]), self.step.encoder.image_prompt(self.tokens[conditional])
            return self.step.roles.predict(x, t, self.condition(*rest), prompt, kv)

        kv, null_kv = self.export(n, True), self.export(n, False)
        return {
            "e_nu": predict(False, None),
            "e_nt": predict(True, None),
            "e_fu": predict(False, null_kv),
            "e_ft": predict(True, kv),
        }


def test_the_nodes_export_the_reference_kv_of_the_trainer(sides):
    host, trainer = sides
    for conditional in (True, False):
        for n, found in enumerate(host.exported(conditional)):
            expected = trainer.export(n, conditional)
            print(f"relative rms difference {worst(flat(found), flat(expected)):.1e}")
            assert worst(flat(found), flat(expected)) < kv_cases.BOUND


def test_the_nodes_predict_the_noise_of_the_trainer(sides):
    host, trainer = sides
    for n, found in enumerate(host.predictions()):
        expected = trainer.predictions(n)
        print({name: f"{relative(found[name], expected[name]):.1e}" for name in expected})
        assert worst(found, expected) < kv_cases.BOUND


def test_training_has_changed_what_both_answer(sides, trained):
    """Else the tests above would compare encoders that do nothing."""
    _, trainer = sides
    step, _ = trained
    changes = [change.lora_B.weight for change in step.encoder.kv.values()]
    assert all(weight.abs().sum() > 0 for weight in changes)
    before = [weight.clone() for weight in changes]
    after = trainer.export(0, True)
    for weight in changes:
        weight.data.zero_()
    base = trainer.export(0, True)
    for weight, old in zip(changes, before, strict=True):
        weight.data.copy_(old)
    assert min(relative(a, b) for a, b in zip(flat(after).values(), flat(base).values(), strict=True)) > 0.01


def test_sampling_for_validation_draws_what_the_pipeline_draws(pack, trained, sides):
    """The same latents after three steps of DDIM under the guidance with three scales."""
    pipelines, validate = pack.module("sdxl.pipeline"), pack.module("trainer.lookahead.validate")
    batches = pack.module("trainer.lookahead.step")
    step, name = trained
    case, condition = sides[1].case, sides[1].condition
    with torch.inference_mode(False):
        mini = pack.module("mini.files.models").load()
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder"))
    pipe = pipelines.LookaheadPipeline(unet=mini.unet, scheduler=kv_cases.scheduler(), **parts)
    pipe.load_encoder(pack.base / kv_cases.MODELS / name)
    latents, noise = case.vae.latents * kv_cases.LATENT_SCALE, case.reference_noise
    side = 8 * latents.shape[-1]
    sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]])
    texts = [(text[0][0], text[0][1]["pooled_output"]) for text in (case.positive, case.kv_prompt)]
    prompt, own = (condition(*text, sizes) for text in texts)
    seen = torch.randn(step.null_features.shape, generator=torch.Generator().manual_seed(3))
    batch = batches.Batch(["one"], latents, latents, prompt, own, seen)
    drawn = validate.sample(step, step.encoder, batch, noise, 3, 5.0)

    tokens = [step.encoder.image_proj(features) for features in (seen, step.null_features)]
    prompts = [pipe.encoder.all_keys_values(each) for each in tokens]
    reference = pipelines.EncodedReference(*prompts, latents, pipelines.Text(*texts[1]))
    text = pipelines.Text(*texts[0])
    pipe.scheduler.set_timesteps(3)
    x = noise
    for t in pipe.scheduler.timesteps:
        kv = [pipe.reference_kv(reference, noise, t, conditional) for conditional in (True, False)]
        e = pipe.predict_noise(x, t, text, text.zeros, reference, *kv)
        x = pipe.scheduler.step(e, t, x).prev_sample
    assert relative(drawn, x) < kv_cases.GUIDED_BOUND
