"""`lookahead evaluate PROTOCOL.yaml` in diffusers on the mini world: what it writes, resumes and refuses."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import yaml
from lcm_lookahead.cli import evaluate as command
from lcm_lookahead.cli import main
from lcm_lookahead.cli.world import library_of, world_of
from lcm_lookahead.evaluation import preference
from lcm_lookahead.evaluation.harness import cost, figures, opening, protocol, report, run
from lcm_lookahead.evaluation.harness.library import EvaluationError
from lcm_lookahead.evaluation.harness.measures import Case
from lcm_lookahead.evaluation.harness.methods import GuidanceOption
from lcm_lookahead.evaluation.harness.people import count_people, read_people
from lcm_lookahead.evaluation.harness.sections import People
from lcm_lookahead.evaluation.harness.store import EvaluationStore
from lcm_lookahead.tools.common import ROOT
from lcm_lookahead.trainer.config import ConfigError
from PIL import Image

VALUES = {
    "title": "A small one",
    "models": {"base": "mini", "image_encoder": "mini_clip_vision.safetensors", "pack": "mini"},
    "people": {"source": "drawn", "count": 3},
    "prompts": {"photo": ["a photo of a face"]},
    "seeds": [0],
    "drawing": {"size": 128, "steps": 2, "guidance": 3.0},
    "backends": ["diffusers"],
    "baseline": "adapter",
    "methods": {
        "adapter": {"kind": "encoder", "file": "mini_ip_adapter_plus_face.safetensors", "weights": [1.0, 0.5]},
        "nothing": {"kind": "none"},
        "best": {"kind": "best of", "of": "nothing", "pictures": 2, "by": {"kind": "prompt", "clip": "mini"}},
    },
    "measures": {
        "identity": {"kind": "identity", "recogniser": "mini"},
        "prompt": {"kind": "prompt", "clip": "mini"},
        "change": {"kind": "change", "clip": "mini_clip/model.safetensors"},
    },
    "full": {"people": {"count": 5}, "methods": {"adapter": {"weights": [0.25]}}},
}


def written(folder, **changed):
    path = folder / "protocol.yaml"
    path.write_text(yaml.safe_dump({**VALUES, "out": str(folder / "out"), **changed}), encoding="utf-8")
    return path


def evaluation(path, overrides=(), **options):
    settings = protocol.load(path, overrides)
    return run.EvaluationRun(settings, world_of(settings), **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished evaluation, drawn by two workers, one after the other."""
    folder = tmp_path_factory.mktemp("evaluated")
    path = written(folder)
    for number in range(2):
        one = evaluation(path, worker=number, workers=2)
        one.draw()
        one.score()
        assert (one.missing() > 0) == (number == 0)
    whole = evaluation(path)
    report.write(whole)
    return path, whole


def test_two_workers_draw_and_judge_all_of_it_once(done):
    _, whole = done
    lines = [
        json.loads(line) for p in sorted(whole.folder.glob("drawn-*.jsonl")) for line in p.read_text().splitlines()
    ]
    assert len(list(whole.folder.glob("drawn-*.jsonl"))) == 2
    kept = [line["key"] for line in lines]
    # two weights, none, the best, and the other candidate, of three people; candidates are pictures of `nothing`
    assert len(kept) == len(set(kept)) == 3 * 5
    assert all(whole.store.picture(key).is_file() for key in kept)
    assert {line["backend"].split()[0] for line in lines} == {"diffusers,"} and all(li["seconds"] > 0 for li in lines)
    if sys.platform == "linux":
        assert all(line["memory"] > 1e8 for line in lines)  # torch alone takes more


def test_what_is_there_is_neither_drawn_nor_judged_again_and_a_cut_line_is_made_good(done, monkeypatch):
    path, whole = done
    calls = []
    monkeypatch.setattr(run, "opened", lambda *a: calls.append(a) or pytest.fail("a back end was opened"))
    again = evaluation(path)
    again.draw()
    before = len(again.store.scores)
    again.score()
    assert not calls and len(again.store.scores) == before
    other_title = evaluation(path, ["title=Another", "baseline=nothing"])
    assert not other_title.missing()  # pictures depend on neither
    assert evaluation(path, ["drawing.steps=3"]).missing() == 12
    # a kill in the middle of a line: what is not judged is not there, and is no picture without a face
    lines = whole.folder / "scores-1.jsonl"
    text = lines.read_text()
    try:
        lines.write_text(text[: -len(text.splitlines()[-1]) // 2])
        hurt = evaluation(path)
        lost = before - len(hurt.store.scores)
        assert lost == 1 and hurt.missing() == 1
        hurt.score()
        assert len(evaluation(path).store.scores) == before
    finally:
        lines.write_text(text)


def test_the_page_needs_no_other_file_and_the_protocol_beside_it_is_the_same_evaluation(done):
    _, whole = done
    page = (whole.folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "A small one" in page and "<svg" in page
    again = evaluation(whole.folder / "protocol.yaml")
    assert not again.missing()
    table = (whole.folder / "table.md").read_text(encoding="utf-8")
    assert "adapter, 0.5" in table and "Gains over adapter, 1" in table and "style, mini scorer" in table
    assert "| seconds a picture | peak memory, GB |" in table
    lines = (whole.folder / "table.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 3 and lines[0].endswith(",seconds,memory")  # arms, measures
    lines = (whole.folder / report.SCORES).read_text().splitlines()
    assert len(lines) == 1 + 4 * 3  # arms, people
    assert lines[0].startswith("method,weight,backend,person,kind,prompt,seed,picture,reference,seconds,")
    for line in csv.DictReader(lines):
        (kept,) = [one for one in whole.lines() if one["key"] == Path(line["picture"]).stem]
        about = [line[field] for field in ("method", "weight", "person", "prompt", "seed")]
        assert about[0] == kept["method"] and about[2:] == [kept["person"], kept["prompt"], str(kept["seed"])]
        assert float(about[1]) == kept["weight"] and float(line["seconds"]) == kept["seconds"]
        (person,) = [one for one in whole.people if one.name == line["person"]]
        measured = whole.measures["identity"].score(Case(whole.folder / line["picture"], "", "", person.reference))
        assert float(line["identity (mini judge)"]) == pytest.approx(measured, abs=1e-6)
        assert line["prompt (style, mini scorer)"] in ("0.0", "1.0")
    tex = (whole.folder / "table.tex").read_text()
    assert tex.count(r"\\") == 5 and r"\pm" in tex
    with Image.open(whole.folder / "grid.jpg") as grid:
        assert grid.height > 12 * 144


def test_two_methods_of_an_evaluation_become_a_study_of_their_pictures(done, tmp_path):
    _, whole = done
    command = ["study", "make", "adapter@0.5", "nothing", "--evaluation", str(whole.folder), "--repeats", "0"]
    main.main([*command, "--out", str(tmp_path / "study")])
    key = json.loads((tmp_path / "study" / "key.json").read_text())
    assert key["methods"] == ["adapter@0.5", "nothing"] and len(key["items"]) == 3
    page = (tmp_path / "study" / "public" / "index.html").read_text()
    assert page.count("a photo of a face") == 3 and page.count('"reference": ') == 3
    (pair, *_) = preference.pairs_in(whole.folder, "adapter@0.5", "nothing")
    job = whole.jobs()[0]
    assert pair.first == whole.store.picture(whole.key("adapter", job, 0.5, "diffusers"))
    for first, evaluated, says in (
        (
            "adapter@0.7",
            whole.folder,
            "'adapter@0.7' was not drawn: name one of adapter@1, adapter@0.5, best@1, nothing@1.",
        ),
        ("adapter", tmp_path, "has no scores.csv: name the folder of a finished"),
    ):
        with pytest.raises(preference.StudyError, match=says):
            preference.pairs_in(evaluated, first, "nothing")


def test_the_figures_are_of_the_scores_and_paired(done):
    """Whatever was drawn: three people of two steps each prove nothing of the methods."""
    _, whole = done
    figures = json.loads((whole.folder / "figures.json").read_text())
    told = {arm["title"]: arm for arm in figures["arms"]}
    identity = whole.measures["identity"]
    scores = {
        title: [row[0] for row in whole.values(run.Arm(method, weight, "diffusers"), identity)]
        for title, method, weight in (("adapter, 1", "adapter", 1.0), ("nothing", "nothing", 1.0))
    }
    for title, column in scores.items():
        assert told[title]["means"]["identity"][0] == pytest.approx(sum(column) / len(column), abs=1e-5)
    gains = [n - a for n, a in zip(scores["nothing"], scores["adapter, 1"], strict=True)]
    middle, low, high = told["nothing"]["gains"]["identity"]
    assert any(gains) and middle == pytest.approx(sum(gains) / len(gains), abs=1e-5)
    assert min(gains) - 1e-5 <= low <= middle <= high <= max(gains) + 1e-5  # of no other pairs
    assert told["adapter, 1"]["gains"] == {} and told["nothing"]["means"]["change"] == [None] * 3


def test_of_pictures_drawn_before_memory_was_measured_none_is_told(done):
    path, whole = done
    arm = run.Arm("nothing", 1.0, "diffusers")
    before = evaluation(path)
    for line in before.store.drawn.values():
        del line["memory"]
    assert before.memory(arm) is None and before.seconds(arm) == whole.seconds(arm)
    (shown,) = (a for a in report.figures(before).arms if a.arm == arm)
    assert report.memory(shown) == "–" and not before.missing()


def test_a_worker_that_ends_last_sees_what_others_have_kept_meanwhile(tmp_path):
    path = written(
        tmp_path, methods={"nothing": {"kind": "none"}}, baseline=None, people={"source": "drawn", "count": 2}
    )
    first, second = (evaluation(path, worker=number, workers=2) for number in range(2))
    for one in (first, second):
        one.draw()
        one.score()
    assert second.missing() == first.missing() == 0


def test_the_best_of_other_noises_has_no_change_by_the_reference(done):
    _, whole = done
    found = {(a.arm.method, a.arm.weight): a.means["change"].value for a in report.figures(whole).arms}
    assert numpy.isnan(found["best", 1.0]) and found["adapter", 1.0] > 0


def test_arms_stand_over_the_baseline_s_curve_at_their_own_prompt(done):
    """A baseline with identity 0 at prompt 0 and 1 at 1 has .25 at .25; an arm that has .5 there is .25 above it."""
    _, whole = done
    low, high, arm = (run.Arm(*of, "diffusers") for of in (("adapter", 0.5), ("adapter", 1.0), ("nothing", 1.0)))
    people = numpy.ones(12)
    columns = {
        one: {"prompt": x * people, "identity": y * people}
        for one, x, y in ((low, 0, 0), (high, 1, 1), (arm, 0.25, 0.5))
    }
    assert figures._over_curve(whole, columns, arm, high) == pytest.approx((0.25, 0.25, 0.25))
    assert figures._over_curve(whole, columns, low, high) is None
    columns[arm]["prompt"] = 2 * people  # where the curve does not come
    assert numpy.isnan(figures._over_curve(whole, columns, arm, high).value)
    columns[arm] = {"prompt": 0.25 * people, "identity": numpy.linspace(0, 1, 12)}
    value, below, above = figures._over_curve(whole, columns, arm, high)
    assert value == pytest.approx(0.25) and below < 0.25 < above and 0.2 < above - below < 0.6


def test_the_best_of_two_is_the_one_that_follows_the_prompt_better_and_takes_the_time_of_both(done):
    _, whole = done

    def of(method, job, what="seconds"):
        return whole.store.drawn[whole.key(method, job, 1.0, "diffusers")][what]

    def picture(method, job):
        return whole.store.picture(whole.key(method, job, 1.0, "diffusers"))

    def follows(path):
        return whole.measures["prompt"].score(Case(path, "", whole.prompts[0].text, path))

    for job in whole.jobs():
        both = [job, job.again(1)]
        assert of("best", job) == pytest.approx(sum(of("nothing", one) for one in both), abs=2e-3)
        if sys.platform == "linux":
            assert of("best", job, "memory") == max(of("nothing", one, "memory") for one in both)
        better = max((picture("nothing", one) for one in both), key=follows)
        with Image.open(picture("best", job)) as best, Image.open(better) as expected:
            assert best.tobytes() == expected.tobytes()


def test_people_have_noise_of_their_own_the_same_for_all_methods(done):
    _, whole = done
    one, other = (whole.jobs([person])[0] for person in whole.people[:2])
    assert one.noise_seed != other.noise_seed and one.again(0) == one and one.again(1).noise_seed != one.noise_seed


# --- what is refused, in a sentence


WORKFLOW = str(ROOT / "workflows" / "01 Face under a new prompt.json")
HOST_ALONE = {"backends": ["host"], "baseline": None}
BEST = {"kind": "best of", "pictures": 2, "by": {"kind": "prompt", "clip": "mini"}}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"methods": {"a": {"kind": "ipadapter"}}}, "methods.a.kind is 'ipadapter': use one of none, encoder"),
        ({"methods": {"a": {"kind": "encoder", "fil": "x"}}}, "methods.a: fil is no key"),
        ({"methods": {"a": {"kind": "encoder", "file": "no.safetensors"}}}, "file names no.safetensors, which is not"),
        ({"backends": ["comfy"]}, "backends names 'comfy': use host and diffusers"),
        ({"baseline": "other"}, "baseline is 'other'"),
        ({"kinds": ["material"]}, "kinds names 'material', and the prompts have photo"),
        ({"people": {"source": "nowhere"}}, "people.source is nowhere, which is no folder"),
        ({"measures": {"a": {"kind": "beauty"}}}, "measures.a.kind is 'beauty'"),
        (
            {"methods": {"a": {"kind": "encoder", "file": "mini_encoder.safetensors", "kv_end": 0.4}}},
            "methods.a: kv_end is 0.4, and diffusers injects KV up to the last step: name host in backends, or leave",
        ),
        (
            {"methods": {"a": {"kind": "none", "guidance": {"noise_guide": "mini_noise_guide.safetensors"}}}},
            "methods.a: guidance has a noise guide, and diffusers does not guide: name host in backends, or leave",
        ),
        (
            {"methods": {"a": {"kind": "none", "guidance": {"noise_guide": "no.safetensors"}}}},
            "methods.a: guidance.noise_guide names no.safetensors, which is not there",
        ),
        (
            {"methods": {"a": {"kind": "none", "guidance": {"noise_guide": "mini_encoder.safetensors"}}}},
            "methods.a: guidance.noise_guide: mini_encoder.safetensors is no noise guide",
        ),
        (
            {
                "methods": {
                    "a": {
                        "kind": "none",
                        "guidance": {"noise_guide": "mini_noise_guide.safetensors", "iterations": 3},
                    }
                }
            },
            "methods.a: guidance begins at 0.12 of the sampling, and the noise guide mini_noise_guide.safetensors was "
            "trained to act from 0.4 to 0.45: set guidance.start to 0.4, or leave",
        ),
        (
            {"methods": {"b": {"kind": "best of", "of": "x", "pictures": 2, "by": {}}}},
            "methods.b names 'x', which is no method",
        ),
        (
            {"methods": {"a": {"kind": "workflow", "file": "a.json", "guidance": {"preset": "quick"}}}, **HOST_ALONE},
            "methods.a: file names a.json, which is not there",
        ),
        (
            {"methods": {"a": {"kind": "workflow", "file": WORKFLOW, "guidance": {"preset": "quick"}}}, **HOST_ALONE},
            "methods.a: guidance cannot be put on top of a method of kind 'workflow'",
        ),
        (
            {"methods": {"a": {"kind": "none"}, "b": {**BEST, "of": "a", "guidance": {"preset": "quick"}}}},
            "methods.b: guidance cannot be put on top of a method of kind 'best of'",
        ),
        (
            {"methods": {"a": {"kind": "none", "weights": [0.5]}, "b": {**BEST, "of": "a"}}},
            "methods.b: weights has 1, at which a is not drawn: give some of its own, 0.5.",
        ),
        (
            {"methods": {"a": {"kind": "none"}, "b": {**BEST, "of": "a", "pictures": None}}},
            "methods.b: A method of kind `best of` takes one of pictures and same_time_as: give one.",
        ),
    ],
)
def test_a_protocol_that_cannot_be_run_is_refused_before_anything_is_drawn(tmp_path, changed, says):
    with pytest.raises((EvaluationError, ConfigError)) as error:
        evaluation(written(tmp_path, **changed))
    assert says in str(error.value) and not (tmp_path / "out" / "pictures").exists() or "people" in changed


def test_pictures_of_encoders_drawn_before_kv_could_end_are_found():
    """By what their digest has always been made of; an end is a part of it where one is given."""
    encoder = run.METHODS["encoder"]
    assert encoder(file="a").model_dump(mode="json", exclude={"title", "weights", "file"}) == {
        "guidance": None,
        "kv": None,
        "kv_weight": 1.0,
        "scales": {"text": 0.6, "full": 0.4, "kv": 0.4},
    }
    assert encoder(file="a", kv_end=0.4).model_dump(mode="json")["kv_end"] == 0.4


def test_an_encoder_whose_kv_ends_takes_less_work_and_the_host_draws_it():
    encoder = run.METHODS["encoder"]
    plain, ended, whole = (encoder(file="a", kv=kv, kv_end=end) for kv, end in ((False, 1), (None, 0.4), (None, 1)))
    rows = [method.work(30, {}).unet for method in (plain, ended, whole)]
    assert rows == [60, 60 + 4 * 12, 60 + 4 * 30]
    assert [method.drawn_by() for method in (ended, whole)] == [("host",), ("host", "diffusers")]


def test_a_prompt_list_in_another_encoding_says_where_and_what_to_do(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("a photo of a face in a café\n".encode("latin-1"))
    with pytest.raises(EvaluationError, match=r"is not in UTF-8 \(byte 0xe9 at place 26\): save it again as UTF-8"):
        evaluation(written(tmp_path, prompts=str(prompts)))
    prompts.write_text("\ufeffa photo of a face in a café\n\n  a comic\n", encoding="utf-8")
    listed = protocol.read_prompts(str(prompts))
    assert listed == {"prompt": ["a photo of a face in a café", "a comic"]}
    prompts.write_bytes("a face\u2028in oil\r\na face\x85in chalk\ra comic\n".encode())
    listed = protocol.read_prompts(str(prompts))
    assert listed == {"prompt": ["a face\u2028in oil", "a face\x85in chalk", "a comic"]}


def test_a_kind_of_prompts_that_is_there_twice_is_refused(tmp_path):
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("style: [a comic]\nplace: [on a beach]\nstyle: [an oil painting]\n")
    with pytest.raises(EvaluationError, match=r"prompts.yaml: style is there twice, in lines 1 and 3: leave one out\."):
        protocol.read_prompts(str(prompts))


def test_references_of_every_kind_that_is_read_are_people_and_others_are_said(tmp_path, capsys):
    """Grey of 16 bit keeps its values, and colours under full transparency do not count."""
    faces = tmp_path / "faces"
    faces.mkdir()
    colours = Image.new("RGB", (40, 40), (200, 40, 40))
    for ending in ("jfif", "JPE", "tif", "avif", "png"):
        colours.save(faces / f"{ending}.{ending}", {"jfif": "JPEG", "JPE": "JPEG"}.get(ending))
    Image.fromarray(numpy.full((40, 40), 30000, numpy.uint16)).save(faces / "deep.tif")
    hidden = Image.new("RGBA", (40, 40), (9, 99, 9, 0))
    hidden.save(faces / "hidden.webp", lossless=True, exact=True)
    (faces / "phone.HEIC").touch()
    (faces / "notes.txt").touch()
    found = {one.name: one for one in read_people(People(source=str(faces)), [], tmp_path / "references")}
    assert set(found) == {"jfif", "JPE", "tif", "avif", "png", "deep", "hidden"}
    said = capsys.readouterr().err
    assert "1 pictures are of kinds that are not read (1 .heic; phone.HEIC): save them as JPEG or PNG." in said

    assert count_people(People(source=str(faces))) == len(found)
    assert count_people(People(source=str(faces), first=2, count=3)) == 3
    colours.save(faces / "png.jpg")
    with pytest.raises(EvaluationError, match="holds png.jpg and png.png, which would be one person, png: give"):
        read_people(People(source=str(faces)), [], tmp_path / "references")
    (faces / "png.jpg").unlink()

    def shown(name):
        return numpy.asarray(Image.open(found[name].reference)).mean((0, 1)).round().tolist()

    assert shown("png") == shown("tif") == [200, 40, 40]
    assert shown("deep") == [117] * 3 and shown("hidden") == [255] * 3


def test_a_reference_without_a_face_is_named(tmp_path):
    faces = tmp_path / "faces"
    faces.mkdir()
    Image.new("RGB", (96, 96), (120, 120, 120)).save(faces / "wall.png")
    measures = {"identity": {"kind": "identity", "recogniser": "mini_face_recogniser.safetensors"}}
    changed = {"people": {"source": str(faces)}, "measures": measures}
    with pytest.raises(EvaluationError, match=r"No face was found in the reference wall \(measure identity\)"):
        evaluation(written(tmp_path, **changed))
    (faces / "notes.png").write_text("no picture")
    with pytest.raises(EvaluationError, match="The reference notes cannot be read as a picture"):
        evaluation(written(tmp_path, **changed))


def test_a_target_without_a_face_is_named_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "opened", lambda *a: pytest.fail("a back end was opened"))
    faces = tmp_path / "faces"
    one = evaluation(written(tmp_path)).people[0]
    (faces / "targets" / "anna").mkdir(parents=True)
    shutil.copy(one.reference, faces / "anna.png")
    Image.new("RGB", (96, 96), (120, 120, 120)).save(faces / "targets" / "anna" / "0.png")
    measures = {"target": {"kind": "identity of target", "recogniser": "mini_face_recogniser.safetensors"}}
    people = {"source": str(faces), "targets": str(faces / "targets")}
    with pytest.raises(EvaluationError, match=r"in the target 0.png of anna \(measure target\), so that nobody could"):
        evaluation(written(tmp_path, people=people, measures=measures)).draw()


def test_a_method_that_is_chosen_by_its_judge_or_guided_by_the_pack_is_warned_of(tmp_path):
    own = "mini_face_recogniser.safetensors"
    by = {"kind": "identity", "recogniser": own}
    methods = {"nothing": {"kind": "none"}, "best": {"kind": "best of", "of": "nothing", "pictures": 2, "by": by}}
    chosen = evaluation(written(tmp_path, methods=methods, measures={"identity": by}, baseline=None))
    (warning,) = chosen.warnings
    assert f"judges by {own}, by which methods.best was trained, is steered or chosen" in warning
    onnx = world_of(chosen.protocol).files.pack / "rec_mini.onnx"
    methods = {"guided": {"kind": "none", "guidance": {"preset": "quick"}}}
    measures = {"identity": {"kind": "identity", "recogniser": str(onnx)}}
    guided = evaluation(written(tmp_path, methods=methods, measures=measures, **HOST_ALONE))
    assert "methods.guided" in guided.warnings[0]


def test_how_many_fit_into_another_s_time_is_told_and_found_in_older_folders(tmp_path):
    """As it was reckoned, not guessed from the times: here they say nothing, and the count was 2."""
    methods = {
        "nothing": {"kind": "none"},
        "adapter": {"kind": "encoder", "file": "mini_ip_adapter_plus_face.safetensors"},
        "best": {**BEST, "pictures": None, "of": "nothing", "same_time_as": "adapter"},
    }
    path = written(tmp_path, methods=methods, people={"source": "drawn", "count": 1})
    one = evaluation(path)
    assert one.counts() == {}
    (job,) = one.jobs()
    one.store.keep(one.key("best", job, 1.0, "diffusers"), Image.new("RGB", (8, 8)), {"seconds": 1.0})
    (one.folder / "counts.json").write_text(json.dumps({"diffusers: nothing in the time of adapter": 2}))
    assert one.counts() == {"diffusers: nothing in the time of adapter": 2}
    pair = one.timed("nothing", "adapter", 1.0, "diffusers")
    one.store.count(one.count_key(*pair), lambda: 3)
    assert one.counts() == {"diffusers: nothing in the time of adapter": 3}
    assert evaluation(path, ["drawing.steps=3"]).counts() == {}


def test_what_begins_from_a_chosen_noise_has_no_change(tmp_path):
    method = run.METHODS["none"]
    chosen = [method(guidance=GuidanceOption(**given)) for given in ({"best_of": 4}, {"best_of": "quick"})]
    chosen.append(method(guidance=GuidanceOption(preset="best of 16")))
    assert not any(one.same_noise(50) for one in chosen)
    assert method().same_noise(50) and method(guidance=GuidanceOption(preset="quick")).same_noise(50)


def test_a_recogniser_that_is_the_loss_s_own_is_warned_of(tmp_path):
    methods = {"trained": {"kind": "encoder", "file": "mini_encoder.safetensors"}}
    judge = {"identity": {"kind": "identity", "recogniser": "mini_face_recogniser.safetensors"}}
    flattered = evaluation(written(tmp_path, methods=methods, measures=judge, baseline=None))
    (warning,) = flattered.warnings
    assert "measures.identity judges by mini_face_recogniser.safetensors" in warning and "methods.trained" in warning
    guided = {"guided": {"kind": "none", "guidance": {"noise_guide": "mini_noise_guide.safetensors"}}}
    by_the_guide = {"methods": guided, "measures": judge, "baseline": None, "backends": ["host"]}
    (warning,) = evaluation(written(tmp_path, **by_the_guide)).warnings
    assert "measures.identity judges by mini_face_recogniser.safetensors, by which methods.guided was" in warning
    fair = {"identity": {"kind": "identity", "recogniser": "mini"}}
    assert not evaluation(written(tmp_path, methods=methods, measures=fair, baseline=None)).warnings


def test_full_adds_to_the_file_and_needs_a_section(tmp_path):
    path = written(tmp_path)
    whole = protocol.load(path, full=True)
    assert whole.people.count == 5 and whole.people.source == "drawn"
    assert whole.methods["adapter"]["weights"] == [0.25] and "nothing" in whole.methods
    path.write_text(yaml.safe_dump({k: v for k, v in VALUES.items() if k != "full"}))
    with pytest.raises(ConfigError, match="has no section `full`"):
        protocol.load(path, full=True)


def test_a_count_is_the_one_that_was_found_first(tmp_path):
    assert EvaluationStore(tmp_path, 0).counted("a") is None
    assert EvaluationStore(tmp_path, 0).count("a", lambda: 7) == 7
    later = EvaluationStore(tmp_path, 1)
    assert later.count("a", lambda: 9) == later.counted("a") == 7 and later.count("b", lambda: 2) == 2
    assert {path.name for path in (tmp_path / "counts").iterdir()} == {"a.json", "b.json"}


def test_what_is_kept_under_a_prompt_with_a_line_separator_is_there_again(tmp_path):
    about = {"prompt": "a face\u2028in\x85oil"}
    EvaluationStore(tmp_path, 0).keep("a", Image.new("RGB", (8, 8)), about)
    EvaluationStore(tmp_path, 0).keep_score("b", 0.5, about)
    again = EvaluationStore(tmp_path, 0)
    assert again.drawn["a"]["prompt"] == about["prompt"] and again.scores == {"b": 0.5}


# --- the shipped protocols


@pytest.mark.parametrize("path", sorted(p for p in protocol.PROTOCOLS.glob("*.yaml") if p.name != "prompts.yaml"))
@pytest.mark.parametrize("full", [False, True])
def test_every_shipped_protocol_is_understood(path, full):
    if full and protocol.FULL not in yaml.safe_load(path.read_text(encoding="utf-8")):
        return
    settings = protocol.load(path, full=full)
    kinds = {**run.MEASURES, **__import__("lcm_lookahead.mini.judges", fromlist=["MEASURES"]).MEASURES}
    assert settings.parsed_methods() and settings.parsed_measures(kinds) and settings.prompt_list()
    methods = settings.parsed_methods()
    for method in methods.values():
        method.check_others(methods)
    assert settings.baseline is None or settings.baseline in settings.methods
    assert {settings.plot.x, settings.plot.y} <= settings.measures.keys()


@pytest.mark.parametrize(
    ("table", "files", "arms", "pictures"),
    [("sdxl_table1.yaml", 12, 9, 27000), ("sdxl_table2.yaml", 18, 13, 19500)],
)
def test_the_dry_run_of_a_table_of_the_paper_says_what_it_costs_as_the_page_shows_it(
    capsys, table, files, arms, pictures
):
    main.main(["evaluate", table, "--dry-run"])
    said = capsys.readouterr().out.splitlines()
    assert sum("MISSING" in line for line in said) == files
    assert f"  lookahead evaluate {table} --worker 0/4   (and 1/4, 2/4, 3/4: on as many GPUs)" in said
    rows = [re.fullmatch(r"  (.+?) +(\d+) +(\d+) +[\d.]+", line) for line in said]
    drawn = [(int(row[2]), int(row[3])) for row in rows if row and not row[1].startswith("in all")]
    assert [sum(column) for column in zip(*drawn, strict=True)] == [arms, pictures]
    page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    (shown,) = re.findall(rf"^\$ lookahead evaluate {table} --dry-run\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    told = [line for line in shown.splitlines() if line.strip() not in ("", "...")]
    assert len(told) > 10 and not [line for line in told if line not in said]


def test_the_work_of_real_sdxl_is_that_of_its_layers():
    unet, decoder = cost.work_of_a_pass(1024)
    # As published, SDXL's UNet takes 2.99 T multiply-adds a row at 1024 pixels, without those of attention itself:
    # twice 2 N^2 C in ten blocks of 640 channels on 64^2 places and sixty of 1280 on 32^2.
    attention = 4 * (10 * 640 * 4096**2 + 60 * 1280 * 1024**2)
    assert unet == pytest.approx(2 * 2.99e12 + attention, rel=0.01) and decoder > 1e12
    assert cost.work_of_a_pass(512)[0] < unet / 3.5
    with pytest.raises(EvaluationError, match="--card is gtx, and known are"):
        settings = protocol.load(protocol.PROTOCOLS / "sdxl_table1.yaml")
        cost.text(settings, cost.cost(settings, library_of(settings), 3), "", "gtx")


def test_a_shipped_protocol_is_found_by_its_name(tmp_path):
    assert command._found("mini.yaml").is_file() and command._found("/no/mini.yaml").parent.name == "no"
    assert opening.NAMES == ("host", "diffusers")
