"""The program `ecso` from the wheel."""

import contextlib
import os
import shutil
import signal
import sys
import sysconfig
from typing import NoReturn

from ._ecso import has_engine
from ._ecso import main as program


def limit_spinning() -> None:
    """Limit how long the engine's threads spin, as the program that Cargo builds does: start once more, as the same process.

    OpenMP reads the limit when it is loaded. Nothing is done if the user has set one of these variables.
    """
    is_set = os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    if has_engine() and os.name == "posix" and sys.executable and not is_set:
        os.environ["GOMP_SPINCOUNT"] = "2000"
        with contextlib.suppress(OSError):  # Then the program runs without the limit.
            os.execv(sys.executable, sys.orig_argv)


def main() -> NoReturn:
    """Run the program with the arguments of this process, and exit with its exit code."""
    limit_spinning()
    # Let the program handle Ctrl-C as it does without Python.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # With `python -m ecso`, argv names no program.
    executable = shutil.which(sys.argv[0]) or shutil.which("ecso", path=sysconfig.get_path("scripts"))
    sys.exit(program(executable, ["ecso", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
