"""`lookahead guide train` on the mini world: what is trained, runs that go on, the file, and bad input."""

import json
import shutil

import pytest
import torch
import yaml
from lcm_lookahead.cli import main
from lcm_lookahead.cli.assemble_guide import assemble_guide
from lcm_lookahead.lookahead.files import noise_guide_file
from lcm_lookahead.lookahead.method.schedule import TIMESTEPS
from lcm_lookahead.trainer.config import CONFIGS, ConfigError
from lcm_lookahead.trainer.noise_guide.config import NoiseGuideConfig
from lcm_lookahead.trainer.train import train
from safetensors.torch import load_file

CPU = torch.device("cpu")


def values(out, **changes):
    return {
        "name": "made",
        "out": str(out),
        "model": {
            "base": "mini",
            "shortcut": "mini_lcm_lora.safetensors",
            "vae": "mini",
            "recogniser": "mini_face_recogniser.safetensors",
            "width": 8,
            "hidden": 16,
        },
        "data": {"source": "mini", "people": 4},
        "steps": 4,
        "batch": 2,
        "precision": "fp32",
        "checkpointing": "none",
        "optimiser": {"rate": 0.01},
        "opening": {"steps": 1, "guidance": 2.0},
        "save_every": 2,
        "validate_every": 4,
        "validation": {"people": 1, "prompts": ["a photo of a face"], "steps": 5, "guidance": 1.0},
        "log_every": 1,
        "workers": 0,
        **changes,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps by the command, and its folder."""
    out = tmp_path_factory.mktemp("trained")
    config = out / "config.yaml"
    config.write_text(yaml.safe_dump(values(out / "run")))
    main.main(["guide", "train", str(config)])
    return out


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    config = NoiseGuideConfig.from_values(values(tmp_path_factory.mktemp("run")))
    recipe, source = assemble_guide(config)
    batch = source.batch([0, 9], [0, 1], CPU)
    return recipe, batch, recipe.draw([0, 1], batch)


def test_training_writes_a_guide_that_reads_back_with_what_it_comes_from(trained):
    file = noise_guide_file.read(trained / "run" / "made.safetensors")
    about = file.metadata
    assert (file.start, file.end, about["steps"]) == (0.4, 0.45, "4") and file.network.conv_out.weight.abs().max() > 0
    assert about["base_model"] == "mini" and len(about["base_model_hash"]) == 64 and about["size"] == "128"
    assert about["recogniser"] == "mini_face_recogniser.safetensors" and "/" not in json.loads(about["config"])["out"]
    lines = [json.loads(line) for line in (trained / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "guide" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert {"distance", "counted", "moved"} <= steps[0].keys()
    assert steps[0]["moved"] == 0 and steps[-1]["moved"] > 0


def test_a_validation_tells_what_the_guide_adds_and_first_what_the_warm_start_adds(trained):
    lines = [json.loads(line) for line in (trained / "run" / "log.jsonl").read_text().splitlines()]
    before, after = (line["validation"] for line in lines if "validation" in line)
    assert before["gain"] != 0 and before["unguided"] == after["unguided"]
    assert {"faces", "style"} <= after.keys() and after["gain"] == pytest.approx(after["identity"] - after["unguided"])
    assert (trained / "run" / "validation" / "step-00000004.png").is_file()


def test_a_run_that_was_stopped_ends_with_the_same_bits(trained, tmp_path):
    shutil.copytree(trained / "run" / "checkpoints" / "step-00000002", tmp_path / "checkpoints" / "step-00000002")
    config = NoiseGuideConfig.load(trained / "config.yaml", [f"out={tmp_path}", "validate_every=0"])
    again = train(config, *assemble_guide(config))
    expected, found = load_file(trained / "run" / "made.safetensors"), load_file(again)
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)


def test_the_guide_acts_where_the_sampler_s_early_steps_are(assembled):
    recipe, batch, _ = assembled
    draws = recipe.draw(range(64), batch)
    early, late = (round((1 - place) * (TIMESTEPS - 1)) for place in (0.4, 0.45))
    assert late <= draws.t.min() and draws.t.max() <= early and draws.t.unique().numel() > 20
    assert (draws.strength == 1).sum() in range(16, 49) and draws.strength.min() >= 0.1
    again = recipe.draw([7], batch)
    assert torch.equal(again.noise[0], draws.noise[7]) and again.t[0] == draws.t[7]


def test_the_latent_before_the_guide_is_what_the_base_draws_and_says_nothing_of_the_person(assembled):
    recipe, batch, draws = assembled
    step, config = recipe.losses, recipe.config
    now = torch.full((2,), TIMESTEPS - 1)
    with torch.no_grad():
        found = step.opening(batch.text, draws.noise, draws.t)
        plain, prompted = (
            step.roles.predict(draws.noise, now, text)
            for text in (batch.text.where(torch.zeros(2, dtype=torch.bool)), batch.text)
        )
    e = plain + config.opening.guidance * (prompted - plain)
    a, b = (step.alpha_bar[t].view(-1, 1, 1, 1) for t in (now, draws.t))
    expected = b.sqrt() * (draws.noise - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_guide_moves_the_sampled_latent_once_where_the_face_is(assembled):
    recipe, batch, draws = assembled
    step, likeness = recipe.losses, recipe.losses.likeness(batch)
    plain = step.draw(batch.text, draws.noise)
    moved = step.draw(batch.text, draws.noise, step.guide, likeness)
    assert (moved - plain).flatten(1).abs().amax(1).min() > 0.1
    rows = torch.tensor([1, 0])  # the second person's picture before the first's
    swapped = step.draw(batch.text.rows(slice(0, 2)), draws.noise, step.guide, likeness, rows)
    assert not torch.equal(swapped, moved)


def test_what_the_guide_is_to_reach_is_the_reference_in_the_place_of_the_preview_s_face(assembled):
    recipe, batch, draws = assembled
    step, likeness = recipe.losses, recipe.losses.likeness(batch)
    with torch.no_grad():
        pictures = step.tiny(batch.reference)
        shown, head = likeness.shown(pictures)
        again = step.tiny.encode(pictures)
    # The reference's own face has its place already, as far as it is found where training knows it.
    face, own = head.expand_as(shown) > 0.99, pictures.clamp(-1, 1)
    apart = [(shown - person)[face].abs().mean() for person in (own, own.roll(1, 0))]
    assert face.any() and apart[0] < 0.5 * apart[1], apart
    assert (again - batch.reference).square().mean() < 0.1 * batch.reference.square().mean()


def test_the_gradient_reaches_the_guide_and_no_other_weight(assembled):
    recipe, batch, draws = assembled
    step = recipe.losses
    before = {name: value.clone() for name, value in step.unet.state_dict().items()}
    outcome = step("guide", batch, draws)
    outcome.loss.backward()
    of_the_guide = {id(p) for p in step.guide.parameters()}
    assert step.guide.conv_out.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in step.parameters() if id(p) not in of_the_guide)
    assert all(torch.equal(value, before[name]) for name, value in step.unet.state_dict().items())
    step.guide.zero_grad(set_to_none=True)


def test_the_loss_on_the_same_samples_falls(assembled, monkeypatch):
    """Not what a guide is worth: that its gradient leads down."""
    recipe, batch, draws = assembled
    step = recipe.losses
    opened = step.opening(batch.text, draws.noise, draws.t)
    monkeypatch.setattr(step, "opening", lambda *_: opened)  # the same each time, and half of the work
    start = {k: v.clone() for k, v in step.guide.state_dict().items()}
    optimiser = torch.optim.Adam(step.guide.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = step("guide", batch, draws).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    step.guide.load_state_dict(start)
    assert losses[-1] < losses[0] - 0.02, losses


@pytest.mark.parametrize("path", sorted((CONFIGS / "guide").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid_and_every_field_described(path):
    config = NoiseGuideConfig.load(path)
    reading = config.reading()
    assert reading.data == config.data and reading.batch == config.batch and not reading.model.kv
    sections = [NoiseGuideConfig, *(f.annotation for f in NoiseGuideConfig.model_fields.values())]
    fields = [f for s in sections if hasattr(s, "model_fields") for f in s.model_fields.values()]
    assert all(f.description or hasattr(f.annotation, "model_fields") for f in fields)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"opening": {"start": 0.5}}, "the earlier place comes first"),
        ({"opening": {"start": 0.0}}, "opening.start is 0.0"),
        ({"optimiser": {"lr": 1.0}}, "did you mean optimiser.rate"),
        ({"model": {"base": "mini"}}, "model.shortcut is missing"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_a_sentence(tmp_path, change, match):
    with pytest.raises(ConfigError, match=match):
        NoiseGuideConfig.from_values(values(tmp_path, **change))


def test_a_dry_run_counts_memory_and_work_and_trains_nothing(trained, capsys, tmp_path):
    main.main(["guide", "train", str(trained / "config.yaml"), f"out={tmp_path / 'none'}", "--dry-run"])
    shown = capsys.readouterr().out
    assert "activations, samples at a time: 2" in shown and "TFLOP" in shown and not (tmp_path / "none").exists()


def test_bad_input_is_said_in_a_sentence(trained, tmp_path, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit) as error:
            main.main(["guide", *(str(a) for a in arguments)])
        return str(error.value)

    config = trained / "config.yaml"
    text = refused("train", config, f"out={tmp_path}", f"model.shortcut={tmp_path / 'none.safetensors'}")
    assert text.startswith("lookahead guide: There is no") and text.endswith(".") and "\n" not in text
    (tmp_path / "people").mkdir()
    assert refused("doctor", config, f"data.source={tmp_path / 'people'}") == "1"
    assert "holds no pictures" in capsys.readouterr().out
