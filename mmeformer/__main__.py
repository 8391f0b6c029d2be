# SPDX-License-Identifier: Apache-2.0
"""``python -m mmeformer``: the command ``mmeformer``, where its script is not on the path."""

import sys

from mmeformer.commands.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
