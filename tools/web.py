#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Write a web page that runs an exported model in the browser."""

import sys

from mmeformer.commands.web import main

if __name__ == "__main__":
    sys.exit(main())
