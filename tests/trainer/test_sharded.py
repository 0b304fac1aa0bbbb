"""Training on shards: opened by indexes, pairs of one person, batches that depend on nothing but their numbers."""

import base64
import os
import re
import shutil

import numpy as np
import pytest
import torch
from lcm_lookahead.cli import assemble as assembling
from lcm_lookahead.cli import main
from lcm_lookahead.cli.bases import known_base, resolve, shapes
from lcm_lookahead.lookahead.files.tensors import read_tensors
from lcm_lookahead.trainer.config import CONFIGS
from lcm_lookahead.trainer.data.pairs import DataError
from lcm_lookahead.trainer.data.sharded import ShardPictures
from lcm_lookahead.trainer.data.shards import Sample, Shards, shard_name, write_shard
from lcm_lookahead.trainer.data.source import PictureSource
from lcm_lookahead.trainer.data.store import Store
from lcm_lookahead.trainer.lookahead.config import Config
from lcm_lookahead.trainer.seeds import order
from lcm_lookahead.trainer.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Twelve drawn people in two shards, three to four pictures each, two of them plain."""
    out = tmp_path_factory.mktemp("generated") / "drawn"
    more = ["shards=2", "people_per_shard=6", "prompts.per_person=4"]
    main.main(["generate", str(CONFIGS / "generate/drawn.yaml"), f"out={out}", *more])
    return out


def settings(data, out, *more):
    values = [f"data.source={data}", "data.size=128", f"out={out}", "batch=2", "steps=2", "validate_every=0"]
    return Config.load(CONFIGS / "mini.yaml", [*values, "precision=fp32", *more])


@pytest.fixture(scope="module")
def models():
    config = settings("nowhere", "nowhere")
    base = known_base(config.model.base)
    files = resolve(config.model, base)
    return assembling.read_frozen(config, files)[0], *assembling.read_faces(config, files, base)[:2]


def opened(config, models):
    return PictureSource(config, ShardPictures(config, models[1] is not None), *models)


@pytest.fixture(scope="module")
def source(drawn, models):
    return opened(settings(drawn, "nowhere", "data.keep=false"), models)


def test_every_target_has_another_plain_picture_of_its_person_as_its_reference(source, drawn):
    shards, chosen = Shards(Store(drawn)), set()
    assert len(source.pictures.held_out) == 1
    for number in range(200):
        target = int(source.pictures.targets[number % len(source)])
        reference = source.loader.reference_of(target, number)
        assert shards.sample_of[target] == shards.sample_of[reference] and target != reference
        assert shards.reference[reference] and shards.sample_of[target] not in source.pictures.held_out
        assert source.loader.reference_of(target, number) == reference
        chosen.add((target, reference))
    assert len({t for t, _ in chosen}) == len(source) < len(chosen)  # some have two, and both are drawn


def test_it_is_opened_without_looking_at_a_picture(drawn, models, monkeypatch):
    def look(self, number):
        raise AssertionError(f"picture {number} is opened")

    monkeypatch.setattr(Shards, "picture", look)
    looked = opened(settings(drawn, "nowhere"), models)
    assert len(looked) and looked.digest()


def test_a_sample_does_not_depend_on_its_batch(source):
    both, one = source.batch([0, 5], [3, 4], CPU), source.batch([5], [4], CPU)
    for name in ("target", "reference", "features"):
        assert torch.equal(getattr(both, name)[1:], getattr(one, name)), name
    assert torch.equal(both.text.context[1:], one.text.context) and both.names[1:] == one.names
    assert torch.equal(both.loss.references.embeddings[1:], one.loss.references.embeddings)
    about = source.pictures.about(int(source.pictures.targets[5]))
    context, _ = source.models.text(about["caption"])
    assert torch.equal(one.text.context, context) and "face" in about["caption"]
    values, counts = one.loss(source.models.vae.decode(one.reference).sample)
    assert counts.all() and values < 0.3  # the reference itself is the person


def test_every_picture_is_a_target_once_an_epoch_on_any_number_of_processes(source):
    numbers = range(len(source))
    alone = order(len(source), 0, numbers)
    assert sorted(alone) == list(numbers)
    shared = [order(len(source), 0, numbers[process::2]) for process in range(2)]
    assert [shared[n % 2][n // 2] for n in numbers] == alone


def test_landmarks_that_are_known_exactly_come_first_and_move_with_the_crop(source, drawn, models):
    place = int(source.pictures.targets[0])
    about = source.pictures.about(place)
    picture, points = source.pictures.crop(place, True)
    assert picture.shape == (1, 3, 128, 128)
    assert torch.allclose(points[0], torch.tensor(about["exact"]["landmarks"]), atol=1e-3)
    close = opened(settings(drawn, "nowhere", "data.reference_margin=0.1"), models)
    picture, points = close.pictures.crop(place, True)
    found = source.detector(picture)[0][0]
    assert (found.points - points[0]).norm(dim=1).mean() < 5


def test_a_run_on_shards_that_was_stopped_ends_with_the_same_bits(drawn, tmp_path):
    """In one go, and from its first step on; with validations on people who are held out."""
    more = ["lookahead.arm=none", "validate_every=2", "validation.steps=1", "validation.people=1", "save_every=1"]

    def run(name):
        recipe, source = assembling.assemble(settings(drawn, tmp_path / name, *more))
        assert isinstance(source.pictures, ShardPictures)
        return read_tensors(train(recipe.config, recipe, source))[0]

    whole = run("whole")
    assert list((tmp_path / "whole/validation").glob("*.png"))
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoints/step-00000002")
    (tmp_path / "stopped/mini_encoder.safetensors").unlink()
    again = run("stopped")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_doctor_and_the_estimate_know_shards(drawn, tmp_path, capsys):
    main.main(["doctor", str(drawn), "size=128"])
    said = capsys.readouterr().out
    shards = Shards(Store(drawn))
    for name, number in (("shards", 2), ("people", len(shards.keys)), ("pictures", len(shards)), ("without a face", 0)):
        assert re.search(rf"^{name} +{number}\b", said, re.MULTILINE), said
    assert "learnt from many people, and here are" in said and "drawn faces of the mini world" in said
    assert shapes(settings(drawn, tmp_path)).images == len(shards)
    os.truncate(shutil.copytree(drawn, tmp_path / "cut") / shard_name(1), 700)
    with pytest.raises(SystemExit, match="doctor: .*shard-000001.tar is cut short"):
        main.main(["doctor", str(tmp_path / "cut")])


def picture(file, reference, **more):
    return {"file": file, "caption": "a photo", "reference": reference, "width": 64, "height": 64, **more}


def test_shards_that_cannot_be_trained_on_are_said(tmp_path, models):
    alone = {"pictures": [picture("00.png", True), picture("01.png", False)]}
    write_shard(Store(tmp_path / "alone"), shard_name(0), [Sample("0", {"00.png": b"", "01.png": b""}, alone)], {}, "c")
    with pytest.raises(DataError, match="say nothing of where faces are"):
        opened(settings(tmp_path / "alone", "nowhere"), models)
    without = opened(settings(tmp_path / "alone", "nowhere", "lookahead.arm=none"), (models[0], None, None))
    assert without.pictures.targets == [1]
    with pytest.raises(DataError, match="00000000.01.png in .* is no picture"):
        without.batch([0], [0], CPU)
    nobody = {"pictures": [picture("00.png", False), picture("01.png", False)]}
    write_shard(
        Store(tmp_path / "nobody"), shard_name(0), [Sample("0", {"00.png": b"", "01.png": b""}, nobody)], {}, "c"
    )
    with pytest.raises(DataError, match="not one pair to train on"):
        opened(settings(tmp_path / "nobody", "nowhere"), models)


def test_the_doctor_names_people_of_different_shards_who_are_one_to_the_recogniser(tmp_path, capsys):
    """Person 1 and person 4, whose pictures differ a little; nobody else is near."""
    random = np.random.default_rng(0)
    faces = random.normal(size=(5, 64))
    faces[4] = faces[1] + 0.1 * random.normal(size=64)
    for shard, people in enumerate(((0, 1, 2), (3, 4))):
        samples = []
        for n in people:
            seen = (faces[n] + 0.3 * random.normal(size=64) for _ in range(2))
            codes = [base64.b64encode(e.astype("<f2").tobytes()).decode() for e in seen]
            about = {"pictures": [picture(f"0{i}.png", True, embedding=code) for i, code in enumerate(codes)]}
            samples.append(Sample(f"{n:08}", {"00.png": b"", "01.png": b""}, about))
        write_shard(Store(tmp_path), shard_name(shard), samples, {}, "c")
    with pytest.raises(SystemExit):  # nothing says where faces are
        main.main(["doctor", str(tmp_path)])
    said = capsys.readouterr().out
    assert re.search(r"^pairs of twins +1 .* among 5 people$", said, re.MULTILINE), said
    assert "Pairs of people who are one to the recogniser: 1 (00000001 and 00000004). Give" in said


def test_the_order_in_which_people_are_held_out_is_their_own(drawn, models, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    for path in drawn.glob("shard-000000.*"):
        (one / path.name).write_bytes(path.read_bytes())
    ranks = [opened(settings(folder, "nowhere"), models) for folder in (one, drawn)]
    keys = [
        [int(s.pictures.shards.keys[n]) for n in sorted(range(len(s.pictures.shards.keys)), key=s.pictures._rank)]
        for s in ranks
    ]
    assert keys[0] == [key for key in keys[1] if key in set(keys[0])]
    assert np.all(ranks[1].pictures.shards.keys[:6] == ranks[0].pictures.shards.keys)
