# SPDX-License-Identifier: Apache-2.0
"""Why a run was stopped on purpose."""


class TrainingError(RuntimeError):
    """A run cannot go on; the message says why and what to do. Checkpoints stay as they are."""
