# SPDX-License-Identifier: Apache-2.0
"""What several test modules call."""

import re

import pytest

from mmeformer.backbones import EfficientFormer, EfficientFormerV2
from mmeformer.variants import Variant


def build_backbone(variant: Variant, **kwargs):
    """A backbone of a row of ``variants.py``."""
    cls = EfficientFormer if variant.family == "v1" else EfficientFormerV2
    return cls(variant.arch, **kwargs)


def needs_coremltools():
    """The package; skips the test where it is not installed or has no build, as on Python 3.14."""
    pytest.importorskip("coremltools.libmilstoragepython", reason="no build of coremltools")
    import coremltools

    return coremltools


def larger_are_slow(names: list[str]) -> list:
    """Parameters of a test from names of configs; those of larger variants are slow tests."""
    larger = re.compile("-l3_|-l7_|v2-s1_|v2-s2_|v2-l_")
    return [pytest.param(n, marks=pytest.mark.slow if larger.search(n) else ()) for n in names]
