# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from filelock import FileLock
from tiny import Trained, exported, small_trained

from mmeformer.tasks import TASKS


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """``trained(task)``: a small model of a task; made once."""
    made = {}

    def make(task: str) -> Trained:
        if task not in made:
            for library in TASKS[task].libraries:
                pytest.importorskip(library)
            made[task] = small_trained(tmp_path_factory.mktemp(task), task)
        return made[task].copy()

    return make


@pytest.fixture(scope="session")
def exports(trained, picture, tmp_path_factory):
    """``exports(task, **request)``: the export of a small model, and the lines of its check.

    Each is made once for all processes of the tests, to be read only. Tests that need any file of
    a task ask for one of those whose check ``test_export.py`` looks at.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    root = root / "exports"
    root.mkdir(exist_ok=True)

    def make(task: str, **request) -> tuple[Path, list[str]]:
        key = repr((task, *sorted(request.items())))
        folder = root / hashlib.sha256(key.encode()).hexdigest()[:12]
        record = folder.with_suffix(".lines")
        with FileLock(folder.with_suffix(".lock")):
            if not record.exists():
                lines: list[str] = []
                folder.mkdir(exist_ok=True)
                exported(trained(task), picture, lines=lines, folder=folder, **request)
                record.write_text(json.dumps(lines))
        return folder / "model.onnx", json.loads(record.read_text())

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
