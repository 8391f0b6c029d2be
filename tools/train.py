#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train the model of a config."""

import sys

from mmeformer.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
