"""Claims judged by figures: which side of a bound an interval is on, and what is missing."""

import json

import pytest
from lcm_lookahead.cli.main import main
from lcm_lookahead.evaluation import claims
from lcm_lookahead.trainer.config import CONFIGS
from lcm_lookahead.trainer.lookahead.config import load

LIST = """
guided:
  title: Guided
  paper: figure 5
  says: It rises.
  published: a tenth
  steps: [{run: mini sizes, makes: sizes.txt}]
  checks:
    - {says: above, figure: [figures.json, arm, gain], above: 0}
    - {says: below, figure: [figures.json, arm, loss], below: -0.05}
  pages: [page.md]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "claims.yaml").write_text(LIST)
    (tmp_path / "page.md").write_text("# Page\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def figures(folder, **arm):
    (folder / "figures.json").write_text(json.dumps({"arm": arm}))


def verdicts(folder):
    (one,) = claims.judged(claims.read(folder / "claims.yaml"), folder)
    return [result.verdict for result in one.results], one.verdict


@pytest.mark.parametrize(
    ("gain", "loss", "expected", "together"),
    [
        ([0.2, 0.1, 0.3], [-0.1, -0.2, -0.06], ["shown", "shown"], "shown"),
        ([0.2, 0.1, 0.3], [-0.1, -0.2, -0.04], ["shown", "not shown"], "in part"),
        ([0.2, 0.0, 0.3], [-0.01, -0.02, 0.01], ["not shown", "contrary"], "contrary"),
        ([-0.2, -0.3, -0.1], {"value": -0.1, "low": -0.2, "high": 0.0}, ["contrary", "not shown"], "contrary"),
    ],
)
def test_a_check_is_shown_where_its_whole_interval_is_beyond_the_bound(folder, gain, loss, expected, together):
    figures(folder, gain=gain, loss=loss)
    assert verdicts(folder) == (expected, together)


def test_without_figures_nothing_is_judged(folder):
    assert verdicts(folder) == (["not measured"] * 2, "not measured")
    (folder / "figures.json").write_text(json.dumps({"another arm": {"gain": [0.2, 0.1, 0.3]}}))
    assert verdicts(folder) == (["not measured"] * 2, "not measured")


@pytest.mark.parametrize(
    ("arm", "says"),
    [({"gain": [1, 2, 3]}, "arm / loss"), ({"gain": [1, 2, 3], "loss": [1, 2]}, "no interval"), ({}, "arm / gain")],
)
def test_a_figure_that_is_not_there_is_named(folder, arm, says):
    figures(folder, **arm)
    with pytest.raises(claims.ClaimError, match=says):
        verdicts(folder)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("above: 0}", "above: 0, below: 0}", "one of above and below"),
        ("figures.json, arm, gain", "figures.json", "figure"),
        ("title: Guided", "titel: Guided", "titel|title"),
        ("guided:", "[guided", "cannot be read"),
        (
            "pages: [page.md]",
            "pages: [page.md]\n  note: a\n  note: b",
            r"note is there twice, in lines \d+ and \d+: leave",
        ),
    ],
)
def test_a_list_that_says_something_else_is_refused(folder, before, after, says):
    (folder / "claims.yaml").write_text(LIST.replace(before, after))
    with pytest.raises(claims.ClaimError, match=says):
        claims.read(folder / "claims.yaml")


TRAINED = """
trained:
  title: Trained
  paper: table 2
  says: It rises.
  published: a tenth
  steps:
    - {run: train one.yaml, makes: one.safetensors}
    - {run: train two.yaml, makes: two.safetensors}
    - {run: evaluate --encoders, makes: figures.json}
  checks:
    - {says: above, figure: [figures.json, arm, gain], above: 0}
    - {says: below, figure: [figures.json, other arm, loss], below: 0}
"""
WHOLE = {"arm": {"gain": [0.2, 0.1, 0.3]}, "other arm": {"loss": [-0.2, -0.3, -0.1]}}


@pytest.fixture
def trained(folder):
    """Two claims that share their steps, and what running them asks for and writes."""
    (folder / "claims.yaml").write_text(TRAINED)
    (one,) = claims.read(folder / "claims.yaml").values()
    asked = []

    def run(arguments):
        asked.append(" ".join(arguments))
        for step in one.steps:
            if step.command() == arguments:
                (folder / step.makes).write_text(json.dumps(WHOLE))

    return {"one": one, "two": one}, run, asked


def test_only_what_is_missing_is_run_and_a_shared_command_once(folder, trained):
    listed, run, asked = trained
    (folder / "two.safetensors").write_text("trained")
    assert claims.run_missing(listed, folder, run) == 2 and asked == ["train one.yaml", "evaluate --encoders"]
    assert claims.run_missing(listed, folder, run) == 0 and len(asked) == 2


def test_a_claim_whose_figures_are_there_trains_nothing_again(folder, trained):
    listed, run, asked = trained
    (folder / "figures.json").write_text(json.dumps(WHOLE))
    assert claims.run_missing(listed, folder, run) == 0 and not asked


@pytest.mark.parametrize("lacks", [{"arm": WHOLE["arm"]}, {**WHOLE, "other arm": {"gain": [0.2, 0.1, 0.3]}}])
def test_a_figure_that_its_file_lacks_is_measured_again_by_what_makes_the_file(folder, trained, lacks):
    listed, run, asked = trained
    for name in ("one.safetensors", "two.safetensors"):
        (folder / name).write_text("trained")
    (folder / "figures.json").write_text(json.dumps(lacks))
    assert claims.run_missing(listed, folder, run) == 1 and asked == ["evaluate --encoders"]
    assert claims.judged(listed, folder)[0].verdict == "shown"


def test_a_command_that_does_not_make_what_the_list_says_is_named(folder, trained):
    listed, _, _ = trained
    with pytest.raises(claims.ClaimError, match=r"lookahead train one\.yaml has ended without writing one\.saf"):
        claims.run_missing(listed, folder, lambda arguments: None)
    for name in ("one.safetensors", "two.safetensors"):
        (folder / name).write_text("trained")
    (folder / "figures.json").write_text(json.dumps({"arm": WHOLE["arm"]}))
    with pytest.raises(claims.ClaimError, match=r"without writing the figure other arm / loss into figures\.json"):
        claims.run_missing(listed, folder, lambda arguments: None)


def test_the_command_judges_runs_and_writes_a_page(folder, capfd):
    def command(*arguments):
        code = 0
        try:
            main(["claims", *arguments, "--file", "claims.yaml"])
        except SystemExit as end:
            code = end.code
        return code, capfd.readouterr().out

    assert "no claim" in command("other")[0]
    code, printed = command("--run", "--out", "evidence.md")
    assert "mini_sdxl.safetensors" in printed and "without writing sizes.txt" in code
    assert not (folder / "evidence.md").exists()
    figures(folder, gain=[0.2, 0.1, 0.3], loss=[-0.1, -0.2, -0.06])
    assert command("guided")[1].split()[:3] == ["guided", "shown", "2"]
    assert "Written" in command("--run", "--out", "evidence.md")[1]
    page = (folder / "evidence.md").read_text()
    assert "| above | above 0 | 0.200 [0.100, 0.300] | shown |" in page and "(page.md)" in page
    assert "    lookahead mini sizes\n" in page


def test_the_papers_claims_read_figures_that_are_there(request):
    results = {one.name: one.results for one in claims.judged(claims.read(), request.config.rootpath)}
    assert results.keys() >= {"previews", "guidance", "table1", "table2", "alignment"}
    measured = [result for name in ("previews", "guidance", "table2") for result in results[name]]
    assert measured and all(result.verdict != "not measured" for result in measured)


def test_the_papers_claims_that_are_measured_train_nothing_again(request):
    """Encoders are not kept in the repository, their figures are."""
    measured = claims.chosen(claims.read(), ["previews", "guidance", "table2", "table1"])
    asked = []
    assert claims.run_missing(measured, request.config.rootpath, asked.append) == 0 and not asked


def test_every_figure_of_the_papers_claims_is_made_by_a_step_of_its_claim():
    for name, claim in claims.read().items():
        assert {check.figure[0] for check in claim.checks} <= {step.makes for step in claim.steps}, name


def test_a_training_of_a_claim_makes_the_file_that_the_evaluation_reads():
    for claim in claims.read().values():
        trained = {}
        for step in claim.steps:
            command, *arguments = step.command()
            if command == "train":
                config = load(CONFIGS / arguments[0], arguments[1:])
                trained[f"{config.out}/{config.name}.safetensors"] = step.makes
            elif "--encoders" in arguments:
                assert {a.partition("=")[2] for a in arguments if "=" in a} <= trained.keys()
        assert all(file == makes for file, makes in trained.items())
