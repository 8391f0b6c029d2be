# SPDX-License-Identifier: Apache-2.0
"""Logits of whole classifiers, against the reference's and timm's."""

import pytest
import timm
import torch
from golden_weights import golden, image, published_state_dict, relative_error, weight
from helpers import build_backbone
from mmengine.registry import DefaultScope
from torch import nn

from mmeformer.checkpoints.load import load_backbone
from mmeformer.checkpoints.parse import parse_checkpoint

pytest.importorskip("mmpretrain")
from mmpretrain.structures import DataSample

from mmeformer.classification.head import EfficientFormerHead


@pytest.fixture(autouse=True)
def scope():
    """Losses are found by their bare names, whatever scope an earlier test has left."""
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        yield


class Classifier(nn.Module):
    """A backbone and a head with the golden weights, in float64."""

    def __init__(self, variant, state, names):
        super().__init__()
        kwargs = dict(pyramid_norms=False) if variant.family == "v1" else {}
        self.backbone = build_backbone(variant, out_indices=(3,), **kwargs)
        load_backbone(self.backbone, parse_checkpoint(state, variant.name))
        self.head = EfficientFormerHead(variant.family, variant.architecture.widths[3], 1000)
        self.head.load_state_dict(
            {
                f"{ours}.{leaf}": state[f"{theirs}.{leaf}"]
                for ours, theirs in names.items()
                for leaf in getattr(self.head, ours).state_dict()
            }
        )
        self.eval().double()

    def forward(self, x):
        return self.head(self.backbone(x))


@torch.no_grad()
def test_golden_logits(any_variant):
    """In float64, with the tolerance of ``tests/backbones/test_backbones.py``."""
    state = published_state_dict(any_variant.name, "classification")
    model = Classifier(any_variant, state, dict(norm="norm", fc="head", fc_dist="dist_head"))
    tolerance = 2e-5 if any_variant.name == "efficientformerv2_l" else 1e-5
    wanted = golden(any_variant.name)["classification/logits"]
    assert relative_error(model(image(224, 224).double()), wanted) < tolerance


@torch.no_grad()
def test_timms_logits(any_variant):
    theirs = timm.create_model(any_variant.name, pretrained=False).eval()
    state = {
        name: tensor if name.endswith("_idxs") else weight(name, tensor.shape)
        for name, tensor in theirs.state_dict().items()
    }
    theirs.load_state_dict(state)
    model = Classifier(any_variant, state, dict(norm="norm", fc="head", fc_dist="head_dist"))
    x = image(224, 224).double()
    assert relative_error(model(x), theirs.double()(x)) < 1e-5


# --- the head ------------------------------------------------------------------------------------


def samples(labels, classes):
    return [DataSample(metainfo=dict(num_classes=classes)).set_gt_label(label) for label in labels]


@pytest.mark.parametrize("family", ["v1", "v2"])
@pytest.mark.parametrize("distillation", [True, False])
def test_both_classifiers_learn_the_labels_and_count_at_test_time(family, distillation):
    head = EfficientFormerHead(family, 8, 5, distillation)
    head.init_weights()
    feats = (torch.randn(2, 4, 9, 9), torch.randn(4, 8, 3, 3))
    losses = head.loss(feats, samples([0, 1, 2, 4], 5))
    sum(losses.values()).backward()
    assert set(losses) == ({"loss_cls", "loss_dist"} if distillation else {"loss"})
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())
    head.eval()
    x = head.pre_logits(feats)
    heads = [head.fc, head.fc_dist] if distillation else [head.fc]
    assert torch.allclose(head(feats), torch.stack([fc(x) for fc in heads]).mean(0))
    target = torch.tensor([0, 1, 2, 4])
    head.train()
    x = head.pre_logits(feats)
    wanted = [nn.functional.cross_entropy(fc(x), target) / len(heads) for fc in heads]
    assert torch.allclose(sum(losses.values()), sum(wanted), atol=1e-6)


def test_v1_normalizes_places_and_v2_the_batch():
    x = torch.randn(4, 8, 3, 3)
    v1, v2 = EfficientFormerHead("v1", 8, 5), EfficientFormerHead("v2", 8, 5)
    places = nn.functional.layer_norm(x.permute(0, 2, 3, 1), (8,)).mean((1, 2))
    assert torch.allclose(v1.pre_logits((x,)), places, atol=1e-6)
    # A batch norm in training leaves every channel with mean 0 over batch and places.
    assert v2.pre_logits((x,)).mean(0).abs().max() < 1e-6


def test_invalid_arguments_are_named():
    with pytest.raises(ValueError, match="family must be one of v1, v2, but is 'v3'"):
        EfficientFormerHead("v3", 8, 5)
    with pytest.raises(ValueError, match="num_classes must be at least 1, but is 0"):
        EfficientFormerHead("v1", 8, 0)


def test_v1_without_the_norms_of_the_pyramid(small_variant):
    if small_variant.family == "v2":
        with pytest.raises(TypeError):
            build_backbone(small_variant, pyramid_norms=False)
        return
    backbone = build_backbone(small_variant, pyramid_norms=False)
    assert not any(name.startswith("norms.") for name in backbone.state_dict())
    report = load_backbone(
        backbone, parse_checkpoint(published_state_dict(small_variant.name, "classification"), "f")
    )
    assert report.new == {} and report.unused == {}
