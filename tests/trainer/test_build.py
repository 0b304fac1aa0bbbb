"""The mini world's build: every stage runs, a second call does nothing again, and the files are the public ones."""

import dataclasses
import functools
import hashlib
import importlib
import json
import pkgutil

import pytest
import torch
from lcm_lookahead.cli import main
from lcm_lookahead.lookahead.files import encoder_file
from lcm_lookahead.mini import build as build_module
from lcm_lookahead.mini import stages as stages_of_build
from lcm_lookahead.mini.build import build, stages
from lcm_lookahead.mini.files import derived, models, shipped, weights
from lcm_lookahead.mini.plan import QUICK
from lcm_lookahead.mini.report import gate, measure, measure_faces, measure_few_step, page, report
from lcm_lookahead.mini.stages import base, detector, stage, style_lora, things
from lcm_lookahead.mini.world.things import CLASSES
from lcm_lookahead.sdxl import lora
from markupsafe import escape
from PIL import Image
from safetensors import safe_open

TINY = dataclasses.replace(
    QUICK,
    styles=("photo", "comic"),
    report_people=4,
    report_samples=1,
    report_photos=2,
    report_captions=4,
    report_references=8,
    report_prompts=2,
    **{f.name: 2 for f in dataclasses.fields(QUICK) if f.name.endswith("_steps")},
    **{name: 8 for name in ("people", "portraits", "evaluation_people", "things", "judged_things", "scored_people")},
    things_faces=2,
    held_out_people=40,
)


def contents(path):
    """Metadata and a hash of every tensor: the order of metadata in a safetensors file changes from write to write."""
    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}
        return file.metadata(), {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in tensors.items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a tiny build, in batches of two and of few pictures, whose report was left out: measuring takes
    longer than all."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for module in pkgutil.iter_modules(stages_of_build.__path__):
            code = importlib.import_module(f"{stages_of_build.__name__}.{module.name}")
            if hasattr(code, "BATCH") and code is not detector:  # whose batch is made of three parts
                patch.setattr(code, "BATCH", 2)
        patch.setattr(things, "FACES", 1)
        patch.setattr(style_lora, "SHOTS", 4)
        patch.setattr(detector, "source", functools.partial(detector.source, empty=50))
        patch.setattr(report, "report", lambda folder, plan, to: "not written")
        build(folder, TINY, export_to=folder / "weights")
    return folder


def files_of(folder):
    listed = [entry["file"] for entry in shipped.manifest(folder / "weights")]
    return {name: contents(folder / "weights" / name) for name in listed if name.endswith(".safetensors")}


def test_a_tiny_build_makes_every_file_and_a_second_call_changes_none(built, monkeypatch, capsys):
    files = files_of(built)
    assert set(files) >= {weights.CHECKPOINT, weights.CLIP_VISION, weights.IMAGE_PROMPT}
    assert not list(built.glob("*.state")) and not list(built.rglob("*.part"))
    read = encoder_file.read(built / "weights" / weights.IMAGE_PROMPT)
    assert len(read.ip_adapter) == 17
    with safe_open(built / "weights" / weights.CHECKPOINT, "pt") as checkpoint:
        assert checkpoint.get_tensor("first_stage_model.vae_scale").dtype == torch.float16
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(report, "report", lambda folder, plan, to: "not written")
    build(built, TINY, export_to=built / "weights")
    assert capsys.readouterr().out.count("done before") == len(stages(built, TINY))
    assert files_of(built) == files


@pytest.mark.slow
def test_the_report_of_a_tiny_build_measures_everything_once(built, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(measure, "STEPS", 2)
    monkeypatch.setattr(measure_faces, "EMPTY", 4)
    monkeypatch.setattr(measure_few_step, "DDIM_STEPS", 8)
    build(built, TINY, export_to=built / "weights")
    check_report(built)
    capsys.readouterr()
    build(built, TINY, export_to=built / "weights")
    assert "report: " not in capsys.readouterr().out, "something was measured twice"


def check_report(folder):
    """Everything was measured, and the page shows each figure, each interval and each shipped file's hash."""
    made, shown = json.loads((folder / "report.json").read_text()), (folder / "report.html").read_text()
    assert set(made["measures"]) == set(report.MEASURES)
    for m in made["measures"].values():
        assert "missing" not in m, m
        assert f"<h3>{m['title']}</h3>" in shown and m["figures"]
        for name, figure in m["figures"].items():
            assert escape(name) in shown
            assert all(escape(text) in shown for text in page._value(figure))
    listed = shipped.manifest(folder / "weights")
    assert len(listed) == len(shipped.table()) and all(entry["sha256"] in shown for entry in listed)
    assert set(made["stages"]) == set(stages(folder, TINY))
    assert "Not drawn yet" not in shown and "nothing to draw" not in shown


def test_a_stage_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    with pytest.raises(SystemExit, match="no stage 'vea'.*vae, base"):
        build(tmp_path, TINY, only=["vea"])


@pytest.mark.parametrize(("extra", "folder"), [([], ".mini"), (["--quick"], ".mini-quick")])
def test_builds_of_the_two_plans_have_folders_of_their_own(tmp_path, monkeypatch, capsys, extra, folder):
    monkeypatch.chdir(tmp_path)
    for name, value in build_module._KEEP_MEMORY.items():  # else the command would start this process anew
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="no stage 'vea'"):
        main.main(["mini", "build", "--only", "vea", *extra])
    assert [p.name for p in tmp_path.iterdir()] == [folder]


def test_the_sheet_command_draws_a_row_a_person(tmp_path):
    main.main(["mini", "sheet", "--people", "2", "--out", str(tmp_path / "sheet.png")])
    assert Image.open(tmp_path / "sheet.png").size == (8 * 128, 2 * 128)


def test_what_the_base_learnt_of_things_is_merged_into_a_copy(built, tmp_path):
    made, own = built / "things_lora.safetensors", built / "weights"
    derived.write_things_base(made, tmp_path / "things", own)
    merged, before, learnt = models.load(tmp_path / "things"), models.load(own), stage.read_tensors(made)
    ids = learnt["words.ids"].long()
    for name, rows in zip(things.TABLES, (learnt["words.clip_l"], learnt["words.clip_g"]), strict=True):
        table, old = merged.text.get_parameter(name), before.text.get_parameter(name)
        assert torch.allclose(table[ids], rows, atol=1e-3) and not torch.allclose(old[ids], rows, atol=1e-3)
        rest = torch.ones(len(old), dtype=torch.bool).index_fill(0, ids, False)
        assert torch.equal(table[rest], old[rest])
    g = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 77, 64, generator=g)
    text = base.condition(context, torch.randn(1, 32, generator=g))
    lora.load({k: v for k, v in learnt.items() if k.startswith(lora.PREFIX)}, before.unet).attach(before.unet)
    with torch.no_grad():
        beside, inside = (base.predict(m.unet, x, torch.tensor([500]), text) for m in (before, merged))
    assert (beside - inside).square().mean().sqrt() < 2e-3 * beside.square().mean().sqrt()  # of 16 bit


def test_the_gate_asks_the_judge_of_every_class_and_draws_a_sheet(built, tmp_path):
    files = (built / f"{name}.safetensors" for name in ("things_lora", "things_judge"))
    named = gate.check(*files, samples=1, sheet=tmp_path / "sheet.png", steps=2)
    assert list(named) == list(CLASSES) and min(named.values()) < gate.GATE, "two steps of training draw no things"
    assert Image.open(tmp_path / "sheet.png").size == (128, 10 * 128)


def test_things_that_are_not_trained_yet_are_asked_for_by_their_command(tmp_path):
    with pytest.raises(SystemExit, match="lookahead mini build --only things_lora"):
        main.main(["mini", "things", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match="lookahead mini build --only things_lora"):
        main.main(["mini", "gate", "--folder", str(tmp_path)])
