# SPDX-License-Identifier: Apache-2.0
"""Run exported TensorFlow Lite files with LiteRT, as onnxruntime runs ONNX files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

SUFFIX = ".tflite"
SIGNATURE = "serving_default"


@dataclass(frozen=True)
class Value:
    """An input or an output of a file."""

    name: str


class LiteRtSession:
    """A TensorFlow Lite file with the methods of an onnxruntime session that predictors call.

    Args:
        path: of the file.
        threads: per operator; 0 lets LiteRT choose.

    Raises:
        ValueError: LiteRT is not installed, or this is not one of our files.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError:
            raise ValueError(
                f"{path} needs LiteRT, which is not installed: pip install ai-edge-litert"
            ) from None
        try:
            self._interpreter = Interpreter(str(path), num_threads=threads or None)
            signature = self._interpreter.get_signature_list()[SIGNATURE]
        except (ValueError, RuntimeError, KeyError) as error:
            raise ValueError(f"{path}: LiteRT cannot load it ({error})") from error
        self._names = signature
        self._run = self._interpreter.get_signature_runner(SIGNATURE)

    def get_inputs(self) -> list[Value]:
        """The inputs, in order."""
        return [Value(name) for name in self._names["inputs"]]

    def get_outputs(self) -> list[Value]:
        """The outputs, in order."""
        return [Value(name) for name in self._names["outputs"]]

    def run(self, names: None, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """All outputs in order, given the inputs by name."""
        found = self._run(**inputs)
        return [found[value.name] for value in self.get_outputs()]
