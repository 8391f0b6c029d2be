#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Write report.html into the work directory of a training, finished or not."""

import sys

from mmeformer.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
