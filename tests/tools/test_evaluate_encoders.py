"""The comparison of trained encoders: what is drawn, what is drawn no more, and how gains are reckoned."""

import pytest
import torch
from lcm_lookahead.mini.plan import WEIGHTS
from lcm_lookahead.mini.studies import encoders as tool
from lcm_lookahead.tools.common import Problem

STOCK = WEIGHTS / "mini_ip_adapter_plus_face.safetensors"
RUN = tool.TrainedEncoder(STOCK)


def test_files_of_one_name_are_runs_of_one_arm():
    files = tool.parse([f"a={STOCK}", f"b={STOCK}@1.25", f"a={STOCK}"])
    assert files == {"a": [RUN, RUN], "b": [tool.TrainedEncoder(STOCK, 1.25)]}
    arms, names = tool.arms_of(files)
    assert [*arms] == [*tool.BASELINES, "a, run 1", "a, run 2", "b, run 1"]
    assert names == {"a 0.safetensors": STOCK, "a 1.safetensors": STOCK, "b 0.safetensors": STOCK}
    assert arms["b, run 1"].encoder == "b 0.safetensors"
    assert (arms["a, run 1"].image_prompt, arms["b, run 1"].image_prompt) == (1.0, 1.25)
    assert arms["b, run 1"].kv == 0  # the stock adapter has no KV encoder


@pytest.mark.parametrize("text", ["nothing", "a=", "a=/no/such/file.safetensors"])
def test_what_is_no_file_is_said(text):
    with pytest.raises(Problem, match="give NAME=FILE"):
        tool.parse([text])


def test_a_name_of_what_training_begins_with_is_refused():
    with pytest.raises(Problem, match="'before' is what training begins with; give another name"):
        tool.parse([f"before={STOCK}"])


def test_what_was_drawn_is_not_drawn_again(tmp_path, monkeypatch):
    calls = []

    def draw(references, arms, styles, encoders, first):
        calls.append(([*arms], [*encoders]))
        return None, {name: torch.full((references, len(styles), 3, 2, 2), 0.2 * len(calls)) for name in arms}

    monkeypatch.setattr(tool, "draw", draw)
    monkeypatch.setattr(tool, "CACHE", tmp_path)
    _, first = tool.pictures(2, *tool.arms_of({"a": [RUN]}))
    _, second = tool.pictures(2, *tool.arms_of({"of another name": [RUN]}))  # the same file and settings
    assert calls == [([*tool.BASELINES, "a, run 1"], ["a 0.safetensors"])]
    assert torch.equal(second["of another name, run 1"], first["a, run 1"])
    assert first["a, run 1"].unique().tolist() == pytest.approx([0.2], abs=1 / 255)
    tool.pictures(3, *tool.arms_of({"a": [RUN]}))
    assert len(calls) == 2  # of more people
    tool.pictures(2, *tool.arms_of({"a": [RUN]}), first=100)
    assert len(calls) == 3  # of others
    monkeypatch.setattr(tool, "surroundings", lambda: "with other sources")
    tool.pictures(2, *tool.arms_of({"a": [RUN]}))
    assert len(calls) == 4


def test_gains_are_paired_and_over_all_runs():
    ones = torch.ones(20, 4)
    spread = torch.linspace(0, 0.5, 20)[:, None] * ones  # people differ far more than arms do

    def arm(shift):
        return {tool.SIMILARITY: spread + shift, tool.STYLE: ones}

    found = {name: arm(0.0) for name in tool.BASELINES}
    found |= {"a, run 1": arm(0.1), "a, run 2": arm(0.3), "b, run 1": arm(0.15)}
    files = {"a": [RUN, RUN], "b": [RUN]}
    rows = tool.table(found, files)
    assert [*rows] == [*tool.BASELINES, "a", "a, run 1", "a, run 2", "b"]
    value, low, high = rows["a"][f"{tool.SIMILARITY}, over {tool.BEFORE}"]
    assert value == pytest.approx(0.2) and high - low < 1e-6  # the spread of people is not in it
    assert rows["a"][tool.SIMILARITY][2] - rows["a"][tool.SIMILARITY][1] > 0.05
    (difference,) = tool.differences(found, files).values()
    assert difference[tool.SIMILARITY][0] == pytest.approx(0.05)  # of the run that both have
    text = tool.page(rows, tool.differences(found, files), 20)
    assert "| b - a |" in text and "over *before, weight 0.5*" in text
