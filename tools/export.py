#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Export a trained model to ONNX or CoreML, checked against PyTorch before it is written."""

import sys

from mmeformer.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
