# SPDX-License-Identifier: Apache-2.0
"""``--deterministic`` trains without operators that PyTorch refuses on a GPU then."""

import pytest
import tiny
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from mmeformer.training.deterministic import deterministic_kernels

REFUSED = (
    # torch.use_deterministic_algorithms, "will throw a RuntimeError", by their names in ATen;
    # roi_align is torchvision's.
    *("avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("max_pool3d_with_indices_backward", "adaptive_max_pool2d_backward"),
    *("fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
    *("max_unpool2d", "max_unpool3d", "reflection_pad1d_backward", "reflection_pad2d_backward"),
    *("reflection_pad3d_backward", "nll_loss2d_forward", "nll_loss2d_backward"),
    *("_ctc_loss_backward", "put_", "histc", "grid_sampler_2d_backward", "roi_pool_backward"),
    "_embedding_bag_dense_backward",
)
"""Interpolation is not among them: ``torch.nn.functional`` computes it in another way on a GPU."""


def is_refused(name, args, kwargs):
    if name == "cumsum":
        return args[0].is_floating_point()
    if name == "bincount":
        return (args[1] if len(args) > 1 else kwargs.get("weights")) is not None
    if name in ("median", "kthvalue", "nanmedian"):
        return len(args) > 1
    if name in ("scatter_reduce", "scatter_reduce_"):
        return "prod" in args
    return name in REFUSED


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.refused = set()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        self.count += 1
        if is_refused(name, args, kwargs or {}):
            self.refused.add(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def validated(config):
    config.train_cfg.val_interval = 1
    return config


@pytest.mark.parametrize("task", tiny.all_tasks())
def test_trainings_and_validations_need_none(tmp_path, task, deterministic):
    with Recorder() as seen:
        tiny.train(validated(tiny.ALL_TASKS[task](tmp_path, 2)), tmp_path / "run")
    assert not seen.refused and seen.count > 1000


@pytest.mark.parametrize("model", [tiny.boxes_only, tiny.with_masks])
def test_light_detectors_need_none(tmp_path, model, deterministic):
    with Recorder() as seen:
        tiny.train(validated(model(tmp_path, 2)), tmp_path / "run")
    assert not seen.refused and seen.count > 1000


def test_they_are_seen_without(tmp_path):
    """The tests above would notice."""
    with Recorder() as seen:
        tiny.train(validated(tiny.segmentation(tmp_path, 2)), tmp_path / "run")
    assert seen.refused == {"nll_loss2d_forward", "nll_loss2d_backward", "histc"}


@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (3, 5, 4), (2, 5, 2, 3, 4), (8, 5)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(shape, reduction, weighted, deterministic):
    torch.manual_seed(0)
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, (shape[0], *shape[2:]))
    target[0] = 255
    options = dict(
        weight=torch.rand(5, dtype=torch.float64) if weighted else None,
        reduction=reduction,
        ignore_index=255,
        label_smoothing=0.1,
    )
    expected = functional.cross_entropy(logits, target, **options)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    with deterministic_kernels(), Recorder() as seen:
        loss = functional.cross_entropy(logits, target, **options)
        (found,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.shape == expected.shape and not seen.refused
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, gradient)


def test_cross_entropy_of_probabilities(deterministic):
    logits, target = torch.randn(2, 5, 3, 3), torch.rand(2, 5, 3, 3)
    expected = functional.cross_entropy(logits, target)
    with deterministic_kernels():
        assert functional.cross_entropy(logits, target) == expected


@pytest.mark.parametrize("limits", [{}, dict(min=0, max=4), dict(min=-2.5, max=1)])
@pytest.mark.parametrize("bins", [1, 5, 17])
@pytest.mark.parametrize("values", [torch.arange(-4.0, 6), torch.randn(99), torch.ones(3)])
def test_histogram(limits, bins, values, deterministic):
    expected = torch.histc(values, bins, **limits)
    with deterministic_kernels(), Recorder() as seen:
        found = torch.histc(values, bins, **limits)
    assert torch.equal(found, expected) and found.dtype == expected.dtype and not seen.refused


def test_only_if_wanted():
    with deterministic_kernels(), Recorder() as seen:
        functional.cross_entropy(torch.randn(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.long))
    assert seen.refused == {"nll_loss2d_forward"}
