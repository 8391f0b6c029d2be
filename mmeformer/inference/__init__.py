# SPDX-License-Identifier: Apache-2.0
"""Prediction on files with a trained model of any task: results and pictures.

``mmeformer predict`` is the command line. In a program::

    predictor = load_predictor(load_config("CONFIG.py"), "CHECKPOINT.pth")
    for status in run(predictor, find_sources(["images"]), Path("out"), Settings(batch_size=4)):
        ...
"""

from mmeformer.inference.inputs import find_sources
from mmeformer.inference.loop import Settings, Status, run
from mmeformer.inference.predictor import Predictor, load_predictor

__all__ = ["Predictor", "Settings", "Status", "find_sources", "load_predictor", "run"]
