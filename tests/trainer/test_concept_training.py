"""`lookahead concept` on the mini world's base: training, resuming, predicting, tuning, and bad input."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from concept_oracle import predict as oracle
from lcm_lookahead.cli import assemble_concept, main
from lcm_lookahead.lookahead.files.concept_file import read_concept, read_concept_encoder
from lcm_lookahead.lookahead.method.concept import ConceptEncoder
from lcm_lookahead.lookahead.method.concept_input import ConceptError
from lcm_lookahead.lookahead.method.concept_tuning import Tuning
from lcm_lookahead.mini import drawn_things
from lcm_lookahead.mini.world import things
from lcm_lookahead.sdxl import concept as in_sdxl
from lcm_lookahead.sdxl.concept_maker import predict_concept, tuner
from lcm_lookahead.trainer.concept.config import ConceptConfig
from lcm_lookahead.trainer.config import CONFIGS, ConfigError
from lcm_lookahead.trainer.train import train
from PIL import Image
from safetensors.torch import load_file


def save(picture, path):
    Image.fromarray((picture.movedim(0, -1) * 255).round().byte().numpy()).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve photos of drawn things, no labels."""
    folder = tmp_path_factory.mktemp("things") / "pictures"
    folder.mkdir()
    for n, picture in enumerate(things.render(drawn_things.concept_things(12, drawn_things.SEED), 128)):
        save(picture, folder / f"{n:02}.png")
    return folder


def values(pictures, out, **changes):
    return {
        "name": "made",
        "out": str(out),
        "model": {"base": "mini", "rank": 2, "basis": 2, "hidden": 16},
        "data": {"source": str(pictures), "size": 128},
        "steps": 4,
        "batch": 2,
        "precision": "fp32",
        "checkpointing": "none",
        "optimiser": {"basis_rate": 0.01, "rate": 0.01},
        "token": {"warmup": 0.25, "ramp": 0.25},
        "save_every": 2,
        "validate_every": 2,
        "log_every": 1,
        **changes,
    }


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A run of four steps by the command, and its folder."""
    out = tmp_path_factory.mktemp("trained")
    config = out / "config.yaml"
    config.write_text(yaml.safe_dump(values(pictures, out / "run")))
    main.main(["concept", "train", str(config)])
    return out


@pytest.fixture(scope="module")
def encoder(trained):
    return trained / "run" / "made.safetensors"


@pytest.fixture(scope="module")
def frozen():
    return assemble_concept.frozen_models(ConceptConfig.from_values(values("?", "?")).model, "fp32")


@pytest.fixture(scope="module")
def concept(encoder, frozen, pictures):
    network, words, about = read_concept_encoder(encoder)
    picture = in_picture(pictures)
    torch.manual_seed(4)
    for b in network.basis_b.values():  # so few steps leave the offsets at almost nothing
        b.normal_(std=0.3)
    network.coefficients_b.bias.fill_(0.5)
    return predict_concept(network, words, frozen, picture, 128, 0.4, {"templates": about["templates"]})


def in_picture(pictures):
    from lcm_lookahead.sdxl.images import read

    return read(pictures / "00.png")


def test_training_writes_an_encoder_that_reads_back_with_what_it_comes_from(trained, encoder):
    network, words, about = read_concept_encoder(encoder)
    assert set(words.values()) == {*things.CLASSES, "face"}
    assert len(network.names) == 17 * 6 and network.sizes.rank == 2 and about["steps"] == "4"
    assert about["size"] == "128" and about["regulariser"] == "contrast" and "/" not in about["data"]
    lines = [json.loads(line) for line in (trained / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "concept" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert {"diffusion", "norms", "offsets", "contrast"} <= steps[0].keys()
    validations = [line["validation"] for line in lines if "validation" in line]
    assert len(validations) == 3 and {"fit", "nearest", "changed"} <= validations[-1].keys()


def test_a_run_that_was_stopped_ends_with_the_same_bits(trained, encoder, tmp_path):
    shutil.copytree(trained / "run" / "checkpoints" / "step-00000002", tmp_path / "checkpoints" / "step-00000002")
    config = ConceptConfig.load(trained / "config.yaml", [f"out={tmp_path}"])
    again = train(config, *assemble_concept.assemble_concept(config))
    expected, found = load_file(encoder), load_file(again)
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)


@pytest.fixture(scope="module")
def assembled(pictures, tmp_path_factory):
    """Recipe and source of a run with both paths in its pretraining."""
    config = ConceptConfig.from_values(values(pictures, tmp_path_factory.mktemp("run"), blend=0.4))
    return assemble_concept.assemble_concept(config)


def test_the_regularisers_are_those_that_the_configuration_names(assembled):
    recipe, source = assembled
    step, found = recipe.losses, {}
    predicted = step.encoder(source.batch([0, 1], [0, 1], torch.device("cpu")).features)
    for name in ("none", "l2", "contrast"):
        token = recipe.config.token.model_copy(update={"regulariser": name, "warmup": 0.5})
        step.config = recipe.config.model_copy(update={"token": token})
        found[name] = [step.regularisers(predicted, number) for number in (0, 3)]
    step.config = recipe.config
    assert "contrast" not in found["none"][1] and found["contrast"][0]["contrast"][0] == 0
    assert found["contrast"][1]["contrast"][0] > 0 and found["l2"][1]["contrast"][0] > 0
    assert not torch.equal(found["contrast"][1]["contrast"][1], found["l2"][1]["contrast"][1])


def test_words_come_first_and_learn_alone_which_real_word_the_base_would_take(assembled):
    """Of eight steps the first two, whose loss has a gradient to the words alone; from the third on the picture is
    predicted with word and offsets."""
    recipe, source = assembled
    step, batch = recipe.losses, source.batch([0, 1], [0, 1], torch.device("cpu"))
    token = recipe.config.token.model_copy(update={"words_first": 0.25, "norm_weight": 0.0})
    step.config = recipe.config.model_copy(update={"token": token, "steps": 8, "offset_weight": 0.0})
    draws = recipe.draw([0, 1], batch)
    found = {number: step("concept", batch, replace(draws, step=number)) for number in (0, 1, 2)}
    grads = {}
    for number in (0, 2):
        step.encoder.zero_grad()
        found[number].loss.backward()
        grads[number] = {n for n, p in step.encoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    step.config = recipe.config
    assert torch.equal(found[0].loss, found[1].loss) and "verdict" in found[1].terms and "verdict" not in found[2].terms
    assert any(name.startswith("head_") for name in grads[0])
    assert not any(name.startswith(("basis", "coefficients")) for name in grads[0])
    assert any(name.startswith("coefficients") for name in grads[2])
    errors = [step.under(torch.tensor([place, place]), batch, draws) for place in range(len(recipe.words))]
    best = torch.stack(errors).min(0).values
    assert (found[0].values >= best * step._weight(draws.t) - 1e-6).all()


def test_the_step_predicts_what_the_oracle_does(assembled):
    recipe, source = assembled
    step = recipe.losses
    for b in step.encoder.basis_b.values():
        b.data.normal_(std=0.3)
    step.encoder.coefficients_b.bias.data.fill_(0.5)
    batch = source.batch([0, 1], [0, 1], torch.device("cpu"))
    draws = recipe.draw([0, 1], batch)
    with torch.no_grad():
        predicted = step.encoder(batch.features)
        found = step.predict(predicted, batch, draws)
        soft, soft_pooled = in_sdxl.encode_soft(step.text, step.ids.rows(draws.template), *predicted[:2])
        places = in_sdxl.dictionary_of(step.text, recipe.words)
        hard_ids = [places.ids[(places.directions() @ in_sdxl_direction(predicted, n)).argmax()] for n in range(2)]
        hard, hard_pooled = in_sdxl.encode_hard(step.text, step.ids.rows(draws.template), torch.stack(hard_ids))
    x = step.alpha_bar[draws.t].sqrt().view(-1, 1, 1, 1) * batch.latents
    x = x + (1 - step.alpha_bar[draws.t]).sqrt().view(-1, 1, 1, 1) * draws.noise
    time_ids = torch.tensor([128.0, 128, 0, 0, 128, 128]).expand(1, 6)
    step.shared.eject()
    for n in range(2):
        offsets = {name: (a[n].detach(), b[n].detach()) for name, (a, b) in predicted.offsets.items()}
        pooled = 0.4 * soft_pooled[n : n + 1] + 0.6 * hard_pooled[n : n + 1]
        one = slice(n, n + 1)
        expected = oracle(step.unet, offsets, x[one], draws.t[one], soft[one], hard[one], pooled, time_ids, 0.4)
        error = (found[one] - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert float(error) < 1e-4


def in_sdxl_direction(predicted, n):
    from lcm_lookahead.lookahead.method.concept import word_direction

    return word_direction(predicted.word_l[n], predicted.word_g[n])


def test_an_encoder_of_words_alone_trains_and_its_concepts_have_no_offsets_to_tune(pictures, tmp_path, frozen):
    model = {"base": "mini", "offsets": False, "hidden": 16}
    config = ConceptConfig.from_values(values(pictures, tmp_path, model=model, steps=1, validate_every=0))
    network, words, about = read_concept_encoder(train(config, *assemble_concept.assemble_concept(config)))
    assert network.sizes.projections == {} and json.loads(about["config"])["model"]["offsets"] is False
    assert not any(name.startswith(("basis", "coefficients")) for name in network.state_dict())
    made = predict_concept(network, words, frozen, in_picture(pictures), 128, 0.4)
    with tuner(frozen) as maker:
        tuned, _ = maker.tune(made, in_picture(pictures), Tuning(1, 1, 3e-3, 0.05, 0.4))
    assert made.offsets == tuned.offsets == {} and not torch.equal(made.word_l, tuned.word_l)


def test_an_encoder_that_reads_the_unet_trains_and_predicts_and_stops_at_another_base(pictures, tmp_path, frozen):
    model = {"base": "mini", "rank": 2, "basis": 2, "hidden": 16, "features": "clip+unet"}
    config = ConceptConfig.from_values(values(pictures, tmp_path, model=model, steps=1, validate_every=0))
    recipe, source = assemble_concept.assemble_concept(config)
    recipe.measure(source, torch.device("cpu"))
    spread = recipe.trained.unet_spread
    assert spread.shape == (10, in_sdxl.unet_width(frozen.unet)) and not torch.equal(spread[0], spread[9])
    path = train(config, recipe, source)
    network, words, about = read_concept_encoder(path)
    made = predict_concept(network, words, frozen, in_picture(pictures), 128)
    assert about["features"] == "clip+unet" and len(made.offsets) == 17 * 6
    other = ConceptEncoder(replace(network.sizes, unet_width=7))
    with pytest.raises(ConceptError, match="reads 7"):
        predict_concept(other, words, frozen, in_picture(pictures), 128)


# --- tuning


def test_tuning_fits_the_picture_better_and_changes_neither_the_concept_nor_the_base(concept, frozen, pictures):
    before = {k: v.clone() for k, v in frozen.unet.state_dict().items()}
    words = concept.word_l.clone()
    with tuner(frozen) as maker:
        made, losses = maker.tune(concept, in_picture(pictures), Tuning(2, 2, 3e-3, 0.05, 0.4))
        predict = maker.predictor(("a photo of a S*",), 0.4, 128)
        assert loss_of(predict, made, frozen, pictures) < loss_of(predict, concept, frozen, pictures)
    assert len(losses) == 2 and made.about["steps"] == "2" and made.word_id == concept.word_id
    assert torch.equal(concept.word_l, words) and not torch.equal(made.word_l, words)
    assert all(torch.equal(v, before[k]) for k, v in frozen.unet.state_dict().items())


@torch.no_grad()
def loss_of(predict, concept, frozen, pictures):
    """The loss under the very noise that the tuning saw, whose gradient it followed."""
    from lcm_lookahead.lookahead.method import concept_tuning
    from lcm_lookahead.lookahead.method.schedule import alphas_cumprod
    from lcm_lookahead.sdxl.concept_maker import squared

    square = squared(in_picture(pictures), 128)
    views = frozen.latents(torch.cat([square, square.flip(-1)]))
    total = 0.0
    for number in range(4):
        t, x, noise = concept_tuning.noised_sample(views, alphas_cumprod().float(), Tuning(2, 2), number)
        total += float((predict(concept, x, t, number) - noise).square().mean())
    return total


def test_tuning_that_is_interrupted_leaves_everything_as_it_was(concept, frozen, pictures):
    processors = frozen.unet.attn_processors

    def stop(step, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), tuner(frozen) as maker:
        maker.tune(concept, in_picture(pictures), Tuning(3, 1), progress=stop)
    assert frozen.unet.attn_processors == processors


# --- the commands


@pytest.fixture
def loaded(frozen, monkeypatch):
    """The commands find the base's models loaded: to load them takes longer than what is asked of them."""
    monkeypatch.setattr(assemble_concept, "frozen_models", lambda model, precision: frozen)


def test_the_commands_lead_from_a_picture_to_a_tuned_concept_and_stock_files(
    encoder, pictures, tmp_path, capsys, loaded
):
    made, tuned = tmp_path / "mug.safetensors", tmp_path / "tuned.safetensors"
    picture = str(pictures / "00.png")
    models = ["--base", "mini", "--image-encoder", "mini"]
    main.main(["concept", "predict", str(encoder), picture, *models, "--out", str(made)])
    main.main(["concept", "tune", str(made), picture, *models, "--dry-run"])
    assert "activations of one sample" in capsys.readouterr().out
    short = ["--steps", "1", "--batch", "1", "--blend", "0.5", "--out", str(tuned), "--stock"]
    main.main(["concept", "tune", str(made), picture, *models, *short])
    before, after = read_concept(made), read_concept(tuned)
    assert after.blend == 0.5 and after.about["steps"] == "1" and after.word == before.word
    assert {p.name for p in tmp_path.glob("tuned_*")} == {"tuned_lora.safetensors", "tuned_embedding.safetensors"}
    capsys.readouterr()
    main.main(["concept", "words", str(tuned), "--base", "mini", "--count", "3"])
    shown = capsys.readouterr().out.splitlines()
    assert before.word in shown[0] and len(shown) == 4


def refused(*arguments):
    with pytest.raises(SystemExit) as error:
        main.main([str(a) for a in arguments])
    text = str(error.value)
    assert text.startswith("lookahead concept: ") and text.endswith(".") and "\n" not in text
    return text


def test_bad_input_is_said_in_a_sentence_and_nothing_is_written(encoder, pictures, tmp_path, loaded):
    out, dot, picture = tmp_path / "out.safetensors", tmp_path / "dot.png", pictures / "00.png"
    Image.new("RGB", (1, 1)).save(dot)
    assert "1 x 1 pixels" in refused("concept", "predict", encoder, dot, "--base", "mini", "--out", out)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(encoder.read_bytes()[:5000])
    assert "cut.safetensors" in refused("concept", "predict", cut, picture, "--base", "mini", "--out", out)
    assert "is a concept encoder" in refused("concept", "tune", encoder, picture, "--base", "mini", "--out", out)
    words = tmp_path / "words.txt"
    words.write_text("mug\nwheelbarrow\n")
    made = tmp_path / "made.safetensors"
    main.main(["concept", "predict", str(encoder), str(picture), "--base", "mini", "--out", str(made)])
    assert "'wheelbarrow' is 2 tokens" in refused("concept", "words", made, "--base", "mini", "--dictionary", words)
    assert "101" in refused("concept", "tune", made, picture, "--base", "mini", "--steps", "101", "--out", out)
    assert not out.exists()


def test_a_dictionary_as_windows_writes_it_has_its_first_noun(frozen, tmp_path):
    (tmp_path / "words.txt").write_bytes("mug\r\ncar\r\n".encode("utf-8-sig"))
    assert list(assemble_concept.concept_words(frozen.text, str(tmp_path / "words.txt")).values()) == ["mug", "car"]


@pytest.mark.parametrize(
    ("prompt", "match"),
    [("a mug", "has no S"), ("a S* beside a S*", "has 2 S"), ("a S* and ldnont", "keeps for itself")],
)
def test_a_prompt_without_exactly_one_placeholder_is_refused(frozen, prompt, match):
    with pytest.raises(ConceptError, match=match):
        in_sdxl.prompt_ids(frozen.text, [prompt])


def test_a_placeholder_beyond_what_clip_reads_is_refused(frozen):
    with pytest.raises(ConceptError, match="beyond the 77 tokens"):
        in_sdxl.prompt_ids(frozen.text, ["a very " * 60 + "S*"])


def test_a_soft_word_that_is_a_real_one_gives_the_real_prompt(frozen):
    ids = in_sdxl.prompt_ids(frozen.text, ["a comic of a S* on a beach"])
    token = in_sdxl.token_of(frozen.text, "face")
    words = [table[token][None] for table in in_sdxl.word_tables(frozen.text)]
    soft, hard = (
        in_sdxl.encode_soft(frozen.text, ids, *words),
        in_sdxl.encode_hard(frozen.text, ids, torch.tensor([token])),
    )
    plain = frozen.text("a comic of a face on a beach")
    for found in (soft, hard):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("path", sorted((CONFIGS / "concept").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid_and_every_field_described(path):
    assert ConceptConfig.load(path).steps > 0
    sections = [ConceptConfig, *(f.annotation for f in ConceptConfig.model_fields.values())]
    fields = [f for s in sections if hasattr(s, "model_fields") for f in s.model_fields.values()]
    assert all(f.description or hasattr(f.annotation, "model_fields") for f in fields)


def test_a_configuration_that_cannot_push_apart_is_refused(pictures, tmp_path):
    with pytest.raises(ConfigError, match="no other concepts to push apart"):
        ConceptConfig.from_values(values(pictures, tmp_path, batch=1))
    with pytest.raises(ConfigError, match=r"has no S\*"):
        ConceptConfig.from_values(values(pictures, tmp_path, data={"source": "x", "templates": ["a photo"]}))


def test_a_dry_run_counts_memory_and_trains_nothing(trained, capsys, tmp_path):
    main.main(["concept", "train", str(trained / "config.yaml"), f"out={tmp_path / 'none'}", "--dry-run"])
    shown = capsys.readouterr().out
    assert "activations, samples at a time: 2" in shown and "in all" in shown and not (tmp_path / "none").exists()


def test_the_doctor_names_what_a_run_would_stop_at(pictures, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(pictures, folder)
    main.main(["concept", "doctor", str(folder), "--size", "128"])
    assert "Nothing is wrong" in capsys.readouterr().out
    shutil.copy(folder / "00.png", folder / "twin.png")
    Image.new("RGB", (30, 90)).save(folder / "small.png")
    (folder / "cut.png").write_bytes((folder / "01.png").read_bytes()[:300])
    with pytest.raises(SystemExit):
        main.main(["concept", "doctor", str(folder), "--size", "256"])
    shown = capsys.readouterr().out
    assert "2 cannot be used" in shown and "30 x 90 pixels" in shown and "cut.png" in shown
    assert "1 are another picture" in shown and "twin.png" in shown and "13 are smaller" in shown


def test_files_of_cameras_and_phones_are_trained_on_or_said(pictures, frozen, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.jfif", "b.JPE", "c.tif"):
        Image.open(pictures / "00.png").save(folder / name, None if name == "c.tif" else "JPEG")
    for name in ("IMG_1.HEIC", "notes.txt"):
        (folder / name).touch()
    config = ConceptConfig.from_values(values(folder, tmp_path / "run", validate_every=0))
    source = assemble_concept.open_pictures(config, frozen)
    assert source.names == ["a.jfif", "b.JPE", "c.tif"]
    others = "1 pictures are of kinds that are not read (1 .heic; IMG_1.HEIC): save them as JPEG or PNG.\n"
    assert capsys.readouterr().err == others
    main.main(["concept", "doctor", str(folder), "--size", "128"])
    assert capsys.readouterr().out.startswith(f"{others}{folder}: 3 pictures")
