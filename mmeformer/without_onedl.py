# SPDX-License-Identifier: Apache-2.0
"""Keeps a debug message of mmdet, mmseg, mmrotate and mmpretrain off the screen.

Their data set packages note at level DEBUG that OneDL, a storage service that no task here uses, is
not installed. They name no logger, and then mmengine prints whatever the level is
(``print_log`` in ``mmengine/logging/logger.py``). Every other message passes.
"""

from __future__ import annotations

import functools
import logging as levels
from typing import Any

from mmengine import logging

NOTE = "Could not import OneDL"


def drop_note() -> None:
    """Drop the note from now on, wherever ``print_log`` is imported after this call."""
    original = logging.print_log
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def print_log(msg: object, logger: Any = None, level: int = levels.INFO) -> None:
        if logger is None and level == levels.DEBUG and str(msg).startswith(NOTE):
            return
        original(msg, logger, level)

    logging.print_log = print_log
