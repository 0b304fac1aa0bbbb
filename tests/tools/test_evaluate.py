"""What `make evaluate` refuses before anything is drawn."""

import importlib

import pytest
from lcm_lookahead.mini.studies.evaluate import PEOPLE, evaluate
from lcm_lookahead.tools.common import Problem

MODULES = {"presets": "guidance", "null-text": "null_text", "reference-presets": "reference_presets"}


@pytest.mark.parametrize("references", [0, 9])
def test_too_few_people_for_intervals_are_refused(tmp_path, references):
    with pytest.raises(Problem, match=f"--references is {references}, too few"):
        evaluate("reference", tmp_path, references)


@pytest.mark.parametrize(("study", "first"), [("knobs", 1), ("encoders", -1)])
def test_the_first_of_the_people_is_for_encoders_alone(tmp_path, study, first):
    with pytest.raises(Problem, match=f"--first is {first}"):
        evaluate(study, tmp_path, first=first)


@pytest.mark.parametrize("study", PEOPLE)
def test_the_folder_of_a_study_is_there_before_hours_of_drawing(study, tmp_path, monkeypatch):
    out, seen = tmp_path / "new" / "docs", []
    module = importlib.import_module(f"lcm_lookahead.mini.studies.{MODULES.get(study, study)}")
    function = "evaluate_presets" if study == "presets" else "evaluate"
    monkeypatch.setattr(module, function, lambda *_: seen.append(out.is_dir()))
    evaluate(study, out)
    assert seen == [True]
