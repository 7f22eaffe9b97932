"""A cancel that comes as a signal, at any moment of a wait."""

from __future__ import annotations

import subprocess
import sys

WAITS = """
import random, signal
from tuimig.core.errors import Cancelled
from tuimig.core.session import Relay, Session

class Behind(Relay):
    def catches_up(self):
        return True
    def behind(self):
        return True

for _ in range(1500):
    session = Session(lambda event: None)
    session._relay = Behind()
    signal.signal(signal.SIGALRM, lambda *_: session.cancel())
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 5e-3))
    try:
        session._rest(0, None)
    except Cancelled:
        continue
"""


def test_a_signal_in_the_middle_of_a_wait() -> None:
    """In a process of its own: what goes wrong here waits for ever."""
    subprocess.run([sys.executable, "-c", WAITS], check=True, timeout=60)
