"""The `lookahead` command: a file of this folder for each command, and one place that words what goes wrong.

Nothing here imports torch before a command needs it, so that help comes at once.
"""

from __future__ import annotations

import sys

import typer

from . import convert, curves, doctor, estimate, evaluate, generate, mini, train

app = typer.Typer(
    help="Train, measure and convert encoders of LCM-Lookahead for ComfyUI. For a command: lookahead COMMAND --help.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    generate.generate,
    train.train,
    estimate.estimate,
    curves.curves,
    doctor.doctor,
    convert.convert,
    evaluate.evaluate,
):
    app.command()(command)
app.add_typer(mini.app)


def user_errors() -> tuple[type[Exception], ...]:
    """What a user can mend; the text of each is a sentence for them."""
    from ..tools.common import Problem
    from ..trainer.checkpoints import TrainingError
    from .assemble import ERRORS

    return (*ERRORS, TrainingError, Problem)


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
