#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Evaluate a checkpoint, or an ONNX file exported from one, with the metrics of its config."""

import sys

from mmeformer.commands.test import main

if __name__ == "__main__":
    sys.exit(main())
