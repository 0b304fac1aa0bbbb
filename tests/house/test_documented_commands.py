"""Every command that the documentation gives: as its help says, and run by a test or by hand before a release."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from lcm_lookahead.cli.main import app
from lcm_lookahead.evaluation import claims

ROOT = Path(__file__).resolve().parents[2]
BY_HAND = ROOT / "docs" / "releasing.md"
DOCUMENTED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTED += sorted((ROOT / "trainer" / "configs").rglob("*.yaml"))
DOCUMENTED.remove(ROOT / "docs" / "evidence.md")  # it has the commands of CLAIMED, which take hours
CLAIMED = {f"lookahead {step.run}" for claim in claims.read().values() for step in claim.steps}
COMMAND = re.compile(r"(?:^    |`|^# )(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?((?:lookahead|make) [a-z][^`\n]*)", re.M)
# By command with its options: the test that runs it.
TESTED = {
    "lookahead train": "trainer/test_folder.py",
    "lookahead train --dry-run": "trainer/test_estimate.py",
    "lookahead estimate": "trainer/test_estimate.py",
    "lookahead estimate --card": "trainer/test_estimate.py",
    "lookahead curves": "trainer/test_curves.py",
    "lookahead curves --to": "trainer/test_curves.py",
    "lookahead doctor": "trainer/test_doctor.py",
    "lookahead doctor --detector": "trainer/test_doctor.py",
    "lookahead convert --to": "tools/test_wheel.py",
    "lookahead generate": "trainer/test_generate.py",
    "lookahead generate --pilot": "trainer/test_generate.py",
    "lookahead generate --shards": "trainer/test_generate.py",
    "lookahead generate --worker": "trainer/test_generate.py",
    "lookahead generate --plan --prices": "trainer/test_launch.py",
    "lookahead prepare": "trainer/test_prepare.py",
    "lookahead prepare --dry-run": "trainer/test_prepare.py",
    "lookahead prepare --worker": "trainer/test_prepare.py",
    "lookahead concept train": "trainer/test_concept_training.py",
    "lookahead concept doctor": "trainer/test_concept_training.py",
    "lookahead concept predict --base --image-encoder": "trainer/test_concept_training.py",
    "lookahead concept tune --base --image-encoder --stock": "trainer/test_concept_training.py",
    "lookahead concept tune --dry-run": "trainer/test_concept_training.py",
    "lookahead concept words --base": "trainer/test_concept_training.py",
    "lookahead guide train": "trainer/test_noise_guide_training.py",
    "lookahead guide train --dry-run": "trainer/test_noise_guide_training.py",
    "lookahead guide doctor": "trainer/test_noise_guide_training.py",
    "lookahead mini build --only": "trainer/test_build.py",
    "lookahead mini gate": "trainer/test_build.py",
    "lookahead mini things": "trainer/test_build.py",
    "lookahead evaluate": "tools/test_evaluate_protocol.py",
    "lookahead evaluate --dry-run": "tools/test_evaluate_protocol.py",
    "lookahead mini build --quick": "trainer/test_build.py",
    "lookahead mini sheet": "trainer/test_build.py",
    "lookahead mini sheet --people": "trainer/test_build.py",
    "lookahead mini sizes": "trainer/test_shipped.py",
    "lookahead mini example": "tools/test_wheel.py",
    "lookahead schema": "trainer/test_schema.py",
    "lookahead mini previews": "trainer/test_shipped_weights.py",
    "lookahead claims": "unit/test_claims.py",
    "lookahead claims --run": "unit/test_claims.py",
    "lookahead study make --out": "tools/test_cli.py",
    "lookahead study make --evaluation --out": "tools/test_evaluate_protocol.py",
    "lookahead study count": "tools/test_cli.py",
}


def commands(path):
    """The commands that a file gives, without remarks behind them."""
    found = (re.split("  #|   | > ", match)[0].strip() for match in COMMAND.findall(path.read_text()))
    return [command for command in found if len(command.split()) > 1]


def kind(command):
    """A command's words and options, without what it is given."""
    words = shlex.split(command.replace("ARGS=", "").replace('"', ""))
    depth = 3 if words[0] == "lookahead" and words[1] in ("concept", "guide", "mini", "study") else 2
    return " ".join([*words[:depth], *(word.split("=")[0] for word in words[depth:] if re.match("--.", word))])


ALL = sorted({(command, path) for path in DOCUMENTED for command in commands(path)}, key=str)


def test_commands_are_found():
    kinds = {kind(command) for command, _ in ALL}
    assert {"lookahead train --dry-run", "lookahead mini sheet --people", "make bench --full-size"} <= kinds


@pytest.mark.parametrize("command", sorted({c for c, _ in ALL if c.startswith("lookahead")} | CLAIMED))
def test_a_documented_command_is_as_its_help_says(command):
    words = shlex.split(command)[1:]
    if words[-1] == "study" and words[0] in ("curves", "train"):
        pytest.skip("words about a command, not one")
    parser = typer.main.get_command(app)
    context = parser.make_context("lookahead", list(words), resilient_parsing=True)
    while words and hasattr(parser, "commands"):
        assert words[0] in parser.commands, f"there is no {words[0]}"
        parser, words = parser.commands[words[0]], words[1:]
    options = {name for parameter in parser.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= options and context
    named = [word for word in words if word.startswith("trainer/configs/")]
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("command", sorted({c for c, _ in ALL if c.startswith("make")}))
def test_a_documented_target_exists(command):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert command.split()[1].rstrip(",") in targets


def test_every_documented_command_is_run_by_a_test_or_by_hand():
    by_hand = {kind(command) for command in commands(BY_HAND)}
    bare = {"lookahead convert --base"}  # the same with other files
    left = {kind(c): str(p.relative_to(ROOT)) for c, p in ALL if kind(c) not in by_hand | TESTED.keys() | bare}
    assert not left


@pytest.mark.parametrize(("command", "test"), TESTED.items())
def test_the_test_of_a_command_names_it(command, test):
    text = (ROOT / "tests" / test).read_text()
    assert all(word in text for word in command.split()[1:] if word not in ("concept", "guide", "mini", "study"))
