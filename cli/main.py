"""The `lookahead` command: a file of this folder for each command, and one place that words what goes wrong.

Nothing here imports torch before a command needs it, so that help comes at once.
"""

from __future__ import annotations

import io
import os
import sys

import typer

from . import (
    claims,
    concept,
    convert,
    curves,
    doctor,
    estimate,
    evaluate,
    generate,
    guide,
    mini,
    prepare,
    schema,
    study,
    train,
)

HELP = """Teach SDXL to draw a person from one picture, and measure how well it does.

LCM-Lookahead (arXiv 2404.03620) trains an encoder: a file of some 900 MB that ComfyUI's node Load Lookahead Encoder, or
the diffusers pipeline of this package, reads beside SDXL. All that runs is on this machine; nothing is downloaded.

\b
From pictures (people/anna/1.jpg, people/anna/2.jpg, ...) to an encoder:
  lookahead doctor people                       is it fit to train on?
  lookahead estimate sdxl_24gb.yaml --card 24   memory, time, files
  lookahead train my.yaml                       again: it goes on
  lookahead curves training/mine                how it goes, as a picture

\b
my.yaml says what is different from a configuration that comes along
(mini, sdxl_paper, sdxl_24gb, sdxl_16gb); or the command line does:
  extends: sdxl_24gb.yaml
  out: training/mine
  data: {source: people}
  lookahead train my.yaml steps=100 out=trial

\b
Without any file, in the mini world (a tiny SDXL, drawn people; on a CPU):
  lookahead train mini.yaml steps=20 out=trial
  lookahead generate generate/mini.yaml shards=1 people_per_shard=4

lookahead COMMAND --help says what a command takes.
"""

app = typer.Typer(
    help=HELP,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    generate.generate,
    prepare.prepare,
    train.train,
    estimate.estimate,
    curves.curves,
    doctor.doctor,
    schema.schema,
    convert.convert,
    evaluate.evaluate,
    claims.claims,
):
    app.command(cls=generate.GenerateCommand if command is generate.generate else None)(command)
app.add_typer(mini.app)
app.add_typer(concept.app)
app.add_typer(guide.app)
app.add_typer(study.app)


STOPPED = 130  # the exit status of what Ctrl+C ended
# What a user can mend, by module; the text of each is a sentence for them.
USER_ERRORS = (
    ("evaluation.claims", "ClaimError"),
    ("evaluation.harness.library", "EvaluationError"),
    ("evaluation.preference", "StudyError"),
    ("lookahead.files.tensors", "EncoderFileError"),
    ("lookahead.losses.identity", "NoFaceError"),
    ("lookahead.method.concept_input", "ConceptError"),
    ("lookahead.vision.arcface", "RecogniserError"),
    ("lookahead.vision.face_models", "FaceModelError"),
    ("sdxl.images", "PictureError"),
    ("sdxl.load", "ModelError"),
    ("tools.common", "Problem"),
    ("trainer.checkpoints", "TrainingError"),
    ("trainer.concept.source", "ConceptDataError"),
    ("trainer.config", "ConfigError"),
    ("trainer.data.pairs", "DataError"),
)


def user_errors() -> tuple[type[Exception], ...]:
    """Lists the classes of USER_ERRORS whose modules are loaded: no other can have been raised, and to load one
    takes seconds."""
    package = __package__.rpartition(".")[0]
    loaded = ((sys.modules.get(f"{package}.{module}"), name) for module, name in USER_ERRORS)
    return (OSError, ImportError, *(getattr(module, name) for module, name in loaded if module is not None))


def main(arguments: list[str] | None = None) -> None:
    """Entry point; `arguments` default to the command line's.

    Raises SystemExit: with 2 for arguments that are not as the help says, with STOPPED for Ctrl+C, with a sentence for
    one of `user_errors`.
    """
    arguments = [_at_home(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that a terminal's encoding has not
    try:
        typer.main.get_command(app)(arguments, prog_name="lookahead")  # ends by SystemExit, even when all is well
    except SystemExit as end:
        if end.code == STOPPED:  # Ctrl+C
            print(f"lookahead {arguments[0]}: stopped.", file=sys.stderr)
        if end.code:
            raise
    except KeyboardInterrupt:
        print(f"lookahead {arguments[0]}: stopped.", file=sys.stderr)
        raise SystemExit(STOPPED) from None
    except Exception as error:
        if not isinstance(error, user_errors()):
            raise
        raise SystemExit(f"lookahead {arguments[0]}: {_sentence(error)}") from None


def _at_home(argument: str) -> str:
    """An argument with its leading ~ as the user's own folder, also in --option=~/..., where no shell writes it out."""
    option, equals, value = argument.partition("=")
    if equals and option.startswith("--"):
        return f"{option}={os.path.expanduser(value)}"
    return os.path.expanduser(argument)


def _sentence(error: Exception) -> str:
    """What an error says; of one of the system's own, without its number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename} cannot be read or written ({error.strerror})."
    return str(error)


if __name__ == "__main__":
    main()
