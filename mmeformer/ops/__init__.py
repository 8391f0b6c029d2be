# SPDX-License-Identifier: Apache-2.0
"""Operators without a compiler: NMS, RoIAlign and IoU, also of rotated boxes, and focal loss.

``mmcv.ops`` imports the compiled extension ``mmcv._ext``. If mmcv was installed without one, an
import finder supplies :mod:`mmeformer.ops.substitute`, built on torchvision and PyTorch.
``import mmeformer`` registers the finder. In an installed package, the first import of mmcv does so
too (:mod:`mmeformer.ops.startup`), so that mmdet, mmseg and mmrotate may be imported before
mmeformer.

The environment variable ``MMEFORMER_OPERATORS`` chooses:

- ``auto`` (default): the compiled operators if mmcv has them, else the substitute. A compiled
  extension that cannot be loaded is an error, and ``mmeformer doctor`` names it.
- ``torch``: the substitute, also where mmcv has compiled operators.
- ``compiled``: never the substitute.

Only the standard library is imported here.
"""

from mmeformer.ops.finder import OperatorsError, Status, register, status

__all__ = ["OperatorsError", "Status", "register", "status"]
