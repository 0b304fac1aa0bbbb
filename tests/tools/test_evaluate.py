"""What `make evaluate` refuses before anything is drawn."""

import pytest
from lcm_lookahead.mini.studies.evaluate import evaluate
from lcm_lookahead.tools.common import Problem


@pytest.mark.parametrize("references", [0, 9])
def test_too_few_people_for_intervals_are_refused(tmp_path, references):
    with pytest.raises(Problem, match=f"--references is {references}, too few"):
        evaluate("reference", tmp_path, references)


@pytest.mark.parametrize(("study", "first"), [("knobs", 1), ("encoders", -1)])
def test_the_first_of_the_people_is_for_encoders_alone(tmp_path, study, first):
    with pytest.raises(Problem, match=f"--first is {first}"):
        evaluate(study, tmp_path, first=first)
