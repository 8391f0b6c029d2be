# SPDX-License-Identifier: Apache-2.0
"""Data sets and a trained model for the tests of this folder, which all need mmpretrain."""

from importlib.util import find_spec

import cv2
import numpy as np
import pytest
import tiny
from mmengine.config import Config


class Skipped(pytest.Module):
    """A file of tests that is not imported."""

    def collect(self):
        pytest.skip("the extra `classification` is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    """Skip the files of this folder, and say so, before they import mmpretrain."""
    if find_spec("mmpretrain") is None:
        return Skipped.from_parent(parent, path=module_path)
    return None


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory):
    """A made-up ImageNet: 1000 folders in ``train`` and in ``val``, with pictures in a few."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(1000):
            (root / split / f"n{label:08d}").mkdir(parents=True)
        for label, (height, width) in enumerate([(260, 300), (400, 280), (256, 256), (500, 333)]):
            # Smooth, so that shrinking keeps differences between pictures.
            small = rng.integers(0, 256, (6, 6, 3), np.uint8)
            image = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(str(root / split / f"n{label:08d}" / "picture.png"), image)
    return root


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("classification")


@pytest.fixture(scope="session")
def root(folder):
    """Pictures of four classes."""
    return tiny.class_folders(folder / "data")


@pytest.fixture(scope="session")
def config_file(folder, root):
    """The tiny classifier's config as a file for command lines."""
    config = tiny.classifier(root)
    config.work_dir = str(folder / "run")
    path = folder / "tiny.py"
    config.dump(path)
    return path


@pytest.fixture(scope="session")
def trained(config_file, folder):
    """A checkpoint whose answers differ from picture to picture."""
    (folder / "weights").mkdir()
    return tiny.save_trained(Config.fromfile(config_file), folder / "weights")
