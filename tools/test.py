#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Evaluate a checkpoint, or an ONNX file exported from one, of any config of the three tasks."""

import sys

from mmeformer.commands.test import main

if __name__ == "__main__":
    sys.exit(main())
