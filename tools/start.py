"""Entry of `make setup` that every Python can read, so that an old one is told what is wrong.

`setup.py` itself uses the grammar of Python 3.7.
"""

import sys

if sys.version_info < (3, 7):  # noqa: UP036
    sys.exit(
        "error: Python {}.{} is too old: the project needs Python 3.11 or newer; install one and call "
        "`make PYTHON=/path/to/python3.11 ...`.".format(*sys.version_info[:2])
    )

if __name__ == "__main__":
    from .common import run_main
    from .setup import main

    run_main(main)
