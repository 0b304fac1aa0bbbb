"""A folder of real picture files: pairs, crops, what is kept, and a run on it."""

import csv
import json
import os
import shutil

import pytest
import torch
from lcm_lookahead.cli import assemble as assembling
from lcm_lookahead.cli import main
from lcm_lookahead.lookahead.files import encoder_file
from lcm_lookahead.mini import drawn_people
from lcm_lookahead.mini.files import insightface_pack
from lcm_lookahead.mini.plan import WEIGHTS
from lcm_lookahead.mini.world.data import group_of_people
from lcm_lookahead.mini.world.faces import STYLES, captions, render
from lcm_lookahead.sdxl.images import read
from lcm_lookahead.sdxl.load import ModelError
from lcm_lookahead.trainer.config import CONFIGS
from lcm_lookahead.trainer.data.folder import square_of
from lcm_lookahead.trainer.data.pairs import DataError, Entry, Seen, listing, look_of, make_pairs
from lcm_lookahead.trainer.lookahead import config
from lcm_lookahead.trainer.lookahead.config import cache_folder
from lcm_lookahead.trainer.seeds import order
from lcm_lookahead.trainer.train import train
from PIL import Image

CPU = torch.device("cpu")
PEOPLE, PICTURES = 3, 4


def save(path, picture, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(path, **options)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Drawn people as files: a folder each, four pictures, one wide, one a JPEG; captions in metadata.jsonl."""
    folder = tmp_path_factory.mktemp("data") / "people"
    faces = group_of_people("held_out", PEOPLE, STYLES)
    texts, lines = captions(faces, False), []
    for person in range(PEOPLE):
        for n in range(PICTURES):
            row = person * (len(STYLES) + 1) + n
            picture = render(faces.rows(slice(row, row + 1)), 128, seed=row)[0]
            if n == 1:
                picture = torch.nn.functional.pad(picture, (64, 0, 0, 0))  # a wide one, its face on the right
            name = f"person {person}/{n}.{'jpg' if n == 2 else 'png'}"
            save(folder / name, picture)
            lines.append(json.dumps({"file_name": name, "text": texts[row]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def settings(data, out, *more):
    values = [
        f"data.source={data}",
        "data.size=128",
        f"out={out}",
        "batch=2",
        "steps=3",
        "validate_every=0",
        "precision=fp32",
    ]
    return config.load(CONFIGS / "mini.yaml", [*values, *more])


@pytest.fixture(scope="module")
def source(drawn, tmp_path_factory):
    recipe, source = assembling.assemble(settings(drawn, tmp_path_factory.mktemp("out")))
    assert recipe.about["size"] == "128"
    return source


def test_every_picture_is_a_target_and_its_reference_another_one_of_the_person_with_a_face(source):
    assert len(source) == PEOPLE * PICTURES
    chosen = {}
    for number in range(200):
        target = source.pictures.targets[number % len(source)]
        reference = source.loader.reference_of(target, number)
        mine, theirs = (source.pictures.pairs.pictures[n] for n in (target, reference))
        assert mine.person == theirs.person and mine.file != theirs.file
        assert source.pictures.pairs.seen[theirs.file].face is not None
        chosen.setdefault(mine.file, set()).add(theirs.file)
    assert max(len(files) for files in chosen.values()) > 1
    assert [source.loader.reference_of(0, n) for n in range(9)] == [source.loader.reference_of(0, n) for n in range(9)]


def test_a_square_holds_the_face_and_its_landmarks_move_along(source):
    for place, entry in enumerate(source.pictures.pairs.pictures):
        seen = source.pictures.pairs.seen[entry.file]
        picture, points = source.pictures.crop(place, True)
        assert picture.shape == (1, 3, 128, 128)
        if entry.file.endswith("1.png"):
            assert (seen.width, seen.height) == (192, 128) and square_of(seen, None)[0] > 32
        if seen.face is not None:
            found = source.detector(picture)[0][0]
            assert (found.points - points[0]).norm(dim=1).mean() < 2, entry.file


def test_a_margin_crops_references_alone():
    seen = Seen("a", 1, 1, "", width=400, height=300, face=(100.0, 100, 180, 200, *[1.0] * 10, 0.9))
    assert square_of(seen, None) == (0, 0, 300)
    left, top, side = square_of(seen, 0.3)
    assert side == 160 and left == round(140.5 - 80) and top == round(150.5 - 80)


def test_a_batch_is_that_of_the_picture_s_own_values(source, drawn):
    both, one = source.batch([0, 5], [0, 1], CPU), source.batch([5], [1], CPU)
    assert both.names == ["person 0/0.png", "person 1/1.png"]
    for name in ("target", "reference", "features"):
        assert torch.equal(getattr(both, name)[1:], getattr(one, name)), name
    said = json.loads((drawn / "metadata.jsonl").read_text().splitlines()[5])["text"]
    context, pooled = source.models.text(said)
    assert torch.equal(one.text.context, context) and torch.equal(one.text.pooled, pooled)
    values, valid = one.loss(source.models.vae.decode(one.reference).sample)
    assert valid.all() and values < 0.3  # the reference itself is the person


def test_what_is_kept_is_read_again_and_a_new_picture_adds_to_it(source, drawn, tmp_path, monkeypatch):
    data = tmp_path / "people"
    shutil.copytree(drawn, data)
    numbers = list(range(24))

    def opened(*more):
        return assembling.assemble(settings(data, tmp_path, "steps=12", "batch=2", "data.size=64", *more))[1]

    def batch(source):
        return source.batch(order(len(source), 0, numbers), numbers, CPU)

    class Nothing:
        def __getattr__(self, name):
            raise AssertionError(f"{name} is computed again")

    kept = opened("data.read_batch=1")  # as alone; several at a time differ in the last bits
    kept.prepare(CPU)
    models, kept.models = kept.models, Nothing()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "people.cache").rglob("features-*.tar")}
    made, again = batch(opened("data.keep=false")), batch(kept)
    kept.models = models
    assert before
    for name in ("target", "reference", "features"):
        assert torch.equal(getattr(again, name), getattr(made, name)), name
    assert torch.equal(again.text.context, made.text.context)
    assert torch.equal(again.text.pooled, made.text.pooled)
    assert torch.equal(again.loss.references.embeddings, made.loss.references.embeddings)
    assert torch.equal(again.loss.references.points, made.loss.references.points)

    shutil.copy(drawn / "person 0/3.png", data / "person 1/9.png")
    wider = opened()
    wider.prepare(CPU)
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "people.cache").rglob("features-*.tar")}
    assert before.items() <= after.items()

    def see(*_):
        raise AssertionError("it is computed again")

    monkeypatch.setattr("lcm_lookahead.trainer.data.features.FeatureReader.see", see)
    batch(wider)


def test_the_command_trains_on_files_alone(drawn, tmp_path, capsys, monkeypatch):
    """Nothing of the mini world is named but as public files: a diffusers folder, an ONNX pack, pictures."""
    sdxl, pack = drawn_people.write_folder(tmp_path / "sdxl"), (WEIGHTS / insightface_pack.DETECTOR).parent
    run = {
        "name": "mine",
        "out": str(tmp_path / "out"),
        "model": {
            "base": str(sdxl),
            "start": str(WEIGHTS / "mini_ip_adapter_plus_face.safetensors"),
            "shortcut": str(WEIGHTS / "mini_lcm_lora.safetensors"),
            "vae": str(sdxl / "vae"),
            "image_encoder": str(sdxl / "image_encoder"),
            "recogniser": str(WEIGHTS / insightface_pack.RECOGNISER),
            "detector": str(pack),
        },
        "data": {"source": str(drawn), "size": 128, "cache": str(tmp_path / "cache")},
        "steps": 2,
        "batch": 2,
        "precision": "fp32",  # 16 bit are held by test_assemble; on a CPU below AVX-512 they take a minute
        "validate_every": 0,
        "log_every": 1,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    main.main(["train", str(tmp_path / "run.yaml")])
    file = encoder_file.read(tmp_path / "out/mine.safetensors")
    assert (file.metadata["steps"], file.metadata["size"], file.metadata["data"]) == ("2", "128", drawn.name)
    assert str(tmp_path.parent) not in json.dumps(file.metadata)  # folders tell who somebody is
    assert len(file.metadata["base_model_hash"]) == 64
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["counted"] > 0 and 0 < line["diffusion"] < 2 for line in lines)
    assert list((tmp_path / "cache").rglob("features-*.tar"))

    def look(path, *_):
        raise AssertionError(f"{path} is looked at again")

    monkeypatch.setattr("lcm_lookahead.trainer.data.pairs._look", look)
    capsys.readouterr()
    main.main(["doctor", str(tmp_path / "run.yaml")])
    found = capsys.readouterr().out
    assert "targets" in found
    # Nor with the detector's folder called otherwise, nor without one, after which it is still known.
    run["model"]["detector"] = os.path.relpath(pack)
    (tmp_path / "other.yaml").write_text(json.dumps(run))
    main.main(["doctor", str(tmp_path / "other.yaml")])
    assert capsys.readouterr().out == found
    main.main(["doctor", str(drawn), f"cache={tmp_path / 'cache'}", "size=128"])
    assert capsys.readouterr().out != found
    main.main(["doctor", str(tmp_path / "run.yaml")])
    assert capsys.readouterr().out == found


def test_damaged_pictures_are_left_out_and_listed_and_too_many_stop_the_run(drawn, tmp_path):
    data = tmp_path / "people"
    shutil.copytree(drawn, data)
    whole = (data / "person 0/0.png").read_bytes()
    (data / "person 0/0.png").write_bytes(whole[: len(whole) // 2])
    c = settings(data, tmp_path / "out", "steps=1")
    recipe, source = assembling.assemble(c)
    assert len(source) == PEOPLE * PICTURES - 1
    assert train(c, recipe, source).exists()
    line = json.loads((tmp_path / "out/quarantine.jsonl").read_text())
    assert line["file"] == "person 0/0.png" and "cannot be read as a picture" in line["why"]
    for n in (1, 2):
        (data / f"person 1/{n}.{'jpg' if n == 2 else 'png'}").write_bytes(b"nothing")
    with pytest.raises(DataError, match="3 of 12 pictures cannot be read .* allows a share of 0.02: repair"):
        assembling.assemble(c)


def test_captions_and_people_come_from_csv_too_and_from_text_files(tmp_path):
    for name in ("a.png", "b.png", "carl/c.png"):
        save(tmp_path / name, torch.rand(3, 40, 40))
    (tmp_path / "carl/c.txt").write_text("carl at sea\n")
    with (tmp_path / "metadata.csv").open("w", newline="") as f:
        rows = csv.writer(f)
        rows.writerows([["file_name", "text", "person"], ["a.png", "a, drawn", "anna"], ["b.png", "", "anna"]])
        rows.writerow(["gone.png", "", "anna"])
    entries, gone = listing(tmp_path)
    assert gone == ["gone.png"]
    carl = Entry("carl/c.png", "carl", "carl at sea")
    assert entries == [Entry("a.png", "anna", "a, drawn"), Entry("b.png", "anna"), carl]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "x"}', "Line 1 of .* has no file_name"),
        ('\n{"file_name": ', "Line 2 of .* is no JSON"),
        ("", "Nobody is named for a.png .1 such files.: put each"),
        ('{"file_name": "a.png", "person": "J\xf6rg"}'.encode("latin-1"), "is not in UTF-8 .*: save it with"),
    ],
)
def test_a_listing_that_is_not_understood_says_where(tmp_path, content, said):
    save(tmp_path / "a.png", torch.rand(3, 40, 40))
    (tmp_path / "metadata.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=said):
        listing(tmp_path)


def test_links_to_folders_are_followed_and_hidden_files_left_out(tmp_path):
    for name in ("archive/anna/a.png", "archive/anna/._a.png", "people/ben/b.png"):
        save(tmp_path / name, torch.rand(3, 40, 40))
    (tmp_path / "people/anna").symlink_to(tmp_path / "archive/anna")
    (tmp_path / "people/ben/back").symlink_to(tmp_path / "people")
    entries, _ = listing(tmp_path / "people")
    assert [entry.file for entry in entries] == ["anna/a.png", "ben/b.png"]


def test_other_pictures_people_or_captions_are_other_data(source, drawn, tmp_path):
    data = tmp_path / "people"
    shutil.copytree(drawn, data)

    def digest():
        return assembling.assemble(settings(data, tmp_path / "out"))[1].digest()

    assert digest() == source.digest()  # wherever it lies
    metadata = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(metadata.replace('"text": "', '"text": "still ', 1))
    assert digest() != source.digest()
    (data / "metadata.jsonl").write_text(metadata)
    (data / "person 0/0.png").rename(data / "person 1/9.png")
    assert digest() != source.digest()


def test_a_cache_that_cannot_be_written_is_said_with_what_to_do(source, drawn, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    c = settings(drawn, tmp_path / "out", f"data.cache={tmp_path / 'cache'}")
    with pytest.raises(DataError, match="cannot be written .*: name another folder, data.cache"):
        assembling.assemble(c)
    (tmp_path / "cache").unlink()
    made = assembling.assemble(c)[1]
    (tmp_path / "cache/features").touch()  # where the folder of what is kept would be
    with pytest.raises(DataError, match="cannot be kept in .*: free some space, set data.cache to another folder"):
        made.prepare(CPU)


def test_a_folder_may_be_given_as_the_one_to_stand_in(drawn, monkeypatch):
    monkeypatch.chdir(drawn)
    here = settings(".", "out").data
    assert cache_folder(here) == drawn.with_name("people.cache")


def test_copies_are_never_each_other_s_reference(tmp_path, drawn):
    picture, other = (read(drawn / f"person 0/{n}.png") for n in (0, 3))
    save(tmp_path / "p.jpg", picture, quality=60)
    again = read(tmp_path / "p.jpg")
    looks = [Seen(n, 1, 1, "", None, n, look_of(p), 128, 128) for n, p in (("a", picture), ("b", again), ("c", other))]
    entries = [Entry(n, "anna") for n in "abc"]
    found = make_pairs(entries, {s.file: s for s in looks}, False)
    assert [list(fit) for fit in found.references] == [[2], [2], [0, 1]] and found.used == {0, 1, 2}
    alone = make_pairs(entries[:2], {s.file: s for s in looks}, False)
    assert not alone.pictures and set(alone.left_out.values()) == {"its person's other pictures are copies of it"}


def test_the_order_is_that_of_one_process_however_many_there_are(source):
    one = order(len(source), 0, range(24))
    two = [order(len(source), 0, range(24)[rank::2]) for rank in range(2)]
    assert [two[n % 2][n // 2] for n in range(24)] == one


def test_people_are_held_out_for_validation_where_there_are_enough(tmp_path, drawn):
    data = tmp_path / "people"
    for n in range(12):
        shutil.copytree(drawn / f"person {n % PEOPLE}", data / f"p{n}")
    c = settings(
        data, tmp_path / "out", "validate_every=5", "validation.people=4", "validation.prompts=[a face, a comic]"
    )
    _, source = assembling.assemble(c)
    assert len(source.pictures.held_out) == 1 and len(source) == 11 * PICTURES
    assert {source.pictures.pairs.pictures[n].person for n in source.pictures.targets}.isdisjoint(
        source.pictures.held_out
    )
    never = settings(data, tmp_path / "out", "validation.people=4")
    _, same = assembling.assemble(never)  # so that it may be turned on later
    assert (same.pictures.held_out, same.digest()) == (source.pictures.held_out, source.digest())
    probes = source.probes(c, CPU)
    assert probes.batch.names == [f"{prompt}, {source.pictures.held_out[0]}" for prompt in ("a face", "a comic")]
    assert probes.shown.shape == (1, 3, 128, 128) and "held out" in probes.by
    scores = probes.score(probes.shown.expand(2, -1, -1, -1))["identity"]
    assert (scores > 0.95).all()  # the reference itself


def test_a_run_on_files_is_validated(drawn, tmp_path):
    c = settings(drawn, tmp_path, "steps=1", "validate_every=1", "validation.people=1", "validation.steps=1")
    recipe, source = assembling.assemble(c)
    train(c, recipe, source)
    assert (tmp_path / "validation/step-00000001.png").exists()
    assert "which the loss uses too, on people who are trained on (there are fewer" in source.probes(c, CPU).by


def test_a_validation_has_judges_of_its_own(drawn, tmp_path):
    """On the people's own pictures: a photo is more like its person, and like its own prompt, than another's."""
    clip, recogniser = WEIGHTS / "mini_clip/model.safetensors", WEIGHTS / insightface_pack.RECOGNISER
    judges = [f"validation.recogniser={recogniser}", f"validation.clip={clip}"]
    prompts = ["a photo of a face", "a comic of a face"]
    c = settings(drawn, tmp_path, "validate_every=1", "validation.people=2", f"validation.prompts={prompts}", *judges)
    probes = assembling.assemble(c)[1].probes(c, CPU)
    assert probes.by.startswith("w600k_r50.onnx, on people") or probes.by.startswith(f"{recogniser.name}, on people")
    right = probes.score(probes.shown.repeat_interleave(2, 0))
    wrong = probes.score(probes.shown.flip(0).repeat_interleave(2, 0))
    assert (right["identity"] > 0.99).all() and (wrong["identity"] < 0.8).all()
    photo, comic = right["prompt"].view(2, 2).unbind(1)
    assert (photo > comic).all()
    blank = probes.score(torch.full((4, 3, 128, 128), 0.5))
    assert blank["identity"].isnan().all()
    with pytest.raises(FileNotFoundError, match="no gone.safetensors, which validation.clip names: get a whole"):
        assembling.assemble(settings(drawn, tmp_path, "validate_every=1", "validation.clip=gone.safetensors"))
    with pytest.raises(ModelError, match="validation.clip: .* is not a CLIP in the transformers layout"):
        start = WEIGHTS / "mini_ip_adapter_plus_face.safetensors"
        assembling.assemble(settings(drawn, tmp_path, "validate_every=1", f"validation.clip={start}"))
