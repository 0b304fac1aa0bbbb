"""The `lookahead` command line: help at once, a sentence for what a user can mend, status 2 for wrong arguments."""

import os
import subprocess
import sys

import pytest
from lcm_lookahead.cli import main
from lcm_lookahead.mini.studies import evaluate
from lcm_lookahead.tools.common import Problem

COMMANDS = {
    "train": ["config", "section.key=value", "--dry-run"],
    "estimate": ["config", "section.key=value", "--card", "--processes"],
    "curves": ["OUT", "--to"],
    "prepare": ["config", "section.key=value", "--worker", "--dry-run"],
    "doctor": ["data", "key=value", "--detector"],
    "convert": ["source", "target", "--to", "--base", "--precision"],
    "evaluate": [
        "NAME=FILE[@WEIGHT]",
        "--knobs",
        "--guidance",
        "--presets",
        "--encoders",
        "--null-text",
        "--people",
        "--layers",
        "--reference-presets",
        "--references",
        "--first",
        "--out",
    ],
    "mini build": ["--quick", "--folder", "--only", "--export-to"],
    "mini sheet": ["--people", "--seed", "--out"],
    "mini report": ["--quick", "--folder", "--weights"],
    "mini sizes": [],
    "mini example": ["folder"],
    "schema": ["train|generate"],
}


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom lcm_lookahead.cli.main import main\nmain(['--help'])\n"
        "assert not {'torch', 'diffusers', 'matplotlib', 'pydantic'} & sys.modules.keys(), 'too much for a help text'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command.split()[0] in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_takes(command, capsys):
    main.main([*command.split(), "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"lookahead {command}" in said
    assert all(option.lower() in said.lower() for option in COMMANDS[command])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "trian"),
        (["train"], "config"),
        (["convert", "a", "b", "--to", "lora"], "ip-adapter"),
        (["mini", "sheet", "--people", "0"], "people"),
        (["evaluate", "--knobs", "--guidance"], "give one of them"),
        (["evaluate", "--presets", "--guidance"], "give one of them"),
        (["evaluate", "--encoders"], "go with files"),
        (["evaluate", "a=b.safetensors"], "go with files"),
    ],
)
def test_arguments_that_are_not_as_the_help_says_end_with_status_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(arguments)
    assert end.value.code == 2
    assert says in capsys.readouterr().err.lower()


def test_what_a_user_can_mend_is_one_sentence_after_the_command_s_name(monkeypatch):
    def study(*_):
        raise Problem("the disk is full.")

    monkeypatch.setattr(evaluate, "evaluate", study)
    with pytest.raises(SystemExit) as end:
        main.main(["evaluate"])
    assert end.value.code == "lookahead evaluate: the disk is full."


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def study(*_):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(evaluate, "evaluate", study)
    with pytest.raises(ZeroDivisionError):
        main.main(["evaluate"])


def test_options_and_files_of_a_study_come_in_any_order(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(evaluate, "evaluate", lambda *arguments: calls.append(arguments))
    main.main(
        ["evaluate", "--references", "20", "--encoders", "a=b", "c=d@0.5", "--first", "3", "--out", str(tmp_path)]
    )
    main.main(["evaluate", "--presets", "quick", "strong", "--references", "20", "--out", str(tmp_path)])
    main.main(["evaluate", "--guidance", "identity", "--out", str(tmp_path)])
    main.main(["evaluate", "--knobs"])
    assert calls[0] == ("encoders", tmp_path, 20, ["a=b", "c=d@0.5"], 3, None)
    assert calls[1] == ("presets", tmp_path, 20, ["quick", "strong"], 0, None)
    assert calls[2] == ("guidance", tmp_path, None, ["identity"], 0, None)
    assert calls[3][0] == "knobs" and calls[3][2] is None


def test_every_error_of_a_user_exists_where_it_is_looked_up():
    import importlib

    from lcm_lookahead.cli import main

    for module, name in main.USER_ERRORS:
        error = getattr(importlib.import_module(f"lcm_lookahead.{module}"), name)
        assert issubclass(error, Exception) and error in main.user_errors()


def test_the_composition_root_imports_by_itself():
    """What must be cured before diffusers is imported is cured whoever comes first."""
    import subprocess
    import sys

    code = "import gc\ngc.disable()\nimport lcm_lookahead.cli.assemble"  # a fifth of it would be looking for garbage
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- what a user's shell and disk bring


def test_a_stop_from_the_keyboard_is_one_line(monkeypatch, capsys):
    def study(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate", study)
    with pytest.raises(SystemExit) as end:
        main.main(["evaluate"])
    assert end.value.code == 130 and capsys.readouterr().err == "lookahead evaluate: stopped.\n"


def test_the_user_s_own_folder_is_meant_by_a_tilde_everywhere(monkeypatch, tmp_path):
    """Shells write it out in `~/x` alone: neither in --option=~/x, nor in section.key=~/x, nor in a file."""
    from lcm_lookahead.trainer.concept.config import ConceptConfig, picture_cache
    from lcm_lookahead.trainer.config import CONFIGS
    from lcm_lookahead.trainer.data.generate.config import load as load_generate
    from lcm_lookahead.trainer.lookahead.config import load

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    calls = []
    monkeypatch.setattr(evaluate, "evaluate", lambda *arguments: calls.append(arguments))
    main.main(["evaluate", "--out=~/pages"])
    main.main(["evaluate", "--out", "~/pages"])
    assert [call[1] for call in calls] == [tmp_path / "pages"] * 2
    (tmp_path / "run.yaml").write_text(f"extends: {CONFIGS / 'mini.yaml'}\nout: ~/runs\nvalidation: {{clip: ~/clip}}\n")
    config = load(tmp_path / "run.yaml", ["data.source=~/people", "model.detector=~/pack", "data.cache=~"])
    wanted = {"out": config.out, "people": config.data.source, "pack": config.model.detector}
    assert wanted == {"out": f"{tmp_path}/runs", "people": f"{tmp_path}/people", "pack": f"{tmp_path}/pack"}
    assert (config.validation.clip, config.model.base) == (f"{tmp_path}/clip", "mini")
    made = load_generate(CONFIGS / "generate/mini.yaml", ["out=~/set", "checks.clip=~/clip"])
    assert (made.out, made.checks.clip) == (f"{tmp_path}/set", f"{tmp_path}/clip")
    fields = ("model.image_encoder", "model.picture_vae", "data.source", "data.cache", "token.dictionary")
    values = [f"{field}=~/{n}" for n, field in enumerate(fields)]
    concept = ConceptConfig.load(CONFIGS / "concept" / "mini.yaml", values)
    named = concept.model.image_encoder, concept.model.picture_vae, concept.data.source, concept.data.cache
    assert [*named, concept.token.dictionary] == [f"{tmp_path}/{n}" for n in range(len(fields))]
    assert picture_cache(concept.data) == tmp_path / "3"
    beside = concept.data.model_copy(update={"cache": None})
    assert picture_cache(beside) == tmp_path.resolve() / "2.cache"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "mini.yaml", "out=taken/run"],
        ["generate", "generate/drawn.yaml", "out=taken"],
        ["evaluate", "--out", "taken"],
        ["curves", ".", "--to", "taken/curves.png"],
        ["convert", "a.safetensors", "taken/b.safetensors"],
        ["study", "make", ".", ".", "--out", "taken/study"],
        ["mini", "sheet", "--out", "taken/sheet.png"],
        ["mini", "example", "taken"],
        ["mini", "build", "--folder", "taken"],
        ["mini", "things", "--out", "taken/things"],
        ["mini", "gate", "--sheet", "taken/gate.png"],
        ["concept", "predict", "a.safetensors", "b.png", "--base", "mini", "--out", "taken/c.safetensors"],
        ["concept", "tune", "a.safetensors", "b.png", "--base", "mini", "--out", "taken/c.safetensors"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_place_that_cannot_be_written_is_said_before_the_work(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(SystemExit) as end:
        main.main(arguments)
    text = f"lookahead {arguments[0]}: {tmp_path / 'taken'} is a file, and a folder is needed there to write in"
    assert str(end.value.code) == f"{text}: name another."
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_an_error_of_the_system_is_said_without_its_number(monkeypatch):
    def study(*_):
        open("/nowhere/at/all")

    monkeypatch.setattr(evaluate, "evaluate", study)
    with pytest.raises(SystemExit) as end:
        main.main(["evaluate"])
    assert (
        end.value.code == "lookahead evaluate: /nowhere/at/all cannot be read or written (No such file or directory)."
    )


def test_names_that_a_terminal_cannot_show_stop_nothing():
    """As on a console in another encoding, and for folders whose names are no UTF-8."""
    code = (
        "from lcm_lookahead.cli import main\nfrom lcm_lookahead.mini.files import shipped\n"
        "shipped.size_table = lambda: 'J\\udcf6rg, zo\\xe9'\nmain.main(['mini', 'sizes'])"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.returncode) == ("J\\udcf6rg, zo\\xe9\n", 0), done.stderr


def test_help_of_every_command_needs_no_torch():
    code = (
        "import sys\nfrom lcm_lookahead.cli.main import main\n"
        f"for command in {[*COMMANDS, 'study make', 'generate', 'schema', 'mini example']}:\n"
        "    main([*command.split(), '--help'])\n"
        "assert not {'torch', 'diffusers', 'matplotlib', 'numpy'} & sys.modules.keys(), 'too much'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_study_shows_judges_what_files_show(tmp_path, capsys):
    """Deep grey, transparency and a turned camera are read as everywhere."""
    import numpy as np
    from PIL import Image

    grey = np.linspace(0, 65535, 40 * 48).reshape(40, 48)
    for method in ("ours", "theirs"):
        (tmp_path / method).mkdir()
        Image.fromarray(grey.astype(np.uint16)).save(tmp_path / method / "a.png")
    main.main(["study", "make", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--out", str(tmp_path / "study")])
    assert "(1 pairs)" in capsys.readouterr().out
    for path in (tmp_path / "study/public").glob("*.png"):
        with Image.open(path) as picture:
            assert np.allclose(np.asarray(picture)[..., 0], grey / 257, atol=1)
    with pytest.raises(SystemExit) as end:
        main.main(["study", "count", str(tmp_path / "study")])
    assert str(end.value.code).startswith("lookahead study: ")
    (tmp_path / "ours/a.png").write_bytes(b"nothing")
    with pytest.raises(SystemExit) as end:
        main.main(["study", "make", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--out", str(tmp_path / "two")])
    assert "cannot be read as a picture" in str(end.value.code) and "draw it again" in str(end.value.code)
