# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test modules share."""

import pytest
import torch

from mmeformer.variants import VARIANTS, Variant


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
