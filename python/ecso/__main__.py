"""The program `ecso` from the wheel."""

import shutil
import signal
import sys
from typing import NoReturn

from ._ecso import main as program


def main() -> NoReturn:
    """Run the program with the arguments of this process, and exit with its exit code."""
    # Let the program handle Ctrl-C as it does without Python.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(program(shutil.which(sys.argv[0]), ["ecso", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
