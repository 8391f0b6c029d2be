# SPDX-License-Identifier: Apache-2.0
"""From a trained model and files to pictures and results, for the three tasks.

``tools/predict.py`` is the command line. In a program::

    predictor = load_predictor(load_config("CONFIG.py"), "CHECKPOINT.pth")
    for outcome in run(predictor, find_sources(["images"], out), out, Settings(batch_size=4)):
        ...
"""

from mmeformer.inference.inputs import find_sources
from mmeformer.inference.loop import Outcome, Settings, run
from mmeformer.inference.predictor import Predictor, load_predictor

__all__ = ["Outcome", "Predictor", "Settings", "find_sources", "load_predictor", "run"]
