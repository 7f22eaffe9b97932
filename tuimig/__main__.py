"""`tuimig`, and `python -m tuimig`. Ctrl-C ends it quietly, also while the rest is being imported and after the end."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tuimig.cli import main as run

    code = run()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return code


if __name__ == "__main__":
    sys.exit(main())
