# SPDX-License-Identifier: Apache-2.0
"""Run exported models with only numpy, OpenCV and onnxruntime: no PyTorch, no OpenMMLab.

TensorFlow Lite files need LiteRT (``ai-edge-litert``) too, and ExecuTorch files ``executorch``,
which brings PyTorch.

.. code-block:: python

    from mmeformer import runtime

    model = runtime.load("model.onnx")
    found = model.predict("photo.jpg")
    print([model.metadata.classes[label] for label in found.labels], found.boxes)
"""

from mmeformer.results import (
    Classification,
    Detections,
    Pyramid,
    RotatedDetections,
    Segmentation,
)
from mmeformer.runtime.metadata import Metadata
from mmeformer.runtime.predictor import Predictor, load

__all__ = [
    "Classification",
    "Detections",
    "Metadata",
    "Predictor",
    "Pyramid",
    "RotatedDetections",
    "Segmentation",
    "load",
]
