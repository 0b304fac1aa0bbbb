"""The mini world as training data: the shipped models read back, and pictures that are functions of their number."""

import json

import pytest
import torch
from diffusers import DDIMScheduler
from lcm_lookahead.cli import main
from lcm_lookahead.cli.assemble import assemble
from lcm_lookahead.mini import drawn_people
from lcm_lookahead.mini.files import checkpoint, models
from lcm_lookahead.mini.plan import WEIGHTS
from lcm_lookahead.mini.stages import stage
from lcm_lookahead.sdxl.pipeline import LookaheadPipeline
from lcm_lookahead.trainer.config import CONFIGS
from lcm_lookahead.trainer.lookahead import config, validate


@pytest.fixture(scope="module")
def mini():
    return models.load()


def test_the_shipped_checkpoint_reads_back_to_itself(mini):
    stored = stage.read_tensors(WEIGHTS / "mini_sdxl.safetensors")
    parts = mini.unet, mini.text.l, mini.text.g, mini.vae
    again = checkpoint.sdxl_checkpoint(*(m.state_dict() for m in parts))
    assert again.keys() == stored.keys()
    assert all(
        torch.equal(again[k], v.float()) for k, v in stored.items() if "logit_scale" not in k and "vae_s" not in k
    )


def test_a_reference_is_a_photo_of_the_same_person_and_never_the_target():
    for number, target in enumerate(range(3 * drawn_people.PER_PERSON)):
        reference = drawn_people.reference_of(target, number)
        assert reference != target and reference // drawn_people.PER_PERSON == target // drawn_people.PER_PERSON
        assert reference % drawn_people.PER_PERSON < 2
    assert {drawn_people.reference_of(5, number) for number in range(20)} == {0, 1}


@pytest.fixture(scope="module")
def assembled():
    overrides = ["data.people=3", "batch=2", "precision=fp32"]
    return assemble(config.load(CONFIGS / "mini.yaml", overrides))


def test_a_sample_does_not_depend_on_its_batch(assembled):
    _, source = assembled
    cpu = torch.device("cpu")
    both, one = source.batch([4, 11], [0, 1], cpu), source.batch([11], [1], cpu)
    for name in ("target", "reference", "features"):
        assert torch.allclose(getattr(both, name)[1:], getattr(one, name), atol=1e-4), name
    assert torch.allclose(both.text.context[1:], one.text.context, atol=1e-5)
    assert both.names == ["picture 4 of person 0", "picture 2 of person 1"]


def test_the_identity_loss_of_a_preview_is_low_for_the_person_and_high_for_another(assembled):
    recipe, source = assembled
    batch = source.batch([0, drawn_people.PER_PERSON], [0, 1], torch.device("cpu"))
    pictures = recipe.losses.decode_preview(batch.reference)
    values, valid = batch.loss(pictures)
    swapped, _ = batch.loss(pictures.flip(0))
    assert valid.all() and (values < swapped - 0.2).all()


def test_the_command_trains_and_writes_an_encoder_file(tmp_path, capsys):
    arguments = [f"out={tmp_path}", "data.people=3", "batch=2", "steps=2", "validate_every=0", "precision=fp32"]
    main.main(["train", str(CONFIGS / "mini.yaml"), *arguments])
    assert (tmp_path / "mini_encoder.safetensors").exists() and "Written" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["norm_diffusion"] > 0 and "counted" in lines[0]


def test_a_mistake_on_the_command_line_is_a_sentence():
    with pytest.raises(SystemExit, match="did you mean steps"):
        main.main(["train", str(CONFIGS / "mini.yaml"), "step=9"])
    with pytest.raises(SystemExit, match="get SDXL as a diffusers folder"):
        main.main(["train", str(CONFIGS / "sdxl_paper.yaml")])


def test_a_validation_draws_what_the_pipeline_draws_for_users(tmp_path):
    """Scales, conditions, schedule and reference KV of `validate.sample` and of `LookaheadPipeline` are the same."""
    trained = WEIGHTS.parent / "trained" / "mini_encoder.safetensors"
    changes = [
        f"model.start={trained}",
        "precision=fp32",
        "validation.people=1",
        "validation.prompts=[a comic of a face]",
    ]
    c = config.load(CONFIGS / "mini.yaml", changes)
    recipe, source = assemble(c)
    step = recipe.losses
    probes = source.probes(c, torch.device("cpu"))
    noise = torch.randn(1, *source.latent_shape, generator=torch.Generator().manual_seed(3))
    drawn = validate.sample(step, step.encoder, probes.batch, noise, 4, 3.0)

    folder = drawn_people.write_folder(tmp_path / "sdxl")
    pipe = LookaheadPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    pipe.load_encoder(trained, image_encoder=folder / "image_encoder")
    pipe.set_progress_bar_config(disable=True)
    picture = probes.shown.movedim(1, -1)
    settings = {"height": 128, "width": 128, "num_inference_steps": 4, "output_type": "latent"}
    prompt = c.validation.prompts[0]
    theirs = pipe(prompt, reference=picture, latents=noise, scales=(1.8, 1.2, 1.2), **settings).images
    assert (drawn - theirs).norm() < 1e-3 * theirs.norm()
    other = pipe(prompt, reference=picture, latents=noise, scales=(1.2, 1.8, 1.2), **settings).images
    assert (drawn - other).norm() > 1e-2 * theirs.norm()
