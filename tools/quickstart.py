#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Generate data, train from scratch, evaluate and draw predictions, in minutes on two CPU cores."""

import sys

from mmeformer.commands.quickstart import main

if __name__ == "__main__":
    sys.exit(main())
