# SPDX-License-Identifier: Apache-2.0
"""Heads of published classifiers: loaded and converted in every format, both ways."""

import pytest
import timm
import torch
from golden_weights import image, manifest, relative_error, weight
from helpers import build_backbone
from torch import nn

from mmeformer.checkpoints import formats
from mmeformer.checkpoints.convert import convert_content
from mmeformer.checkpoints.load import load_backbone, load_pretrained, use_published
from mmeformer.checkpoints.matching import require_match
from mmeformer.checkpoints.parse import parse_checkpoint
from mmeformer.errors import CheckpointError
from mmeformer.variants import VARIANTS

L1 = VARIANTS["efficientformer_l1"]
S0 = VARIANTS["efficientformerv2_s0"]
TARGETS = {
    "native": formats.NATIVE,
    "reference": formats.REFERENCE,
    "timm": formats.TIMM,
    "huggingface": formats.HUGGINGFACE,
    "mmpretrain": formats.MMPRETRAIN,
}


class Head(nn.Module):
    """The tensors of a head; what is computed with them is for tests/classification."""

    def __init__(self, variant, classes=1000, distillation=True):
        super().__init__()
        width = variant.architecture.widths[3]
        self.norm = nn.LayerNorm(width) if variant.family == "v1" else nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)
        self.fc_dist = nn.Linear(width, classes) if distillation else None


class Model(nn.Module):
    def __init__(self, variant, **head):
        super().__init__()
        norms = dict(pyramid_norms=False) if variant.family == "v1" else {}
        self.backbone = build_backbone(variant, **norms)
        self.head = Head(variant, **head)


def published(variant, form="classification"):
    """A classifier with the values of tests/golden_weights.py, computed indices included."""
    return {
        name: torch.zeros(shape, dtype=torch.long) if "_idxs" in name else weight(name, shape)
        for name, shape in manifest()[variant.name][form].items()
    }


def numbered(variant, form):
    """A published file with a number of its own in every tensor, taking no memory."""
    return {
        name: torch.tensor(float(number)).expand(shape)
        for number, (name, shape) in enumerate(manifest()[variant.name][form].items())
    }


@pytest.mark.parametrize("to", TARGETS)
def test_every_tensor_is_converted_and_returns(to, any_variant):
    variant = any_variant
    if variant.family not in TARGETS[to].families:
        with pytest.raises(CheckpointError, match="does not have"):
            convert_content(numbered(variant, "classification"), "published.pth", to)
        return
    for source in {"classification", "huggingface"} & manifest()[variant.name].keys():
        check_there_and_back(variant, source, to)


def check_there_and_back(variant, source, to):
    state = numbered(variant, source)
    there, report = convert_content(state, "published.pth", to)
    indices = {name for name in state if "attention_bias_idxs" in name}
    assert set(report.dropped) == {formats.INDICES}
    assert set(report.dropped[formats.INDICES]) == indices
    assert len(report.loaded) + len(report.head) + len(indices) == len(state)
    assert len(report.head) == {"v1": 6, "v2": 9}[variant.family]

    back_to = {"classification": "reference", "huggingface": "huggingface"}[source]
    back, report = convert_content(there, "there.pth", back_to)
    (back,) = [value for key, value in back.items() if key != "meta"]
    assert report.dropped == {} and report.unused == {}
    assert set(back) == set(state) - indices
    for name, tensor in back.items():
        first = (0,) * tensor.dim()
        assert tensor.shape == state[name].shape and tensor[first] == state[name][first], name


def test_names_are_those_that_were_published(any_variant):
    """Converted from the reference's names: those of timm and of transformers."""
    variant = any_variant
    state = numbered(variant, "classification")
    with torch.device("meta"):
        theirs = {n: t.shape for n, t in timm.create_model(variant.name).state_dict().items()}
    converted, _ = convert_content(state, "published.pth", "timm")
    shapes = {name: tensor.shape for name, tensor in converted["state_dict"].items()}
    assert shapes == {n: shape for n, shape in theirs.items() if "attention_bias_idxs" not in n}
    if variant.family == "v1":
        converted, _ = convert_content(state, "published.pth", "huggingface")
        shapes = {name: list(tensor.shape) for name, tensor in converted["state_dict"].items()}
        stored = manifest()[variant.name]["huggingface"].items()
        assert shapes == {name: shape for name, shape in stored if "_idxs" not in name}


@pytest.mark.parametrize(
    "name",
    [
        L1.name,
        *(pytest.param(f"efficientformer_{arch}", marks=pytest.mark.slow) for arch in ("l3", "l7")),
    ],
)
def test_names_are_those_of_mmpretrain(name):
    models = pytest.importorskip("mmpretrain.models")
    width = VARIANTS[name].architecture.widths[3]
    with torch.device("cpu"):
        theirs = nn.ModuleDict(
            dict(
                backbone=models.EfficientFormer(VARIANTS[name].arch),
                head=models.EfficientFormerClsHead(1000, width),
            )
        ).state_dict()
    converted, _ = convert_content(
        numbered(VARIANTS[name], "classification"), "p.pth", "mmpretrain"
    )
    shapes = {key: tensor.shape for key, tensor in converted["state_dict"].items()}
    assert shapes == {key: t.shape for key, t in theirs.items() if "bias_idxs" not in key}


@torch.no_grad()
def test_mmpretrain_computes_the_same_logits():
    models = pytest.importorskip("mmpretrain.models")
    head_class = pytest.importorskip("mmeformer.classification.head").EfficientFormerHead
    state = published(L1)
    theirs = nn.ModuleDict(
        dict(backbone=models.EfficientFormer("l1"), head=models.EfficientFormerClsHead(1000, 448))
    )
    converted, _ = convert_content(state, "published.pth", "mmpretrain")
    loaded = theirs.load_state_dict(converted["state_dict"], strict=False)
    assert not loaded.unexpected_keys
    assert all(key.endswith("bias_idxs") for key in loaded.missing_keys)
    theirs.eval()  # keeps the biases of this moment
    ours = Model(L1)
    ours.head = head_class("v1", 448, 1000)
    content = {"state_dict": theirs.state_dict()}
    use_published(ours, content, "mmpretrain.pth")
    ours.eval()
    # mmpretrain takes the mean of the tokens in a neck, global average pooling.
    features = theirs.backbone(image(224, 224))[-1].mean(-1)
    assert (
        relative_error(ours.head(ours.backbone(image(224, 224))), theirs.head((features,))) < 1e-5
    )


# --- loading -------------------------------------------------------------------------------------


CASES = [
    (VARIANTS[name], to)
    for name in ("efficientformer_l1", "efficientformerv2_s0")
    for to, form in TARGETS.items()
    if VARIANTS[name].family in form.families
]


@pytest.mark.parametrize("small_variant, to", CASES)
def test_a_classifier_loads_in_every_format(small_variant, to, tmp_path):
    state = published(small_variant)
    torch.save(convert_content(state, "published.pth", to)[0], tmp_path / "file.pth")
    model = Model(small_variant)
    report = load_pretrained(model, str(tmp_path / "file.pth"))
    assert len(report.loaded) + len(report.head) == len(model.state_dict())
    assert report.dropped == report.new == report.unused == {}
    assert torch.equal(model.head.fc.weight, state["head.weight"])
    assert torch.equal(model.head.fc_dist.bias, state["dist_head.bias"])
    assert torch.equal(model.head.norm.weight, state["norm.weight"])


@pytest.mark.parametrize("small_variant, to", CASES)
def test_a_detectors_backbone_leaves_the_head_out(small_variant, to):
    content, _ = convert_content(published(small_variant), "published.pth", to)
    report = load_backbone(build_backbone(small_variant), parse_checkpoint(content, "file.pth"))
    left = [name for names in report.dropped.values() for name in names]
    assert len(left) == {"v1": 6, "v2": 9}[small_variant.family] and report.head == []
    rules = {formats.HEADS, formats.FINAL_NORM, "other parts of the model (head)"}
    assert set(report.dropped) <= rules


def test_foreign_files_become_checkpoints_of_the_model(small_variant):
    content = published(small_variant)
    model = Model(small_variant)
    use_published(nn.DataParallel(model), content, "published.pth")
    require_match(model, content, "published.pth")
    assert torch.equal(
        content["state_dict"]["head.fc.weight"],
        weight("head.weight", (1000, model.head.fc.in_features)),
    )
    again = dict(content)
    use_published(model, content, "ours.pth")
    assert content == again, "our own files stay as they are"


def test_other_grids_are_resized():
    model = Model(L1)
    model.backbone = build_backbone(L1, bias_grid=9, pyramid_norms=False)
    content = published(L1)
    use_published(model, content, "published.pth")
    table = content["state_dict"]["backbone.stages.3.blocks.3.token_mixer.attention_bias.table"]
    assert table.shape == (8, 9, 9)


@pytest.mark.parametrize(
    "head, message",
    [
        (dict(classes=10), r"fc.weight \(1000, 448\) where the model has \(10, 448\)"),
        (dict(distillation=False), r"fc_dist.weight \(1000, 448\) where the model has nothing"),
    ],
)
def test_heads_that_do_not_fit_are_named(head, message):
    model = Model(L1, **head)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        use_published(model, published(L1), "published.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "variant_, change",
    [(L1, "norm.bias"), (S0, "head.bias"), (L1, "dist_head.bias"), (S0, "norm.running_var")],
)
def test_incomplete_heads_are_refused_or_no_classifier(variant_, change):
    state = published(variant_)
    del state[change]
    if change in ("norm.bias", "head.bias"):
        # The file is then not a classifier: its backbone is converted, the rest named as dropped.
        _, report = convert_content(state, "published.pth", "native")
        assert report.head == [] and formats.HEADS in report.dropped
        model = Model(variant_)
        use_published(model, state, "published.pth")
        with pytest.raises(CheckpointError, match="does not fit this config's model"):
            require_match(model, state, "published.pth")
        return
    with pytest.raises(CheckpointError, match="missing instead of"):
        convert_content(state, "published.pth", "native")
    with pytest.raises(CheckpointError, match="missing where the model has"):
        use_published(Model(variant_), state, "published.pth")


def test_invalid_numbers_in_a_head_are_refused():
    state = published(S0)
    state["dist_head.bias"][3] = float("nan")
    for call in (
        lambda: convert_content(state, "bad.pth", "timm"),
        lambda: use_published(Model(S0), dict(state), "bad.pth"),
    ):
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            call()
