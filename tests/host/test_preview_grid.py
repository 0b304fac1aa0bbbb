"""Lookahead Preview Grid: what is foretold at fractions of a run, beside what it becomes."""

import guided_cases
import pytest
import torch
from guided_cases import LATENT

loss, shortcut, vae = guided_cases.loss, guided_cases.shortcut, guided_cases.vae  # fixtures


def test_the_preview_grid_shows_what_was_foretold_and_how_well(mini, texts, shortcut, loss, pack):
    """With no LoRA and no guidance, shortcut and x0 are one; nearer to the end previews are nearer to the picture."""
    node, latent = pack.nodes["LookaheadPreviewGrid"], {"samples": torch.zeros(2, *LATENT[1:])}
    options = {"steps": 4, "cfg": 1.0, "fractions": "0, 0.5, 0.75", "loss": loss}
    of = shortcut(kind="plain x0")
    grid, finished, text = node.execute(mini.model, of, *texts, latent, **options).result
    assert grid.shape == (2, 2 * (64 + 34), 4 * 64, 3) and finished.shape == (2, 64, 64, 3)
    rows = [line.split("|")[1:-1] for line in text.splitlines()[2:]]
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [
        *((f"{n} %", which) for n in (0, 50, 75) for which in ("shortcut", "x0")),
        ("100 %", "finished"),
    ]
    numbers = [[float(cell) for cell in row[2:]] for row in rows]
    for one, other in zip(numbers[0:6:2], numbers[1:6:2], strict=True):
        assert one == pytest.approx(other, abs=2e-3)
    assert numbers[0][0] > numbers[4][0] and numbers[0][1] < numbers[4][1]


@pytest.mark.parametrize("sampler", ["euler", "dpm_2", "uni_pc", "dpm_fast", "dpm_adaptive"])
def test_the_preview_grid_draws_what_ksampler_draws_and_looks_ahead_everywhere(
    mini, texts, shortcut, pack, vae, sampler
):
    """KSampler leaves the penultimate noise level out for some samplers; others have steps or a scale of their own."""
    latent = {"samples": torch.zeros(LATENT), "noise_mask": torch.ones(1, 1, 64, 64)}
    asked = {"steps": 5, "cfg": 1.0, "sampler_name": sampler, "scheduler": "normal"}
    grid = pack.nodes["LookaheadPreviewGrid"].execute
    _, finished, text = grid(
        mini.model, shortcut(kind="plain x0"), *texts, latent, 7, fractions="0, 0.4, 0.8", **asked
    ).result
    (drawn,) = pack.host_nodes.KSampler().sample(mini.model, 7, 5, 1.0, sampler, "normal", *texts, latent)
    assert torch.allclose(finished, vae.decode(drawn["samples"]).cpu(), atol=5e-3)
    assert all(f"{n} %" in text for n in (0, 40, 80))
    rows = [[float(cell) for cell in line.split("|")[3:5]] for line in text.splitlines() if " % |" in line]
    for one, other in zip(rows[0::2], rows[1::2], strict=True):  # without a LoRA and guidance, shortcut and x0 are one
        assert one == pytest.approx(other, abs=2e-2)  # (dpm_adaptive tells of a step after its last call: 0.01)


def test_fractions_that_a_sampler_never_came_to_are_named(pack, caplog):
    grid = pack.module("nodes.guidance.preview_grid")
    shots = [grid.Shot(0.0, torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 8, 3))]
    assert grid.left_out([0.0], shots, "euler") == ""
    note = grid.left_out([0.0, 0.5, 0.75], shots, "dpm_adaptive")
    assert "ended before 50 %, 75 %" in note and note.strip() in caplog.text


def test_a_fraction_after_the_last_step_is_that_step(mini, texts, shortcut, pack):
    latent, options = {"samples": torch.zeros(LATENT)}, {"steps": 3, "cfg": 1.0, "fractions": "0.99"}
    *_, text = pack.nodes["LookaheadPreviewGrid"].execute(mini.model, shortcut(), *texts, latent, **options).result
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == ["99 %", "99 %"]


@pytest.mark.parametrize("text", ["", "0.5, 1", "-0.1", "a half"])
def test_fractions_that_make_no_sense_are_refused(pack, tools, text):
    with pytest.raises(ValueError, match="give numbers from 0 to below 1") as error:
        pack.module("nodes.guidance.preview_grid").parse_fractions(text)
    assert str(error.value).endswith("0.5.")
