# SPDX-License-Identifier: Apache-2.0
"""Whether a forward pass runs or is being written down as a graph."""

from __future__ import annotations

import torch


def in_graph() -> bool:
    """Whether ``torch.compile`` or a tracer (the ONNX and CoreML exports) records operators.

    Choices and Python arithmetic by the size of a map would be frozen into its graph, and the bias
    cache, which compares values, would break it.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
