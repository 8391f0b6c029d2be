# SPDX-License-Identifier: Apache-2.0
"""Run exported ExecuTorch files, as onnxruntime runs ONNX files.

In Python, ExecuTorch takes and gives PyTorch's tensors; its C++, Swift and Java runtimes do without
PyTorch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmeformer.runtime.litert import Value
from mmeformer.runtime.metadata import KEY

SUFFIX = ".pte"

FORWARD = "forward"
OUTPUTS = "output_names"
"""Methods of a file: the model, and the names of its outputs as JSON. :data:`KEY` is the metadata.
"""


@dataclass(frozen=True)
class ModelMeta:
    """Metadata of a file, as onnxruntime gives it."""

    custom_metadata_map: Mapping[str, str]


class ExecuTorchSession:
    """An ExecuTorch file with the methods of an onnxruntime session that predictors call.

    Args:
        path: of the file.
        threads: of all files in the process; 0 lets ExecuTorch choose.

    Raises:
        ValueError: ExecuTorch is not installed, or this is not one of our files.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        try:
            import torch
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
        except ImportError:
            raise ValueError(
                f"{path} needs ExecuTorch, which is not installed: pip install executorch"
            ) from None
        self._torch = torch
        if threads:
            portable_lib._unsafe_reset_threadpool(threads)
        try:
            # ExecuTorch reads the weights in place: the program keeps the bytes.
            self._program = Runtime.get().load_program(path.read_bytes())
            self._outputs = [Value(name) for name in json.loads(self._constant(OUTPUTS))]
            self._forward = self._program.load_method(FORWARD)
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path}: ExecuTorch cannot load it ({error})") from error

    def _constant(self, name: str) -> str:
        (text,) = self._program.load_method(name).execute([])
        return str(text)

    def get_modelmeta(self) -> ModelMeta:
        """The metadata."""
        return ModelMeta({KEY: self._constant(KEY)})

    def get_inputs(self) -> list[Value]:
        """The inputs, in order: one."""
        return [Value("image")]

    def get_outputs(self) -> list[Value]:
        """The outputs, in order."""
        return self._outputs

    def run(self, names: None, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """All outputs in order, given the inputs by name.

        Raises:
            ValueError: an input has another shape, or this ExecuTorch is for another PyTorch.
        """
        image = self._torch.from_numpy(np.ascontiguousarray(inputs["image"]))
        try:
            return [value.numpy() for value in self._forward.execute([image])]
        except RuntimeError as error:
            (reason, *_) = str(error).splitlines()
            raise ValueError(
                f"ExecuTorch cannot run this file ({reason}): install the version that was built "
                f"for torch {self._torch.__version__}; see docs/deployment.md"
            ) from error
