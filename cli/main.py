"""The `lookahead` command: a file of this folder for each command, and one place that words what goes wrong.

Nothing here imports torch before a command needs it, so that help comes at once.
"""

from __future__ import annotations

import sys

import typer

from . import convert, curves, doctor, estimate, evaluate, generate, mini, prepare, study, train

app = typer.Typer(
    help="Train, measure and convert encoders of LCM-Lookahead for ComfyUI. For a command: lookahead COMMAND --help.",
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
    convert.convert,
    evaluate.evaluate,
):
    app.command()(command)
app.add_typer(mini.app)
app.add_typer(study.app)


# What a user can mend, by module; the text of each is a sentence for them.
USER_ERRORS = (
    ("evaluation.preference", "StudyError"),
    ("lookahead.files.tensors", "EncoderFileError"),
    ("lookahead.vision.arcface", "RecogniserError"),
    ("lookahead.vision.face_models", "FaceModelError"),
    ("sdxl.images", "PictureError"),
    ("sdxl.load", "ModelError"),
    ("tools.common", "Problem"),
    ("trainer.checkpoints", "TrainingError"),
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

    Raises SystemExit: with 2 for arguments that are not as the help says, with a sentence for one of `user_errors`.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        typer.main.get_command(app)(arguments, prog_name="lookahead")  # ends by SystemExit, even when all is well
    except SystemExit as end:
        if end.code:
            raise
    except Exception as error:
        if not isinstance(error, user_errors()):
            raise
        raise SystemExit(f"lookahead {arguments[0]}: {error}") from None


if __name__ == "__main__":
    main()
