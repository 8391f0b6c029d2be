# SPDX-License-Identifier: Apache-2.0
"""Python's garbage collector, which costs a third of the time of reading a large data set."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Do not look for cycles of objects, in a block or a decorated function.

    While labels are read, the collector looks through millions of them again and again; they have
    no cycles, so that they go without it.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
