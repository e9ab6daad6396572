"""The program `ecso`, as the wheel has it."""

import shutil
import signal
import sys
from typing import NoReturn

from ._ecso import main as program


def main() -> NoReturn:
    """Runs the program with this process's arguments, and ends as it does."""
    # As in a program without Python around it: Ctrl-C ends it, or is heard by it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(program(shutil.which(sys.argv[0]), ["ecso", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
