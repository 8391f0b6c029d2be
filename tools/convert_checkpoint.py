#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint between the published formats and ours."""

import sys

from mmeformer.commands.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
