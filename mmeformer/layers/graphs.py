# SPDX-License-Identifier: Apache-2.0
"""Tell whether a forward pass is being recorded as a graph."""

from __future__ import annotations

import torch
from torch import Tensor


def in_graph() -> bool:
    """Whether ``torch.compile`` or a tracer (the ONNX and CoreML exports) records operators.

    Branches and Python arithmetic that depend on the size of a map would become constants of the
    graph, and the bias cache, which compares values, would break it.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def eager_on_gpu(x: Tensor) -> bool:
    """Whether operators are launched one by one on a GPU: where some need another form."""
    return x.device.type == "cuda" and not in_graph()


def in_export() -> bool:
    """Whether a graph for another runtime (ONNX, CoreML, LiteRT) is recorded, never to train."""
    exporting = getattr(torch.compiler, "is_exporting", None)  # not in torch 2.6
    return torch.jit.is_tracing() or (exporting is not None and bool(exporting()))
