# SPDX-License-Identifier: Apache-2.0
"""Fold, export, check and profile trained models.

Running exported files needs none of this: see :mod:`mmeformer.runtime`.
"""

from mmeformer.deploy.fold import fold

__all__ = ["fold"]
