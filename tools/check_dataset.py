#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Look for mistakes in a config's data sets before training on them."""

import sys

from mmeformer.commands.check_dataset import main

if __name__ == "__main__":
    sys.exit(main())
