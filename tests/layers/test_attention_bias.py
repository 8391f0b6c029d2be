# SPDX-License-Identifier: Apache-2.0
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmeformer.layers.attention_bias import (
    AttentionBias,
    expand_offset_table,
    resample_in_graph,
    resize_offset_table,
)

sides = st.integers(1, 9)


@settings(max_examples=40)
@given(sides, sides, st.sampled_from([1, 2]))
def test_expansion_is_the_index_table_of_the_paper(height, width, stride):
    table = torch.rand(3, height, width)
    expanded = expand_offset_table(table, stride)
    queries = [(y, x) for y in range(0, height, stride) for x in range(0, width, stride)]
    keys = [(y, x) for y in range(height) for x in range(width)]
    assert expanded.shape == (3, len(queries), len(keys))
    for i, (qy, qx) in enumerate(queries):
        for j, (ky, kx) in enumerate(keys):
            assert torch.equal(expanded[:, i, j], table[:, abs(qy - ky), abs(qx - kx)])


@settings(max_examples=60)
@given(sides, sides, st.integers(1, 40), st.integers(1, 40))
def test_resize_is_linear_interpolation_at_the_same_share_of_the_image(
    rows, columns, height, width
):
    table = torch.rand(2, rows, columns, dtype=torch.float64)
    resized = resize_offset_table(table, (height, width))
    for head in range(2):
        # numpy.interp also stays at the last entry beyond the last offset.
        lines = np.stack(
            [
                np.interp(np.arange(height) * rows / height, np.arange(rows), column)
                for column in table[head].numpy().T
            ],
            axis=1,
        )
        wanted = np.stack(
            [
                np.interp(np.arange(width) * columns / width, np.arange(columns), line)
                for line in lines
            ]
        )
        np.testing.assert_allclose(resized[head].numpy(), wanted, atol=1e-12)


def test_whole_multiples_keep_every_entry_exactly():
    table = torch.rand(8, 7, 7)
    assert torch.equal(resize_offset_table(table, (14, 14))[:, ::2, ::2], table)
    assert torch.equal(resize_offset_table(table, (21, 42))[:, ::3, ::6], table)
    assert resize_offset_table(table, (7, 7)) is table


@pytest.mark.parametrize("stride", [1, 2])
def test_matrix_mode_is_a_bicubic_resize_of_the_spelt_out_matrix(stride):
    bias = AttentionBias(2, (6, 6), stride, "matrix")
    torch.nn.init.normal_(bias.table)
    queries = -(-5 // stride) * -(-8 // stride)
    wanted = F.interpolate(
        expand_offset_table(bias.table, stride)[None],
        size=(queries, 40),
        mode="bicubic",
        align_corners=False,
    )[0]
    assert torch.equal(bias((5, 8)), wanted)


def test_modes_differ_only_on_other_grids():
    displacement, matrix = (
        AttentionBias(2, (4, 4), 1, mode) for mode in ("displacement", "matrix")
    )
    torch.nn.init.normal_(displacement.table)
    matrix.load_state_dict(displacement.state_dict())
    torch.testing.assert_close(displacement((4, 4)), matrix((4, 4)))
    assert (displacement((4, 6)) - matrix((4, 6))).abs().max() > 0.1


def test_resized_bias_still_depends_on_displacement_alone():
    bias = AttentionBias(1, (7, 7))
    torch.nn.init.normal_(bias.table)
    height, width = 5, 11
    matrix = bias((height, width))[0].view(height, width, height, width)
    for qy, qx, ky, kx in torch.randint(0, 4, (50, 4)).tolist():
        assert matrix[qy, qx, ky, kx] == matrix[abs(qy - ky), abs(qx - kx), 0, 0]


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="bias_resize .*'cubic'"):
        AttentionBias(1, (7, 7), resize="cubic")


class TestCache:
    size = (5, 9)

    @pytest.fixture(params=["displacement", "matrix"])
    def bias(self, request):
        bias = AttentionBias(2, (7, 7), 1, request.param).eval()
        torch.nn.init.normal_(bias.table)
        return bias

    @torch.no_grad()
    def use(self, bias):
        """The bias as eval code gets it, checked against a fresh computation."""
        used = bias(self.size)
        assert torch.equal(used, bias.compute(self.size))
        return used

    def test_is_used(self, bias):
        assert self.use(bias) is self.use(bias)

    @pytest.mark.parametrize(
        "change",
        [
            lambda b: b.table.data.add_(1),
            lambda b: b.table.data.copy_(torch.rand_like(b.table)),
            lambda b: b.load_state_dict({"table": torch.rand_like(b.table)}),
            lambda b: b.double(),
            lambda b: b.half().float(),
            lambda b: setattr(b, "table", torch.nn.Parameter(torch.rand(2, 4, 4))),
        ],
        ids=["data", "data_copy", "load", "double", "half_and_back", "another_table"],
    )
    def test_is_dropped_when_the_table_changes(self, bias, change):
        before = self.use(bias)
        with torch.no_grad():
            change(bias)
        after = self.use(bias)
        assert after.dtype == bias.table.dtype
        assert not torch.equal(before.double(), after.double())

    def test_is_dropped_by_training(self, bias):
        before = self.use(bias)
        bias.train()
        optimizer = torch.optim.SGD(bias.parameters(), lr=1.0)
        bias(self.size).square().sum().backward()
        optimizer.step()
        bias.eval()
        assert not torch.equal(before, self.use(bias))

    def test_gradients_pass_in_eval_mode(self, bias):
        self.use(bias)
        bias(self.size).sum().backward()
        assert bias.table.grad.abs().sum() > 0

    def test_made_in_inference_mode_serves_autograd_afterwards(self, bias):
        with torch.inference_mode():
            bias(self.size)
        bias.table.requires_grad_(False)
        query = torch.rand(2, 45, 45, requires_grad=True)
        (query * bias(self.size)).sum().backward()
        assert torch.equal(query.grad, bias.compute(self.size))

    def test_holds_few_sizes(self, bias):
        with torch.no_grad():
            for width in range(1, 20):
                bias((3, width))
        assert len(bias._cache) == AttentionBias.MAX_CACHED_SIZES

    def test_is_not_copied(self, bias):
        self.use(bias)
        clone = copy.deepcopy(bias)
        assert not clone._cache and clone._cached_table is None
        self.use(clone)

    def test_is_float32_under_autocast(self, bias):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            used = bias(self.size)
        assert used.dtype == torch.float32
        assert torch.equal(used, bias.compute(self.size))


def test_gradient_of_the_table_is_exact():
    bias = AttentionBias(1, (3, 3), 2).double()
    torch.nn.init.normal_(bias.table)
    assert torch.autograd.gradcheck(
        lambda table: expand_offset_table(resize_offset_table(table, (4, 5)), 2), (bias.table,)
    )


def test_graphs_for_any_size_hold_no_float64():
    """onnxruntime-web cannot run them on a GPU; whole offsets stay whole all the same."""
    table = torch.arange(12.0).expand(2, 5, 12).contiguous()
    traced = torch.jit.trace(lambda x: resample_in_graph(x, -1, 84), table)
    assert "Double" not in str(traced.graph)
    assert torch.equal(traced(table)[..., ::7], table)


def test_a_trace_is_the_same_twice():
    """``torch.jit.trace`` compares two; the second must not find offsets that the first cached."""
    bias = AttentionBias(2, (13, 13)).requires_grad_(False)
    traced = torch.jit.trace(lambda x: x + bias((9, 5)), torch.zeros(1))
    torch.testing.assert_close(traced(torch.ones(1)), 1 + bias((9, 5)))
