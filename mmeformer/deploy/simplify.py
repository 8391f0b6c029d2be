# SPDX-License-Identifier: Apache-2.0
"""Simplify ONNX graphs: what does not depend on the inputs becomes a constant."""

from __future__ import annotations

import onnx
import onnx_ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import (
    collapse_slice2_rule,
    collapse_slice_rule,
    reshape_reshape_rule,
)

LARGEST_CONSTANT = 2**14
"""Numbers that a new constant may add to the file. Larger ones, such as attention biases, stay
operators: runtimes compute them once, when they load the file."""

ROUNDS = 3
"""Folded shapes make more shapes known."""


def simplify(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants, and remove what the outputs do not need, unused operator sets included.

    A graph of a fixed size has no arithmetic of shapes afterwards. The results stay the same to
    the last bit.
    """
    model = onnx_ir.from_proto(proto)
    for _ in range(ROUNDS):
        fold_constants_ir(
            model,
            onnx_shape_inference=True,
            input_size_limit=2**31,
            output_size_limit=LARGEST_CONSTANT,
            # Left out by default, whatever its size.
            should_fold=lambda node: True if node.op_type == "ConstantOfShape" else None,
        )
        common.RemoveUnusedNodesPass()(model)
    for step in (
        RewritePass([collapse_slice_rule, collapse_slice2_rule, reshape_reshape_rule]),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        step(model)
    return onnx_ir.to_proto(model)
