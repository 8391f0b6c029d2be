# SPDX-License-Identifier: Apache-2.0
"""What several test modules call."""

import hashlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

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


def load_script(path: Path) -> ModuleType:
    """A program that is no part of the package, imported anew by its file."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    # Where classes look for the module they are defined in.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def digest(root: Path) -> str:
    """Of the content of all files below a folder."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
