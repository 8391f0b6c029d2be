#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Cut DOTA images and labels into patches; run it again to go on after an interruption."""

import sys

from mmeformer.commands.split_dota import main

if __name__ == "__main__":
    sys.exit(main())
