"""What the tests of kills run in another process."""

from __future__ import annotations

import time

from kvcat_nemo.evaluate.protocol import protocol_class
from kvcat_nemo.evaluate.results import Store


def slow_run(settings, protocol="continuation"):
    """Run a protocol with a pause after each item, so that the test can choose the moment of the kill."""
    put = Store.put

    def slow(self, *args):
        put(self, *args)
        time.sleep(0.05)

    Store.put = slow
    protocol_class(protocol).of(settings).run()
