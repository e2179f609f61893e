"""Every worker holds all tests of the suite: the garbage collector need not look through them again and again."""

import gc


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
