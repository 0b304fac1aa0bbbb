"""What a protocol is given: what is refused or warned of before anything is drawn, what is found in older folders."""

import json
import shutil

import numpy
import pytest
import yaml
from lcm_lookahead.cli.world import world_of
from lcm_lookahead.evaluation.harness import protocol, run
from lcm_lookahead.evaluation.harness.library import EvaluationError, Library
from lcm_lookahead.evaluation.harness.methods import GuidanceOption
from lcm_lookahead.evaluation.harness.people import count_people, read_people
from lcm_lookahead.evaluation.harness.sections import People
from lcm_lookahead.evaluation.harness.store import EvaluationStore
from lcm_lookahead.tools.common import ROOT
from lcm_lookahead.trainer.config import ConfigError
from PIL import Image
from small_evaluation import VALUES, evaluation, written

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
    # Also where all is drawn, and targets come later.
    plain = evaluation(written(tmp_path, people=people, measures={"prompt": VALUES["measures"]["prompt"]}))
    for arm in plain.all_arms():
        for job in plain.jobs():
            plain.store.keep(plain.key(arm.method, job, arm.weight, arm.backend), Image.new("RGB", (8, 8)), {})
    with pytest.raises(EvaluationError, match="in the target 0.png of anna"):
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
    """As it was reckoned, not guessed from the times, which say nothing here: the count was 2, and stays 2 for pictures
    that are still to be drawn."""
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
    timed = ("nothing", "adapter", 1.0)
    assert run._Desk(one, None, "diffusers").count_in_the_time_of(*timed) == 2
    one.store.count(one.count_key(*one.timed(*timed, "diffusers")), lambda: 3)
    assert run._Desk(one, None, "diffusers").count_in_the_time_of(*timed) == 2 == min(one.counts().values())
    (one.folder / "counts.json").unlink()
    assert run._Desk(one, None, "diffusers").count_in_the_time_of(*timed) == 3 == min(one.counts().values())
    other = evaluation(path, ["drawing.steps=3"])
    assert other.counts() == {}
    with pytest.raises(EvaluationError, match="There is no time of nothing or adapter yet"):
        run._Desk(other, None, "diffusers").count_in_the_time_of(*timed)


def test_what_begins_from_a_chosen_noise_has_no_change(tmp_path):
    method = run.METHODS["none"]
    chosen = [method(guidance=GuidanceOption(**given)) for given in ({"best_of": 4}, {"best_of": "quick"})]
    chosen.append(method(guidance=GuidanceOption(preset="best of 16")))
    assert not any(one.same_noise(50) for one in chosen)
    # As many as a preset's evaluations buy: more in a run of more steps, where it guides each of them.
    dps = method(guidance=GuidanceOption(best_of="DPS"))
    assert dps.digest(Library(), 50) != dps.digest(Library(), 20)
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
