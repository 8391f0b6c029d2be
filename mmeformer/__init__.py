# SPDX-License-Identifier: Apache-2.0
"""EfficientFormer V1 and V2 backbones for OpenMMLab detection, segmentation and rotated detection.

Importing the package is cheap: the backbones (and with them torch, timm and mmengine) are imported
at their first use, so that ``python -m mmeformer.doctor`` can diagnose a broken installation. The
import makes mmcv find its operators where none are compiled (:mod:`mmeformer.ops`), and makes mmdet
importable without imgaug (:mod:`mmeformer.without_imgaug`).
"""

from importlib import import_module

from mmeformer.ops import register as _register_operators
from mmeformer.version import __version__
from mmeformer.without_imgaug import register as _register_imgaug

_register_operators()
_register_imgaug()

_LAZY = {
    "EfficientFormer": "mmeformer.backbones",
    "EfficientFormerV2": "mmeformer.backbones",
    "VARIANTS": "mmeformer.variants",
    "load": "mmeformer.model",
    "shipped_config": "mmeformer.paths",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
