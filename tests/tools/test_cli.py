"""The `lookahead` command line: help at once, a sentence for what a user can mend, status 2 for wrong arguments."""

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
    "doctor": ["data", "key=value", "--detector"],
    "convert": ["source", "target", "--to", "--base", "--precision"],
    "evaluate": ["NAME=FILE[@WEIGHT]", "--knobs", "--guidance", "--encoders", "--references", "--first", "--out"],
    "mini build": ["--quick", "--folder", "--only", "--export-to"],
    "mini sheet": ["--people", "--seed", "--out"],
    "mini report": ["--quick", "--folder", "--weights"],
    "mini sizes": [],
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
        (["evaluate", "--encoders"], "goes with files"),
        (["evaluate", "a=b.safetensors"], "goes with files"),
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
    main.main(["evaluate", "--knobs"])
    assert calls[0] == ("encoders", tmp_path, 20, ["a=b", "c=d@0.5"], 3)
    assert calls[1][0] == "knobs" and calls[1][2] is None


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

    done = subprocess.run([sys.executable, "-c", "import lcm_lookahead.cli.assemble"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
