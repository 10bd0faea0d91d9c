"""The program: `labelwise`, or `python -m labelwise`."""

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn

from labelwise.cli import main


def run() -> NoReturn:
    """Run the command line, then leave at once.

    Python would first take apart all that torch and timm brought, object by object: 4 of the 11 seconds that
    a command without work takes on a slow machine (measured 2026-11-25, recipes/LOG.md).
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open to the end
    try:
        main()
    except SystemExit as ended:
        if not isinstance(ended.code, int):
            raise
        status = ended.code
    else:
        status = 0
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
