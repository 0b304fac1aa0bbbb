"""`lookahead evaluate PROTOCOL.yaml` in diffusers on the mini world: what it writes, resumes and refuses."""

import csv
import json
import re
import sys
from pathlib import Path

import numpy
import pytest
import yaml
from lcm_lookahead.cli import evaluate as command
from lcm_lookahead.cli import main
from lcm_lookahead.cli.world import library_of
from lcm_lookahead.evaluation import preference
from lcm_lookahead.evaluation.harness import cost, figures, opening, protocol, report, run
from lcm_lookahead.evaluation.harness.library import EvaluationError
from lcm_lookahead.evaluation.harness.measures import Case
from lcm_lookahead.tools.common import ROOT
from PIL import Image
from small_evaluation import evaluation, written


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
        assert float(line["identity: identity (mini judge)"]) == pytest.approx(measured, abs=1e-6)
        assert line["prompt: prompt (style, mini scorer)"] in ("0.0", "1.0")
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
