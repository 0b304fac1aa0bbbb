"""A generated data set: bytes are a function of configuration and number, checks leave out what they say, errors."""

import io
import json
import os
import runpy
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch
import typer
from diffusers import AutoencoderKL
from lcm_lookahead.cli import engine as command
from lcm_lookahead.cli import generate, main
from lcm_lookahead.mini import drawn_people
from lcm_lookahead.mini.generator import DrawnWorld
from lcm_lookahead.mini.plan import WEIGHTS
from lcm_lookahead.mini.world.references import reference_faces
from lcm_lookahead.sdxl.load import ModelError
from lcm_lookahead.trainer.config import CONFIGS, ConfigError
from lcm_lookahead.trainer.data.generate import checks, engine
from lcm_lookahead.trainer.data.generate.checks import Inspector, Measurements, rejection_of, select
from lcm_lookahead.trainer.data.generate.config import Checks, load
from lcm_lookahead.trainer.data.generate.engine import Engine, summary
from lcm_lookahead.trainer.data.generate.generators import FewStepSDXL, read_few_step
from lcm_lookahead.trainer.data.generate.people import Person, read_people
from lcm_lookahead.trainer.data.generate.prompts import PicturePlan, plan_pictures
from lcm_lookahead.trainer.data.generate.report import added, auc, mean_and_deviation, thresholds
from lcm_lookahead.trainer.data.shards import Shards, embedding_of, shard_name, side_name
from lcm_lookahead.trainer.data.store import Store
from lcm_lookahead.trainer.data.tars import ShardError
from PIL import Image

FOLDER = CONFIGS / "generate"
CPU = torch.device("cpu")
SMALL = ["shards=2", "people_per_shard=3", "prompts.per_person=3", "generator.batch=4"]
# In a few steps the mini base draws no face that a check would let through.
UNCHECKED = [f"checks.{name}=null" for name in ("detector", "recogniser", "clip", "sharpness")]


def settings(out, *more, name="drawn"):
    return load(FOLDER / f"{name}.yaml", [f"out={out}", *SMALL, *more])


def arguments(out, *more, name="drawn"):
    return [str(FOLDER / f"{name}.yaml"), f"out={out}", *SMALL, *more]


def run(values):
    """The command, in this process."""
    main.main(["generate", *values])


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """The networks that look at pictures are read once for all runs of this file: that takes longer than the runs."""
    read, opened = command.read_inspector, {}

    def read_inspector(config, where):
        if config.checks not in opened:
            opened[config.checks] = read(config, where)
        return opened[config.checks]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "read_inspector", read_inspector)
        yield


@pytest.fixture(scope="module")
def inspector(read_once):
    return command.read_inspector(settings("nowhere"), CPU)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, read_once):
    """A whole data set by the command, with its report."""
    out = tmp_path_factory.mktemp("generated") / "drawn"
    run(arguments(out))
    return out


def content(folder):
    """The files that belong to the data set: all but how long it took, and the page that says so."""
    paths = [p for p in folder.iterdir() if not p.name.endswith((".times.json", ".html"))]
    return {p.name: p.read_bytes() for p in paths}


def plans(config, people=1):
    who = read_people(config)
    return [plan for n in range(people) for plan in plan_pictures(config.prompts, who(n), who.key)]


# --- shards are a function of configuration and number


def test_two_runs_and_two_workers_in_any_order_give_the_same_bytes(drawn, tmp_path, inspector):
    for worker in (1, 0):
        run(arguments(tmp_path / "again", "--worker", f"{worker}/2"))
    assert content(tmp_path / "again") == content(drawn)
    assert len(content(drawn)) == 6


def test_a_finished_shard_is_not_made_again_and_more_can_be_added(drawn, tmp_path, monkeypatch):
    shutil.copytree(drawn, tmp_path / "more")
    made = []
    monkeypatch.setattr(Engine, "make_shard", lambda self, number, progress: made.append(number))
    run(arguments(tmp_path / "more", "shards=4", "--shards", "0-2"))
    assert made == [2]


def the_command(*said):
    sys.argv[1:] = said
    runpy.run_module("lcm_lookahead.cli.main", run_name="__main__")


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(drawn, tmp_path):
    """Killed as soon as it has begun to write; the same command ends with the same files."""
    out = tmp_path / "killed"
    process = fresh.start(the_command, "generate", *arguments(out), output=tmp_path / "said")
    until = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < until and not (out.is_dir() and any(out.iterdir())):
        time.sleep(0.01)
    process.kill()
    process.join()
    run(arguments(out))
    assert content(out) == content(drawn)


def test_what_a_run_left_half_written_of_a_shard_is_taken_away_when_it_is_made_again(drawn, tmp_path):
    out = tmp_path / "left"
    shutil.copytree(drawn, out)
    names = [path.name for path in out.iterdir() if path.name.startswith("shard-000000")]
    assert len(names) == 4  # tar, side file, times, and the index, without which the shard is not finished
    for name in names:
        (out / f".{name}.0badcafe.part").write_bytes(b"half of it")
        if "index" in name:
            (out / name).unlink()
    run(arguments(out))
    assert content(out) == content(drawn) and not list(out.glob(".*.part"))


def test_another_configuration_is_refused_in_the_same_folder(drawn):
    with pytest.raises(SystemExit, match="made with another configuration or other models: name another folder"):
        run(arguments(drawn, "checks.similarity=0.5"))


def test_a_damaged_shard_is_made_again(drawn, tmp_path):
    shutil.copytree(drawn, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / shard_name(1), 700)
    with pytest.raises(SystemExit, match="is cut short"):
        run(arguments(tmp_path / "cut", "--verify"))
    run(arguments(tmp_path / "cut"))
    assert content(tmp_path / "cut") == content(drawn)
    run(arguments(tmp_path / "cut", "--verify"))


# --- what stands in a sample


def test_a_sample_says_all_that_is_known_of_a_person(drawn):
    shards = Shards(Store(drawn))
    about = shards.about(0)
    config = settings(drawn)
    person = read_people(config)(about["person"])
    assert about["description"] == person.description
    assert about["attributes"] == {k: list(v) for k, v in person.attributes.items()}
    assert about["generator"] == {"name": "drawn faces of the mini world", "licence": "Apache-2.0"}
    assert about["recogniser"]["name"] == "mini_face_recogniser.safetensors"
    for picture in about["pictures"]:
        assert picture["caption"] == picture["prompt"].replace(person.description, "a face")
        assert np.linalg.norm(embedding_of(picture)) == pytest.approx(1, abs=2e-3)
        found, exact = np.array(picture["landmarks"]), np.array(picture["exact"]["landmarks"])
        assert np.linalg.norm(found - exact, axis=1).mean() < 4
    assert str(Path.home()) not in json.dumps(about)


def test_the_side_file_counts_what_was_generated_kept_and_rejected(drawn):
    sides = [json.loads((drawn / side_name(shard_name(n))).read_text()) for n in range(2)]
    total = added(sides)
    assert total["people"]["generated"] == 6 and total["pictures"]["generated"] == 18
    assert total["pictures"]["kept"] + sum(total["rejected"].values()) == 18
    assert total["pictures"]["kept"] == len(Shards(Store(drawn)))
    assert sum(total["histograms"]["similarity"]) > 0
    assert sum(total["cosines"]["within"]) <= sum(total["cosines"]["within_generated"]) <= 18


def test_the_drawn_world_draws_what_the_description_says():
    config = settings("nowhere", "people.attributes.beard.values={a beard: 1}")
    from lcm_lookahead.mini.generator import identity_of
    from lcm_lookahead.mini.world.faces import HAIR_COLOUR_NAMES, HAIR_NAMES, SKIN_NAMES, skin_class

    for plan in plans(config, 12)[::3]:
        identity, said = identity_of(plan), plan.person.attributes
        assert identity["beard"].item() == 1
        assert (HAIR_NAMES[identity["hair"].item()],) == said["hair"]
        assert (HAIR_COLOUR_NAMES[identity["hair_colour"].item()],) == said["hair_colour"]
        assert (SKIN_NAMES[skin_class(identity).item()],) == said["skin"]
    with pytest.raises(ConfigError, match="knows no style 'marble bust'"):
        DrawnWorld()([replace(plans(config)[0], style="a marble bust")])


# --- checks

PERSON = Person(0, "a face", {})


def plan_of(number):
    style = "a photo" if number == 0 else "a comic"
    return PicturePlan(PERSON, number, style, "", "", number == 0, "", "", number)


def seen(angle=0.0, **more):
    """A picture whose embedding lies at an angle, in degrees; each with a look of its own."""
    radians = torch.deg2rad(torch.tensor(float(angle)))
    values = {"face_count": 1, "face_size": 0.6, "sharpness": 0.1, "thumbnail": torch.rand(16, 16)}
    values |= {"face": object(), "embedding": torch.stack([radians.cos(), radians.sin()])}
    return Measurements(**(values | more))


@pytest.mark.parametrize(
    ("measured", "why"),
    [
        (seen(), None),
        (seen(face_count=0, face=None), checks.NO_FACE),
        (seen(face_count=2), checks.SEVERAL_FACES),
        (seen(face_size=0.1), checks.SMALL_FACE),
        (seen(sharpness=0.001), checks.BLURRED),
        (seen(style=0.2), checks.OTHER_STYLE),
    ],
)
def test_each_fault_of_a_picture_has_its_reason(measured, why):
    asked = Checks(detector="d", clip="c", face_size=0.3, sharpness=0.01, style=0.5)
    assert rejection_of(asked, measured) == why
    opened = Checks(one_face=False, face_size=None)
    assert rejection_of(opened, measured) == (checks.NO_FACE if measured.face is None else None)


def test_a_photo_of_two_people_is_rejected_for_its_faces(inspector):
    pair = (reference_faces(2) * 255).round().byte()
    measured = inspector([*pair, torch.cat([*pair], 2)], [plan_of(0)] * 3)
    assert [one.face_count for one in measured] == [1, 1, 2]
    asked = settings("nowhere").checks
    assert [rejection_of(asked, one) for one in measured] == [None, None, checks.SEVERAL_FACES]


def test_the_one_that_is_unlike_goes_and_those_that_are_alike_stay():
    """One stranger pulls the means of all below the threshold; without it the others are alike."""
    pictures = [seen(0), seen(20), seen(170), seen(10)]
    measured, rejected = select(Checks(similarity=0.8), [plan_of(n) for n in range(4)], pictures)
    assert rejected == [None, None, checks.UNLIKE, None]
    cos = torch.cos(torch.deg2rad(torch.tensor([20.0, 10.0])))
    assert measured[0].similarity == pytest.approx(float(cos.mean()), abs=1e-5)
    assert measured[2].similarity < 0


def test_a_copy_of_another_picture_is_rejected():
    small = torch.rand(16, 16)
    pictures = [seen(thumbnail=small), seen(), seen(thumbnail=small + 0.001)]
    assert select(Checks(), [plan_of(n) for n in range(3)], pictures)[1] == [None, None, checks.COPY]


def test_a_person_without_plain_pictures_or_with_too_few_is_rejected():
    three = [plan_of(n) for n in range(3)]
    pictures = [seen(face_count=0, face=None, embedding=None), seen(), seen()]
    assert select(Checks(), three, pictures)[1] == [checks.NO_FACE, checks.NO_PLAIN, checks.NO_PLAIN]
    pictures = [seen(), seen(face_count=0, face=None, embedding=None), seen(face_count=0, face=None, embedding=None)]
    assert select(Checks(), three, pictures)[1] == [checks.TOO_FEW, checks.NO_FACE, checks.NO_FACE]


def test_a_person_like_an_earlier_one_is_rejected(inspector):
    """Every person has the face of person 0."""

    class OneFace(DrawnWorld):
        def __call__(self, plans):
            return super().__call__([replace(p, person=replace(p.person, number=0, attributes={})) for p in plans])

    made = Engine(settings("nowhere", "checks.duplicate=0.7"), OneFace(), inspector)
    people = made.generate(range(3))
    assert [person.rejected for person in people] == [None, checks.DUPLICATE, checks.DUPLICATE]
    assert summary(people)["rejected"][checks.DUPLICATE] >= 4


def test_pictures_are_checked_beside_the_generator_but_come_in_order(inspector):
    class Slow(Inspector):
        def __call__(self, pictures, plans):
            time.sleep(0.05 if plans[0].number == 0 else 0)
            return super().__call__(pictures, plans)

    slow = Slow(None, None, None, {}, "")
    made = Engine(settings("nowhere", "generator.batch=1"), DrawnWorld(), slow)
    numbers = [(p.plan.person.number, p.plan.number) for person in made.generate(range(3)) for p in person.pictures]
    assert numbers == [(n, k) for n in range(3) for k in range(3)]


# --- the few-step SDXL


@pytest.fixture(scope="module")
def few_step():
    return command.read_generator(settings("nowhere", name="mini"), CPU)


def test_a_picture_is_that_of_its_seed_whatever_it_is_drawn_with(few_step):
    asked = plans(settings("nowhere", name="mini"))
    together, alone = few_step(asked), few_step(asked[1:2])
    assert [d.pixels.shape for d in together] == [(3, 128, 128)] * 3
    apart = (together[1].pixels.float() - alone[0].pixels.float()).abs()
    assert apart.mean() < 2  # rounding in 16 bit
    others = (together[0].pixels.float() - together[1].pixels.float()).abs()
    assert others.mean() > 10


def test_a_diffusers_folder_of_the_same_weights_draws_the_same(few_step, tmp_path):
    base = drawn_people.write_folder(tmp_path / "sdxl")
    lora = WEIGHTS / "mini_collapsed_lora.safetensors"
    config = settings("nowhere", f"generator.base={base}", f"generator.lora={lora}", name="mini")
    other = read_few_step(config.generator, CPU)
    asked = plans(config)[:2]
    for one, two in zip(few_step(asked), other(asked), strict=True):
        assert (one.pixels.float() - two.pixels.float()).abs().mean() < 2
    assert other.name == "sdxl + mini_collapsed_lora.safetensors"


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "tcd"])
def test_every_sampler_draws_in_two_steps(sampler):
    config = settings("nowhere", f"generator.sampler={sampler}", "generator.steps=2", name="mini")
    drawing = command.read_generator(config, CPU)(plans(config)[:1])[0]
    assert drawing.pixels.float().std() > 20


def test_an_autoencoder_of_sdxl_s_own_kind_takes_the_base_s_place(tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        scaling_factor=0.13025,
    ).save_pretrained(tmp_path / "vae")
    config = settings("nowhere", f"generator.vae={tmp_path / 'vae'}", name="mini")
    made = command.read_generator(config, CPU)
    assert made.vae.config.force_upcast and made.vae.dtype == torch.bfloat16
    assert made(plans(config)[:1])[0].pixels.shape == (3, 128, 128)


def pictures(folder):
    """What a folder of shards holds: the pictures, float [n, h, w, 3] in [0, 255], in the order of the shards."""
    shards = Shards(Store(folder))
    files = [Image.open(io.BytesIO(shards.picture(n))) for n in range(len(shards))]
    return np.stack([np.asarray(file, np.float32) for file in files])


def test_pictures_of_a_person_that_share_attention_are_others_than_those_drawn_one_by_one(tmp_path):
    """The same base, seeds, sampler and steps; in the first of the steps the subject is only looked for."""
    one = ["shards=1", "people_per_shard=1", "prompts.per_person=2", "prompts.plain_count=1", "generator.batch=2"]
    one += ["generator.steps=3", "generator.precision=fp32", *UNCHECKED]
    run(arguments(tmp_path / "shared", *one, name="mini_consistent"))
    apart = [*one, "generator.kind=sdxl", "generator.shared=null"]
    run(arguments(tmp_path / "apart", *apart, name="mini_consistent"))
    shared, alone = (pictures(tmp_path / name) for name in ("shared", "apart"))
    assert shared.shape == alone.shape == (2, 128, 128, 3)
    assert (np.abs(shared - alone).mean((1, 2, 3)) > 0.5).all()  # rounding alone: 0.0001
    seeds = [[p["seed"] for p in Shards(Store(tmp_path / name)).about(0)["pictures"]] for name in ("shared", "apart")]
    assert seeds[0] == seeds[1]


def test_files_that_are_missing_or_do_not_fit_are_said(tmp_path):
    config = settings("nowhere", "generator.lora=nothing.safetensors", name="mini")
    with pytest.raises(FileNotFoundError, match="no nothing.safetensors, which generator.lora names"):
        command.read_generator(config, CPU)
    parts = drawn_people.frozen()
    strange = {"lora_unet_elsewhere.lora_down.weight": torch.zeros(1, 1)}
    with pytest.raises(ModelError, match="is no LoRA for this base"):
        FewStepSDXL(config.generator, (parts.unet, parts.text, parts.vae), strange, [], CPU)


def test_a_clip_tells_styles():
    """The mini CLIP, asked through the path of any other CLIP."""
    from lcm_lookahead.trainer.data.generate.styles import clip_scorer

    config = settings("nowhere", "prompts.per_person=7")
    asked = plans(config, 4)
    pictures = torch.stack([d.pixels for d in DrawnWorld()(asked)]) / 255
    score = clip_scorer(WEIGHTS / "mini_clip/model.safetensors", config.prompts, CPU)
    right = score(pictures, [plan.style for plan in asked])
    assert ((right > 0) & (right <= 1)).all()
    assert right.mean() > 0.6 > 0.2 > score(pictures, ["a photo"] * len(asked))[2:].median()


# --- command and report


def test_the_report_is_one_page_with_pictures_and_figures(drawn):
    page = (drawn / "report.html").read_text()
    for text in ("people kept", "Similarity", "Rejections", "hair (balanced)", "speed of one worker", "AUC"):
        assert text in page
    assert page.count("data:image/jpeg;base64,") == 1 and page.count("data:image/svg+xml;base64,") >= 4
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="data:' in page
    assert str(drawn) not in page


def test_the_pilot_says_what_each_threshold_keeps_and_writes_no_shard(tmp_path, capsys):
    run(arguments(tmp_path / "pilot", "--pilot", "4"))
    said = capsys.readouterr().out
    assert "checks.similarity" in said and "keeps" in said and "of 12 pictures" in said
    assert [p.name for p in (tmp_path / "pilot").iterdir()] == ["pilot.html"]
    assert "Thresholds" in (tmp_path / "pilot/pilot.html").read_text()


@pytest.mark.parametrize(
    ("said", "people", "overrides"),
    [
        ("c.yaml", None, []),
        ("c.yaml --pilot", 50, []),
        ("--pilot c.yaml", 50, []),
        ("c.yaml --pilot shards=2", 50, ["shards=2"]),
        ("c.yaml shards=2 --pilot --worker 0/2", 50, ["shards=2"]),
        ("c.yaml --pilot 4 shards=2", 4, ["shards=2"]),
        ("c.yaml --pilot=4 shards=2", 4, ["shards=2"]),
    ],
)
def test_a_pilot_is_of_fifty_people_unless_a_number_follows(said, people, overrides):
    command = typer.main.get_command(main.app).commands["generate"]
    found = command.make_context("generate", said.split()).params
    assert (str(found["config"]), found["pilot"], found["overrides"] or []) == ("c.yaml", people, overrides)


@pytest.mark.parametrize("said", [["--pilot", "1"], ["--pilot=1"], ["--pilot=many"]])
def test_a_pilot_of_one_is_refused(said, capsys):
    with pytest.raises(SystemExit) as end:
        run(["c.yaml", *said])
    assert end.value.code == 2 and "--pilot" in capsys.readouterr().err


def test_the_pilot_s_thresholds_keep_what_they_say(inspector):
    made = Engine(settings("nowhere", "checks.similarity=0.99"), DrawnWorld(), inspector)
    everyone, asked = made.pilot(range(5))
    rows = {row["name"]: row for row in thresholds(made.config, everyone)}
    values = [p.measured.similarity for person in everyone for p in person.pictures]
    at = rows["checks.similarity"]["at"]
    assert np.mean(np.array(values) >= at[3]) == pytest.approx(0.8, abs=0.08)
    assert rows["checks.similarity"]["keeps"] == np.mean(np.array(values) >= 0.99)
    assert not any(person.kept() for person in asked) and all(person.kept() for person in everyone)


def test_names_warn(tmp_path, capsys, monkeypatch):
    (tmp_path / "names.txt").write_text("Ada Example\nBen Example\n")
    monkeypatch.setattr(generate, "verify_shards", lambda config: 0)
    more = [f"names={tmp_path / 'names.txt'}", "people=null", "--verify"]
    run(arguments(tmp_path / "out", *more, name="mini"))
    assert "makes pictures of real people" in capsys.readouterr().err


def test_people_of_a_list_are_drawn_by_their_names_which_no_caption_tells(tmp_path, capsys):
    names = ["Ada Example", "Ben Example"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    more = [f"names={tmp_path / 'names.txt'}", "people=null", "shards=1", "people_per_shard=2", *UNCHECKED]
    run(arguments(tmp_path / "out", *more, "prompts.per_person=2", "prompts.plain_count=1", name="mini"))
    assert "makes pictures of real people" in capsys.readouterr().err
    shards = Shards(Store(tmp_path / "out"))
    people = [shards.about(n) for n in range(2)]
    assert [about["description"] for about in people] == names
    for about in people:
        assert len(about["pictures"]) == 2
        for picture in about["pictures"]:
            assert picture["prompt"].startswith(f"{picture['style']} of {about['description']}")
            assert picture["caption"] == picture["prompt"].replace(about["description"], "a face")
            assert "Example" not in picture["caption"]
    ada, ben = pictures(tmp_path / "out").reshape(2, 2, 128, 128, 3)
    assert np.abs(ada - ben).mean() > 10


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--shards", "1-5"], "--shards is '1-5', and there are 2"),
        (["--shards", "x"], "--shards is 'x': write the first and the last"),
        (["--worker", "2/2"], "--worker is '2/2'"),
        (["--report"], "There is no finished shard"),
        (["--verify"], "is no whole folder of shards"),
        (["prompts.styles=[]"], "prompts.styles"),
        (["generator.seize=3"], "did you mean size"),
        (["checks.detector=nowhere"], "There is no nowhere, which checks.detector names"),
        (["people.attributes.skin.values={green: 1}"], "The drawn world knows no skin 'green'"),
    ],
)
def test_what_is_asked_wrongly_is_one_sentence(more, sentence, tmp_path):
    with pytest.raises(SystemExit) as caught:
        run(arguments(tmp_path / "out", *more))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("lookahead generate: ")


def test_a_disk_that_is_full_in_the_middle_keeps_what_is_finished(drawn, tmp_path, monkeypatch):
    out, sync = tmp_path / "full", os.fsync

    def full(file):
        if (out / "shard-000000.index.json").exists():
            raise OSError(28, "No space left on device")
        sync(file)

    monkeypatch.setattr("lcm_lookahead.trainer.data.store.os.fsync", full)
    with pytest.raises(SystemExit, match="shard-000001.tar cannot be written .No space left on device"):
        run(arguments(out))
    assert sorted(p.name for p in out.iterdir()) == [
        "shard-000000.index.json",
        "shard-000000.json",
        "shard-000000.tar",
        "shard-000000.times.json",
    ]
    monkeypatch.undo()
    run(arguments(out))
    assert content(out) == content(drawn)


@pytest.mark.parametrize(
    ("environment", "worker"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, (1, 4)),
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "8"}, (2, 8)),
        ({"SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "1"}, (7, 8)),
    ],
)
def test_a_worker_knows_its_number_from_whoever_started_it(environment, worker, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", *(f"SLURM_ARRAY_TASK_{k}" for k in ("ID", "COUNT", "MIN"))):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert engine.worker_from_environment() == worker


def test_figures_of_histograms_are_those_of_their_values():
    numbers = np.random.default_rng(0)
    own, other = numbers.normal(0.5, 0.1, 400).clip(-1, 1), numbers.normal(0.3, 0.2, 300).clip(-1, 1)
    one, two = (engine.histogram(v.tolist(), -1, 1) for v in (own, other))
    mean, spread = mean_and_deviation(one, -1, 1)
    assert mean == pytest.approx(own.mean(), abs=0.01) and spread == pytest.approx(own.std(), abs=0.01)
    exact = (own[:, None] > other[None]).mean()
    assert auc(one, two) == pytest.approx(exact, abs=0.01)


def test_a_shard_error_is_one_that_a_user_can_mend():
    from lcm_lookahead.cli.main import user_errors

    assert issubclass(ShardError, user_errors())
