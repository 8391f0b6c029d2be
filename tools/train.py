#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train the model of a config."""

import sys

from mmeformer import signals

if __name__ == "__main__":
    # Before the imports of the command, which take seconds.
    signals.leave_on_signals()

from mmeformer.commands.train import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
