"""Every worker holds all tests of the suite: the garbage collector need not look through them again and again."""

import gc

import hypothesis  # noqa: F401  # its plugins ask who refers to an object, which gc.freeze hides: so before that


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
