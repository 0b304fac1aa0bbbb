"""The report: what is measured stands on the page with its interval, what is missing is said, nothing is done twice."""

import hashlib
import json
import re

import pytest
import torch
from lcm_lookahead.cli import main
from lcm_lookahead.evaluation.stats import Interval
from lcm_lookahead.mini.files import shipped
from lcm_lookahead.mini.plan import QUICK
from lcm_lookahead.mini.report import measure, page, report
from lcm_lookahead.mini.report.measure import Measurement
from lcm_lookahead.mini.stages import stage
from lcm_lookahead.mini.world import data
from lcm_lookahead.mini.world.faces import IDENTITY_SIZE, identity_vector, sample_identities, skin_class

SECTIONS = ("What is asked", "Files", "Training", "Pictures", "Curves", "All figures", "Made with")


@pytest.fixture
def counted(monkeypatch):
    """Two measures in place of all: of a stage that is done, and of one that is not. The list of runs."""
    runs = []

    def run(folder, plan, weights):
        runs.append("done")
        figures = {"identity similarity": Interval(0.961, 0.942, 0.973), "noise": Interval(float("nan"), 0.0, 1.0)}
        return Measurement(figures | {"a limit": 7.5}, "12 pictures", {"by weight": [[0.0, 0.5, 0.4, 0.6]]})

    entries = {name: report.Measure(m.title, ("never",), run) for name, m in report.MEASURES.items()}
    monkeypatch.setattr(report, "MEASURES", entries | {"vae": report.Measure("Autoencoder", ("vae",), run)})
    return runs


@pytest.fixture
def folder(tmp_path):
    stage.write_tensors(tmp_path / "vae.safetensors", {"a": torch.ones(2)})
    lines = [{"step": s, "loss": 1 / s, "seconds_per_step": 0.5} for s in (50, 100, 150, 120, 170)]
    (tmp_path / "vae.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_page_holds_every_section_figure_and_interval_and_says_what_is_missing(folder, counted):
    page = report.report(folder, QUICK, folder / "weights").read_text()
    assert all(f"<h2>{s}" in page for s in SECTIONS)
    assert ">0.961</td>" in page and "[0.942, 0.973]" in page
    assert page.count("Not measured: the build has no never yet.") == len(report.MEASURES) - 1
    assert "NaN" not in (folder / "report.json").read_text()
    assert not re.search(r"<script|https?://(?!www\.w3\.org)|src=\"(?!data:)", page), "the page needs something else"
    assert "0.961" in (folder / "report.md").read_text()


def test_a_threshold_is_met_not_met_or_not_measured(folder, counted):
    rows = {r["claim"]: r for r in report.collect(folder, QUICK, folder / "weights")["claims"]}
    kept = rows["autoencoder keeps who it is"]
    assert kept["met"] and page._verdict(kept) == "met; the interval reaches below"
    assert rows["all files under 75 MB"]["met"] is None, "decided without the files"
    assert page._verdict(rows["base draws the style"]) == "not measured"
    low = kept | {"met": False}
    assert page._verdict(low) == "not met"


def test_what_has_not_changed_is_not_measured_again(folder, counted):
    for _ in range(2):
        report.collect(folder, QUICK, folder / "weights")
    assert counted == ["done"]
    stage.write_tensors(folder / "vae.safetensors", {"a": torch.zeros(2)})
    report.collect(folder, QUICK, folder / "weights")
    assert counted == ["done"] * 2


def test_a_measure_whose_library_is_missing_is_a_sentence(folder, counted, monkeypatch):
    def run(folder, plan, weights):
        raise ModuleNotFoundError("No module named 'insightface'")

    monkeypatch.setitem(report.MEASURES, "faces", report.Measure("Faces", ("vae",), run))
    page = report.report(folder, QUICK, folder / "weights").read_text()
    assert "Not measured: No module named &#39;insightface&#39;." in page


def test_a_measure_that_fails_is_named_and_tried_again(folder, counted, monkeypatch, capsys):
    def run(folder, plan, weights):
        counted.append("failed")
        raise ValueError("one reference is too few")

    monkeypatch.setitem(report.MEASURES, "faces", report.Measure("Faces", ("vae",), run))
    for _ in range(2):
        page = report.report(folder, QUICK, folder / "weights").read_text()
    assert "Not measured: it failed with ValueError: one reference is too few." in page
    assert counted.count("failed") == 2 and "Traceback" in capsys.readouterr().err


def test_a_log_of_a_stage_that_was_stopped_counts_the_time_of_both_runs(folder):
    log = report._log(folder / "vae.jsonl")
    assert [step for step, _ in log["losses"]] == [50, 100, 120, 150, 170]
    assert log["steps"] == 170 and log["minutes"] == pytest.approx((150 + 50 + 50) * 0.5 / 60)


def test_a_file_that_is_not_what_the_manifest_says_is_named(folder, counted):
    weights = folder / "weights"
    for name in ("mini_clip_vision.safetensors", "mini_style_lora.safetensors"):
        stage.write_tensors(weights / name, {"a": torch.ones(3)})
    shipped.write_manifest(folder, weights)
    stage.write_tensors(weights / "mini_style_lora.safetensors", {"a": torch.zeros(3)})
    page = report.report(folder, QUICK, weights).read_text()
    digest = hashlib.sha256((weights / "mini_clip_vision.safetensors").read_bytes()).hexdigest()
    assert digest in page
    assert page.count("the file is missing or has another hash") == 1
    made = json.loads((folder / "report.json").read_text())
    (hashes,) = [r for r in made["claims"] if "by hash" in r["claim"]]
    assert hashes["met"] is False and hashes["name"].startswith("different: mini_style_lora.safetensors; not there: ")
    assert [f["file"] for f in made["files"] if f["same"]] == ["mini_clip_vision.safetensors"]


def test_attributes_are_read_back_from_the_vector_that_people_are_drawn_with():
    people = sample_identities(50, torch.Generator().manual_seed(0))
    vector = identity_vector(people)
    assert vector.shape[1] == IDENTITY_SIZE
    said = measure.read_attributes(vector)
    assert set(said) == {"skin", *measure.READ}
    assert all(torch.equal(said[name], people[name]) for name in measure.READ)
    assert torch.equal(said["skin"], skin_class(people))
    assert set(said) <= {*data.ATTRIBUTES, "skin"}


def test_the_roc_curve_rises_and_encloses_the_auc():
    numbers = torch.Generator().manual_seed(0)
    own, other = torch.randn(500, generator=numbers) + 2, torch.randn(4000, generator=numbers)
    points = torch.tensor(measure.roc(own, other, points=400))
    assert (points.diff(dim=0) >= -1e-9).all() and points[-1].tolist() == [1, 1]
    area = torch.trapezoid(points[:, 1], points[:, 0]).item()
    expected = (own[:, None] > other[None]).double().mean().item()
    assert area == pytest.approx(expected, abs=0.01)


def test_the_report_command_names_a_folder_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main.main(["mini", "report", "--folder", str(tmp_path / "nowhere")])
    assert "there is no folder" in capsys.readouterr().err
