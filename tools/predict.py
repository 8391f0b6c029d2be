#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Predict on images, folders, globs and videos with a trained model."""

import sys

from mmeformer.commands.predict import main

if __name__ == "__main__":
    sys.exit(main())
