"""What all tests share: Python's garbage collector does not go through the libraries again and again.

Its full collections, of which nearly each looks at all of torch, diffusers and transformers, took a fifth of the
processor time. A test that asks whether something was let go collects by itself.
"""

import gc

SELDOM = 10  # times as many new objects as by default before a collection

gc.disable()  # importing the libraries makes nothing but what stays


def pytest_collection_finish() -> None:
    """Takes all that was imported out of the collector's sight, and lets it collect what tests leave."""
    gc.collect()
    gc.freeze()
    young, *older = gc.get_threshold()
    gc.set_threshold(SELDOM * young, *older)
    gc.enable()
