# SPDX-License-Identifier: Apache-2.0
"""Run exported ONNX files in OpenVINO.

.. code-block:: python

    from mmeformer.runtime import openvino

    found = openvino.load("model.onnx", device="GPU").predict("photo.jpg")
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmeformer.files import refuse_url
from mmeformer.runtime.litert import Value
from mmeformer.runtime.metadata import Metadata
from mmeformer.runtime.predictor import Predictor


def load(path: str | Path, device: str = "CPU", threads: int = 0) -> Predictor:
    """Load an ONNX file that ``mmeformer export`` wrote, and the JSON file beside it.

    Args:
        path: the ``.onnx`` file.
        device: of OpenVINO, such as ``"CPU"``, ``"GPU"`` or ``"NPU"``.
        threads: on a CPU; 0 lets OpenVINO choose.

    Raises:
        FileNotFoundError: no such file, or none beside it.
        ValueError: OpenVINO is not installed, cannot read the file or has no such device.
    """
    refuse_url(path, "model")
    path = Path(path)
    for file in (path, path.with_suffix(".json")):
        if not file.is_file():
            raise FileNotFoundError(f"model {file} does not exist")
    metadata = Metadata.from_json(path.with_suffix(".json").read_text(encoding="utf-8"), path)
    return Predictor(OpenVinoSession(path, device, threads), metadata)


class OpenVinoSession:
    """A model in OpenVINO with the methods of an onnxruntime session that predictors call.

    Computes in float32 where the device does.
    """

    def __init__(self, path: Path, device: str, threads: int) -> None:
        try:
            import openvino
        except ImportError:
            raise ValueError(
                f"{path} needs OpenVINO, which is not installed: pip install openvino"
            ) from None
        # Processors with bfloat16 would round by default.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"} if device == "CPU" else {}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            self._model = openvino.Core().compile_model(str(path), device, settings)
        except Exception as error:  # OpenVINO's errors have no common base but this one
            raise ValueError(f"{path}: OpenVINO cannot load it ({error})") from error

    def get_inputs(self) -> list[Value]:
        """The inputs, in order."""
        return [Value(_name(value.names)) for value in self._model.inputs]

    def get_outputs(self) -> list[Value]:
        """The outputs, in order."""
        return [Value(_name(value.names)) for value in self._model.outputs]

    def run(self, names: None, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """All outputs in order, given the inputs by name."""
        found = self._model(dict(inputs))
        return [np.array(found[value.name]) for value in self.get_outputs()]


def _name(names: Iterable[str]) -> str:
    """The file's own name of a value: those of removed neighbors are paths of modules."""
    return min(names, key=lambda name: ("/" in name, name))
