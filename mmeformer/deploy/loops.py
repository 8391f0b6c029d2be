# SPDX-License-Identifier: Apache-2.0
"""Loops in ONNX files. A trace has none: it records what happens once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

DOMAIN = "mmeformer"
"""Of the nodes that mark the body of a loop in a trace."""


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(count), state.clone()

    @staticmethod
    def symbolic(g: Any, count: Any, state: Any) -> Any:
        marked = g.op(f"{DOMAIN}::Begin", count, state, outputs=2)
        return tuple(
            mark.setType(value.type()) for mark, value in zip(marked, (count, state), strict=True)
        )


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def symbolic(g: Any, state: Any) -> Any:
        return g.op(f"{DOMAIN}::End", state).setType(state.type())


def repeat(count: Tensor, state: Tensor, step: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``state = step(index, state)`` for ``index`` from 0 to ``count - 1``, in a trace for ONNX.

    Args:
        count: of rounds, an ``int64`` without axes.
        state: keeps its shape and type.
        step: is traced once. Both arguments must matter to its result.
    """
    index, state = _Begin.apply(count, state)
    found: Tensor = _End.apply(step(index, state))
    return found


def close_loop(proto: onnx.ModelProto) -> None:
    """Turn what :func:`repeat` marked into an operator ``Loop``, if there is something."""
    nodes = proto.graph.node
    marks = {node.op_type: node for node in nodes if node.domain == DOMAIN}
    if not marks:
        return
    begin, end = marks["Begin"], marks["End"]
    # What depends on the number or the state of a round; constants stay outside.
    inside, body = set(begin.output), []
    for node in nodes:
        if node is not end and not inside.isdisjoint(node.input):
            inside.update(node.output)
            body.append(node)
    index, state = begin.output
    goes_on = f"{state}_goes_on"
    graph = helper.make_graph(
        [helper.make_node("Identity", [goes_on], [f"{goes_on}_too"]), *body],
        "body",
        [
            helper.make_tensor_value_info(index, TensorProto.INT64, []),
            helper.make_tensor_value_info(goes_on, TensorProto.BOOL, []),
            helper.make_tensor_value_info(state, TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info(f"{goes_on}_too", TensorProto.BOOL, []),
            helper.make_tensor_value_info(end.input[0], TensorProto.FLOAT, None),
        ],
    )
    count, first = begin.input
    loop = helper.make_node("Loop", [count, "", first], list(end.output), "loop", body=graph)
    taken = set(map(id, [begin, *body]))
    kept = [loop if node is end else node for node in nodes if id(node) not in taken]
    del nodes[:]
    nodes.extend(kept)
