# SPDX-License-Identifier: Apache-2.0
"""Errors that the user can fix; all have one base class.

Command lines show only their message, without a traceback.
"""


class UserError(Exception):
    """An error that the user can fix; its message says what is wrong, where, and what to do."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be used; the message names the file and says what to do."""


class TrainingError(UserError, RuntimeError):
    """A run cannot go on; the message says why and what to do. Checkpoints stay as they are."""
