# SPDX-License-Identifier: Apache-2.0
"""Helpers that several test modules share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from mmeformer.backbones import EfficientFormer, EfficientFormerV2
from mmeformer.variants import VARIANTS, Variant


def build_backbone(variant: Variant, **kwargs):
    """A backbone of a row of ``variants.py``."""
    cls = EfficientFormer if variant.family == "v1" else EfficientFormerV2
    return cls(variant.arch, **kwargs)


@pytest.fixture(params=list(VARIANTS))
def variant(request) -> Variant:
    """Every published variant in turn."""
    return VARIANTS[request.param]


@pytest.fixture(params=["efficientformer_l1", "efficientformerv2_s0"])
def small_variant(request) -> Variant:
    """The smallest variant of each family."""
    return VARIANTS[request.param]


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)
