# SPDX-License-Identifier: Apache-2.0
import copy
from pathlib import Path

import cv2
import numpy as np
import pytest
from tiny import Trained, exported, save_trained, small_config

from mmeformer.tasks import TASKS


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """``trained(task)``: a small model of a task; made once."""
    made = {}

    def make(task: str) -> Trained:
        if task not in made:
            for library in TASKS[task].libraries:
                pytest.importorskip(library)
            config = small_config(task)
            folder = tmp_path_factory.mktemp(task)
            made[task] = Trained(config, save_trained(config, folder), folder)
        # Building a model changes its config.
        return Trained(copy.deepcopy(made[task].config), made[task].checkpoint, made[task].folder)

    return make


@pytest.fixture(scope="session")
def exports(trained, picture, tmp_path_factory):
    """``exports(task, **request)``: the export of a small model, and the lines of its check.

    Each is made once, to be read only. Tests that need any file of a task ask for one of those
    whose check ``test_export.py`` looks at.
    """
    made = {}

    def make(task: str, **request) -> tuple[Path, list[str]]:
        key = (task, *sorted(request.items()))
        if key not in made:
            lines = []
            folder = tmp_path_factory.mktemp("exported")
            path = exported(trained(task), picture, lines=lines, folder=folder, **request)
            made[key] = path, lines
        return made[key]

    return make


@pytest.fixture(scope="session")
def onnx_file(exports):
    """``onnx_file(task, **request)``: the file alone."""
    return lambda task, **request: exports(task, **request)[0]


@pytest.fixture(scope="session")
def picture(tmp_path_factory) -> Path:
    """An image file of 50 x 90 px with some shapes."""
    image = np.full((50, 90, 3), 90, np.uint8)
    cv2.circle(image, (25, 25), 15, (200, 60, 20), -1)
    cv2.rectangle(image, (50, 12), (80, 40), (30, 180, 220), -1)
    path = tmp_path_factory.mktemp("picture") / "shapes.png"
    cv2.imwrite(str(path), image)
    return path
