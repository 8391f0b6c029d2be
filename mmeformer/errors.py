# SPDX-License-Identifier: Apache-2.0
"""Errors that the user can fix, all of one base class."""


class UserError(Exception):
    """An error that the user can fix; its message says how."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be used; the message names the file and says what to do."""
