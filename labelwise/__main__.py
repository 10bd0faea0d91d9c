"""The program: `labelwise`, or `python -m labelwise`."""

import atexit
import os
import sys
from typing import NoReturn

from labelwise.cli import main


def run() -> NoReturn:
    """Run the command line, then leave at once.

    Python would first take apart all that torch and timm brought, object by object: 4 of the 11 seconds that
    a command without work takes on a slow machine (measured 2026-11-25, recipes/LOG.md).
    """
    try:
        main()
    except SystemExit as ended:
        if not isinstance(ended.code, int):
            raise
        atexit._run_exitfuncs()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # nobody reads any more
            raise ended from None
        os._exit(ended.code)


if __name__ == "__main__":
    run()
