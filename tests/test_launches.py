# SPDX-License-Identifier: Apache-2.0
"""Operators and waits of a training step of each task, without the backbone."""

import copy

import pytest
import tiny
import torch
from launches import Launches
from samples import random_sample

from mmeformer import configs
from mmeformer.deploy import models

SIZE = 128
PUBLISHED = {
    "focal": "rotated/rotated-gfl-le135_efficientformerv2-s0_fpn_1x_dota.py",
    "gfl": "rotated/rotated-gfl-le135_efficientformerv2-s0_fpn_qfl-dfl-1x_dota.py",
}


@pytest.fixture(scope="module")
def model(request):
    """The detector with few channels; the number of operators is that of the full one."""
    task, _, losses = request.param.partition(", ")
    config = tiny.network(task)
    if task == "rotated":
        head = config.model.bbox_head
        head.stacked_convs = 4
        published = configs.load_config(PUBLISHED[losses]).model.bbox_head
        head.loss_cls, head.loss_dfl = published.loss_cls, published.get("loss_dfl")
    torch.manual_seed(0)
    built = models.build_model(config).train()
    with torch.no_grad():
        feats = built.backbone(torch.randn(4, 3, SIZE, SIZE))
    # What the backbone computes is no matter here.
    built.backbone.forward = lambda images: [f[: len(images)].requires_grad_() for f in feats]
    built.task = task
    return built


def step(model, images=2, objects=10) -> tuple[Launches, Launches]:
    """Forward and backward pass of neck, heads and losses, at a size that came before."""
    samples = [random_sample(model.task, objects, SIZE) for _ in range(images)]
    inputs = torch.zeros(images, 3, SIZE, SIZE)
    model.loss(inputs, copy.deepcopy(samples))
    with Launches() as forward:
        losses = model.loss(inputs, samples)
    total, _ = model.parse_losses(losses)
    with Launches() as backward:
        total.backward()
    return forward, backward


# What a step takes, and a little room for other versions of the libraries. A number that falls
# below its ceiling by much lowers the ceiling; none of them should ever rise.
CEILINGS = {
    "detection": dict(forward=775, backward=185, waits=12),
    # Two of the waits are in mmdet's focal loss, only on a CPU.
    "rotated, focal": dict(forward=525, backward=500, waits=3),
    # One in mmdet's quality focal loss.
    "rotated, gfl": dict(forward=670, backward=515, waits=2),
    # In mmseg's accuracy.
    "segmentation": dict(forward=100, backward=75, waits=2),
}


@pytest.mark.parametrize(
    "model, ceilings", CEILINGS.items(), ids=list(CEILINGS), indirect=["model"]
)
def test_a_step_of_two_images_of_ten_objects_stays_below_its_ceilings(model, ceilings):
    forward, backward = step(model)
    assert forward.operators.total() <= ceilings["forward"], forward.operators
    assert backward.operators.total() <= ceilings["backward"], backward.operators
    assert forward.waits.total() <= ceilings["waits"], forward.waits
    assert not backward.waits


@pytest.mark.parametrize("model", ["detection", "rotated, focal"], indirect=True)
def test_the_number_of_objects_does_not_matter(model, monkeypatch):
    # Chunks as on a GPU: those of a CPU fit its cache.
    monkeypatch.setattr("mmeformer.ops.rotated._IOU_PAIRS", {})
    few, many = (step(model, objects=number)[0] for number in (10, 200))
    assert few.waits == many.waits
    # Masks are cropped in one of two ways, and a level may have no region.
    assert abs(few.operators.total() - many.operators.total()) <= 20


@pytest.mark.parametrize("model", ["rotated, focal", "rotated, gfl"], indirect=True)
def test_images_share_operators_and_waits(model):
    two, four = (step(model, images=number)[0] for number in (2, 4))
    assert two.waits == four.waits
    assert four.operators.total() - two.operators.total() <= 8


def test_counts_launches_and_waits():
    """Known numbers: views are free, and a mask is read to know how many values it has."""
    numbers = torch.arange(6.0)
    with Launches() as counts:
        twice = numbers.view(2, 3).T * 2
        twice[twice > 4] = 0
        twice[twice > 2].sum().item()
        numbers[[0, 1]].tolist()
        numbers.new_tensor([1.0])
        torch.as_tensor(numbers).cpu()
    assert counts.operators["mul"] == counts.operators["sum"] == 1
    assert counts.operators["gt"] == 2
    assert not {"view", "t", "permute"} & set(counts.operators)
    assert counts.waits == {
        "index": 1,
        "_local_scalar_dense": 1,
        "index by a list": 1,
        "tolist": 1,
        "new_tensor": 1,
        "cpu": 1,
    }
