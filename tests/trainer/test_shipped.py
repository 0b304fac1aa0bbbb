"""The table of the shipped files: what is exported, what the manifest keeps, what `lookahead mini sizes` prints."""

import hashlib
import json

import torch
from lcm_lookahead.cli import main
from lcm_lookahead.mini.files import shipped, weights
from lcm_lookahead.mini.stages import stage


def finished(folder, name, steps, **tensors):
    stage.write_tensors(folder / f"{name}.safetensors", tensors)
    (folder / f"{name}.jsonl").write_text(json.dumps({"step": 50}) + "\n" + json.dumps({"step": steps}) + "\n")


def test_what_is_done_is_exported_and_what_is_not_is_named(tmp_path, capsys):
    build, out = tmp_path / "build", tmp_path / "weights"
    build.mkdir()
    finished(build, "style_scorer", 1000, a=torch.ones(3, 4), n=torch.tensor(1))
    assert weights.export(build, out) == [weights.STYLE_SCORER]
    assert f"{weights.CLIP_VISION}: not written, the build has no image_encoder" in capsys.readouterr().out
    (entry,) = shipped.manifest(out)
    content = (out / weights.STYLE_SCORER).read_bytes()
    assert entry["sha256"] == hashlib.sha256(content).hexdigest() and entry["bytes"] == len(content)
    assert entry["parameters"] == 13 and entry["stages"] == {"style_scorer": 1000}
    assert stage.read_tensors(out / weights.STYLE_SCORER)["a"].dtype == torch.float16


def test_a_later_export_keeps_what_the_manifest_says_of_other_files(tmp_path):
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "weights"
    for folder in (first, second):
        folder.mkdir()
    finished(first, "style_scorer", 1000, a=torch.ones(3))
    finished(second, "image_encoder", 700, a=torch.ones(5))
    weights.export(first, out)
    weights.export(second, out)
    steps = {entry["file"]: entry["stages"] for entry in shipped.manifest(out)}
    assert steps == {weights.CLIP_VISION: {"image_encoder": 700}, weights.STYLE_SCORER: {"style_scorer": 1000}}


def test_a_file_that_is_no_safetensors_is_copied_as_it_is(tmp_path):
    build, out = tmp_path / "build", tmp_path / "weights"
    build.mkdir()
    finished(build, "clip", 10, a=torch.ones(3))
    (build / "clip_config.json").write_text("{}")
    assert "mini_clip/config.json" in weights.export(build, out)
    assert (out / "mini_clip" / "config.json").read_text() == "{}"


def test_every_planned_file_has_one_line_and_a_name_of_its_own_in_the_host():
    table = shipped.table()
    assert len({line.file for line in table}) == len(table)
    models = [line.model for line in table if line.model]
    assert len(set(models)) == len(models)


def test_the_sizes_command_prints_every_planned_file_and_their_sum(capsys):
    main.main(["mini", "sizes"])
    printed = capsys.readouterr().out
    for line in shipped.table():
        assert line.file in printed
    assert f"{sum(line.bytes for line in shipped.table()) / 1e6:.2f} MB" in printed.splitlines()[-1]
