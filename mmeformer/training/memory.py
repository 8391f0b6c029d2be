# SPDX-License-Identifier: Apache-2.0
"""Memory of a process that makes and frees large tensors all the time, on a CPU."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed instead of giving it back to the system.

    By default each large tensor is new memory that the kernel first fills with zeros, page by page:
    a quarter of the processor time of a training step. The process then stays as large as it once
    was. Works with glibc on Linux and changes nothing elsewhere.

    Returns:
        Whether it was possible.
    """
    return _mallopt(_M_MMAP_MAX, 0) and _mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> bool:
    """Have the C library give what tensors of 2 MiB and more took back to the system at once.

    By default it keeps much of it in gaps that nothing else fits into: a training step with
    ``with_cp`` then takes three times the memory of its tensors. It costs page faults (see
    :func:`keep_freed_memory`): about a quarter of the time.

    Returns:
        Whether it was possible.
    """
    # Less than the chunks of attention (layers/attention.py), which come in many sizes.
    return _mallopt(_M_MMAP_THRESHOLD, 2**21)


def _mallopt(parameter: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(parameter, value))
