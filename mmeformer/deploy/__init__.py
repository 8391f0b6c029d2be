# SPDX-License-Identifier: Apache-2.0
"""From a trained model to a product: folding, export, checks, profiles.

What runs the exported files needs none of this: see :mod:`mmeformer.runtime`.
"""

from mmeformer.deploy.fold import fold

__all__ = ["fold"]
