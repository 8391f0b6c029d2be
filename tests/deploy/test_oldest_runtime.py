# SPDX-License-Identifier: Apache-2.0
"""Every kind of exported file in the oldest onnxruntime that is promised."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import EXPORTS

from mmeformer import runtime
from mmeformer.deploy.onnx import OLDEST_RUNTIME

ROOT = Path(__file__).resolve().parents[2]


def numbers(found):
    """Shape and sum of every array of a result."""
    if hasattr(found, "levels"):
        arrays = found.levels
    else:
        names = ("boxes", "scores", "labels")
        arrays = [getattr(found, name) for name in names if hasattr(found, name)]
    return [[list(array.shape), float(array.sum(dtype="float64"))] for array in arrays]


# Runs in the old environment, without PyTorch.
PREDICT = f"""
import json, sys, onnxruntime
from mmeformer import runtime
{inspect.getsource(numbers)}
picture, *files = sys.argv[1:]
results = [numbers(runtime.load(file).predict(picture)) for file in files]
print(json.dumps([onnxruntime.__version__, results]))
"""


@pytest.mark.install
@pytest.mark.skipif(
    sys.version_info >= (3, 12), reason=f"onnxruntime {OLDEST_RUNTIME} has no wheels for 3.12"
)
def test_files_in_the_oldest_promised_onnxruntime(onnx_file, picture, tmp_path):
    files = [str(onnx_file(task, **request)) for task, request in EXPORTS]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv/bin/python")
    packages = [f"onnxruntime=={OLDEST_RUNTIME}", "numpy<2", "opencv-python-headless<4.11"]
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [python, "-c", PREDICT, str(picture), *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    version, old = json.loads(done.stdout)
    assert version == OLDEST_RUNTIME

    for file, expected in zip(files, old, strict=True):
        ours = numbers(runtime.load(file).predict(picture))
        assert [shape for shape, _ in ours] == [shape for shape, _ in expected], file
        np.testing.assert_allclose(
            [total for _, total in ours], [total for _, total in expected], rtol=1e-3, atol=1e-2
        )


def test_the_promise_is_written_down():
    short = OLDEST_RUNTIME.rpartition(".")[0]
    assert f"onnxruntime>={short}" in (ROOT / "setup.py").read_text()
    assert f"stock onnxruntime from {short}" in (ROOT / "docs/deployment.md").read_text()
