# SPDX-License-Identifier: Apache-2.0
"""Settings of the C library for CPU processes that often allocate large tensors."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory instead of returning it to the system.

    By default each large tensor gets new memory, which the kernel fills with zeros page by page.
    This takes a quarter of the CPU time of a training step. With these settings the process keeps
    its peak size. Works with glibc on Linux and does nothing elsewhere.

    Returns:
        True if the settings were accepted.
    """
    return _mallopt(_M_MMAP_MAX, 0) and _mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> bool:
    """Make the C library return the memory of freed tensors of 2 MiB and more at once.

    By default fragmentation keeps much of it: a training step with ``with_cp`` then takes three
    times the memory of its tensors. The page faults (see :func:`keep_freed_memory`) take about a
    quarter of the time.

    Returns:
        True if the setting was accepted.
    """
    # Smaller than the chunks of attention (layers/attention.py), which have many sizes.
    return _mallopt(_M_MMAP_THRESHOLD, 2**21)


def _mallopt(parameter: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(parameter, value))
