# SPDX-License-Identifier: Apache-2.0
"""The conversion tool: both directions, whole models into the shipped configs, safe writing."""

import argparse
import json
import re

import pytest
import safetensors
import timm
import torch
from golden_weights import golden, image, manifest, published_state_dict, relative_error, weight
from helpers import build_backbone, load_script
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmeformer.checkpoints import safe_load
from mmeformer.checkpoints.convert import convert, convert_content
from mmeformer.checkpoints.load import load_backbone
from mmeformer.checkpoints.parse import parse_checkpoint
from mmeformer.checkpoints.translate import backbone_shapes
from mmeformer.errors import CheckpointError
from mmeformer.paths import config_dir, tools_dir
from mmeformer.variants import VARIANTS

S0 = VARIANTS["efficientformerv2_s0"]
L1 = VARIANTS["efficientformer_l1"]

# What mmdet 2.x calls the parts of a Mask R-CNN and mmseg 0.x those of a Semantic FPN: modules with
# a weight and a bias, and (segmentation) convolutions without bias followed by a batch norm.
MASK_RCNN_PARTS = [
    *(f"neck.{kind}_convs.{i}.conv" for kind in ("lateral", "fpn") for i in range(4)),
    "rpn_head.rpn_conv",
    "rpn_head.rpn_cls",
    "rpn_head.rpn_reg",
    *(
        f"roi_head.bbox_head.{part}"
        for part in ("fc_cls", "fc_reg", "shared_fcs.0", "shared_fcs.1")
    ),
    *(f"roi_head.mask_head.convs.{i}.conv" for i in range(4)),
    "roi_head.mask_head.upsample",
    "roi_head.mask_head.conv_logits",
]
SEMANTIC_FPN_PARTS = [
    *(f"neck.{kind}_convs.{i}.conv" for kind in ("lateral", "fpn") for i in range(4)),
    "decode_head.conv_seg",
]
SCALE_HEADS = ["0.0", "1.0", "2.0", "2.2", "3.0", "3.2", "3.4"]


def old_names(task):
    """Names of all tensors outside the backbone in a published detector or segmentor."""
    parts = MASK_RCNN_PARTS if task == "detection" else SEMANTIC_FPN_PARTS
    names = [f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")]
    if task == "segmentation":
        norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        for place in SCALE_HEADS:
            names.append(f"decode_head.scale_heads.{place}.conv.weight")
            names += [f"decode_head.scale_heads.{place}.bn.{leaf}" for leaf in norm]
    return names


def build_model(variant, task):
    """The model of a shipped config as a published downstream checkpoint needs it."""
    pytest.importorskip({"detection": "mmdet", "segmentation": "mmseg"}[task])
    short = variant.name.replace("_", "-")
    name = {
        "detection": f"mask-rcnn_{short}_fpn_1x_coco.py",
        "segmentation": f"semantic-fpn_{short}_40k_ade20k-512x512.py",
    }[task]
    config = Config.fromfile(config_dir() / task / name)
    config.model.backbone.update(bias_resize="matrix", init_cfg=None)
    scope = {"detection": "mmdet", "segmentation": "mmseg"}[task]
    with DefaultScope.overwrite_default_scope(scope):
        __import__(f"{scope}.models")
        return MODELS.build(config.model)


def published_model(variant, task, model, value):
    """A published checkpoint file: backbone from the manifest, heads by mmdet 2.x's names."""
    shapes = model.state_dict()
    state = {
        f"backbone.{key}": value(key, tuple(shape))
        for key, shape in manifest()[variant.name][task].items()
    }
    state |= {name: value(name, tuple(shapes[name].shape)) for name in old_names(task)}
    meta = {"CLASSES": ("thing", "stuff"), "PALETTE": [[0, 0, 0], [1, 1, 1]], "epoch": 12}
    return {"state_dict": state, "meta": meta, "optimizer": {"state": {}}}


@pytest.fixture
def tool(capsys):
    """Calls the command line: (arguments) -> (exit status, stdout, stderr)."""
    module = load_script(tools_dir() / "convert_checkpoint.py")

    def call(*arguments):
        status = module.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


# --- whole models of the reference --------------------------------------------------------------


@pytest.mark.parametrize("task, size", [("detection", (128, 160)), ("segmentation", (96, 192))])
@torch.no_grad()
def test_published_models_load_strictly_and_give_the_golden_pyramid(
    task, size, small_variant, tool, tmp_path
):
    model = build_model(small_variant, task)
    published = published_model(small_variant, task, model, weight)
    torch.save(published, tmp_path / "published.pth")
    status, out, _ = tool(tmp_path / "published.pth", tmp_path / "ours.pth")
    assert status == 0
    ours = safe_load.read(tmp_path / "ours.pth")
    model.load_state_dict(ours["state_dict"], strict=True)
    for level, output in enumerate(model.backbone.eval()(image(*size))):
        stored = golden(small_variant.name)[f"{task}/stage{level}"]
        assert relative_error(output, stored) < 1e-5
    name = old_names(task)[0]
    assert torch.equal(model.state_dict()[name], published["state_dict"][name])

    grid = {"detection": 25, "segmentation": 16}[task]
    assert ours["meta"]["dataset_meta"]["classes"] == ["thing", "stuff"]
    assert ours["meta"]["epoch"] == 12
    record = ours["meta"]["mmeformer"]
    assert record["variant"] == small_variant.name and record["bias_grid"] == [grid, grid]
    assert record["source"] == "published.pth" and record["converted_to"] == "native"
    flat = re.sub(r"[\s│]+", " ", out)
    assert f"bias_grid=({grid}, {grid}) and bias_resize='matrix'" in flat
    assert "entries of the file left out: optimizer" in flat


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_published_models_of_every_variant_fit_the_configs_and_return(task, any_variant):
    variant = any_variant
    numbers = iter(range(10**6))

    def value(name, shape):
        return torch.tensor(float(next(numbers))).expand(shape)

    with torch.device("meta"):
        model = build_model(variant, task)
    published = published_model(variant, task, model, value)
    ours, report = convert_content(published, "published.pth", "native")
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tuple(t.shape) for name, t in ours["state_dict"].items()} == wanted
    assert report.variant == variant.name

    placed = sum(map(len, report.dropped.values())) + len(report.loaded) + len(old_names(task))
    assert placed == len(published["state_dict"])

    back, _ = convert_content(ours, "ours.pth", "reference")
    dropped = {name for names in report.dropped.values() for name in names}
    assert set(back["state_dict"]) == set(published["state_dict"]) - dropped
    for name, tensor in back["state_dict"].items():
        source = published["state_dict"][name]
        first = (0,) * tensor.dim()
        assert tensor.shape == source.shape and tensor[first] == source[first], name
    assert back["meta"]["CLASSES"] == ["thing", "stuff"]


def test_the_reference_is_told_that_it_resizes_differently():
    backbone = build_backbone(S0, bias_grid=25)
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    state["neck.lateral_convs.0.conv.weight"] = torch.ones(1)
    content, report = convert_content({"state_dict": state}, "ours.pth", "reference")
    assert any("bias_resize='matrix'" in warning for warning in report.warnings)
    assert "backbone.network.5.attn.attention_biases_seg" in content["state_dict"]
    content, report = convert_content({"state_dict": state}, "ours.pth", "timm")
    assert not any(name.startswith(("backbone.", "neck.")) for name in content["state_dict"])
    assert report.dropped == {
        "other parts of the model (neck)": ["neck.lateral_convs.0.conv.weight"]
    }
    assert any("800 x 800 px" in warning for warning in report.warnings)


# --- backbones ----------------------------------------------------------------------------------


@torch.no_grad()
def test_classification_file_to_ours(small_variant, tool, tmp_path):
    state = published_state_dict(small_variant.name, "classification")
    arguments = argparse.Namespace(model="x", lr=torch.tensor(1e-3))
    torch.save({"model": state, "args": arguments, "epoch": 299}, tmp_path / "source.pth")
    status, out, _ = tool(tmp_path / "source.pth", tmp_path / "ours.pth")
    assert status == 0 and "of the head" in out and small_variant.name in out
    ours = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert ours["meta"]["epoch"] == 299 and ours["meta"]["args"]["model"] == "x"
    backbone = build_backbone(small_variant).eval()
    backbone.norms.clear()
    parts = {"backbone": {}, "head": {}}
    for name, tensor in ours["state_dict"].items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    backbone.load_state_dict(parts["backbone"], strict=True)
    for name, theirs in dict(norm="norm", fc="head", fc_dist="dist_head").items():
        for leaf in ("weight", "bias"):
            assert torch.equal(parts["head"].pop(f"{name}.{leaf}"), state[f"{theirs}.{leaf}"])
    assert all(name.startswith("norm.") for name in parts["head"])
    output = backbone(image(224, 224))[3]
    assert relative_error(output, golden(small_variant.name)["classification/stage3"]) < 1e-5


@torch.no_grad()
def test_ours_into_timm(small_variant, tool, tmp_path):
    backbone = build_backbone(small_variant).eval()
    for name, tensor in backbone.state_dict().items():
        if name.endswith(("gamma", "running_var")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("table", "running_mean", "bias")):
            tensor.normal_(0, 0.5)
    torch.save(backbone.state_dict(), tmp_path / "ours.pth")
    status, out, _ = tool(tmp_path / "ours.pth", tmp_path / "timm.safetensors", "--to", "timm")
    assert status == 0
    model = timm.create_model(small_variant.name, pretrained=False).eval()
    result = model.load_state_dict(
        safetensors.torch.load_file(tmp_path / "timm.safetensors"), strict=False
    )
    assert not result.unexpected_keys
    for name in result.missing_keys:
        assert re.match(r"(norm|head|head_dist)\.|.*attention_bias_idxs$", name), name
    pixels = image(224, 224)
    backbone.norms.clear()
    features = []
    model.stages[3].register_forward_hook(lambda module, args, output: features.append(output))
    model.forward_features(pixels)
    theirs = features[0]
    if theirs.dim() == 3:
        theirs = theirs.transpose(1, 2).unflatten(2, (7, 7))
    assert relative_error(backbone(pixels)[3], theirs) < 1e-5
    if small_variant.family == "v1":
        assert "pyramid norms, which this format has no place for" in re.sub(r"[\s│]+", " ", out)
    with safetensors.safe_open(tmp_path / "timm.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    assert meta["mmeformer"]["variant"] == small_variant.name


@pytest.mark.parametrize("to", ["reference", "timm", "mmpretrain"])
def test_backbones_of_every_variant_there_and_back(to, any_variant):
    variant = any_variant
    if to == "mmpretrain" and variant.family == "v2":
        pytest.skip("mmpretrain has no EfficientFormerV2")
    shapes = backbone_shapes(variant.family, variant.arch)
    ours = {
        name: torch.tensor(float(number)).expand(shape)
        for number, (name, shape) in enumerate(shapes.items())
        if not name.startswith("norms.")
    }
    norms = {name: torch.ones(shape) for name, shape in shapes.items() if name not in ours}
    there, report = convert_content({**ours, **norms}, "ours.pth", to)
    assert report.loaded == list(ours) and sum(map(len, report.dropped.values())) == len(norms)
    state = there["model" if to == "reference" else "state_dict"]
    if to != "timm":
        form = "classification" if to == "reference" else "mmpretrain"
        published = set(manifest()[variant.name][form])
        left = {name for name in published - set(state)}
        assert set(state) <= published
        assert all(re.match(r"(norm3?|head|dist_head)\.|.*_idxs$", name) for name in left)
    back, _ = convert_content(there, "there.pth", "native")
    assert set(back["state_dict"]) == set(ours)
    for name, tensor in back["state_dict"].items():
        first = (0,) * tensor.dim()
        assert tensor.shape == ours[name].shape and tensor[first] == ours[name][first], name
    backbone = build_backbone(variant)
    report = load_backbone(backbone, parse_checkpoint(there, "there.pth"))
    assert len(report.loaded) == len(ours)


def test_converted_file_loads_by_init_cfg(tool, tmp_path):
    model = timm.create_model(L1.name, pretrained=False)
    torch.save(model.state_dict(), tmp_path / "timm.bin")
    assert tool(tmp_path / "timm.bin", tmp_path / "ours.safetensors")[0] == 0
    backbone = build_backbone(L1)
    report = load_backbone(
        backbone, parse_checkpoint(safe_load.read(tmp_path / "ours.safetensors"), "ours")
    )
    assert report.format == "mmeformer" and report.variant == L1.name
    assert torch.equal(backbone.stem.conv1.conv.weight, model.stem.conv1.weight)


# --- refusals -----------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.pth"
    torch.save({"state_dict": build_backbone(S0).state_dict()}, path)
    return path


def test_existing_files_are_kept_unless_forced(source, tool, tmp_path):
    target = tmp_path / "target.pth"
    target.write_text("precious")
    status, _, error = tool(source, target)
    assert status == 1 and "target.pth exists" in error and "--force" in error
    assert target.read_text() == "precious"
    assert tool(source, target, "--force")[0] == 0
    assert "state_dict" in safe_load.read(target)


def test_nothing_half_written_is_left(source, tmp_path, monkeypatch):
    target = tmp_path / "target.pth"
    target.write_text("precious")

    def full_disk(content, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match="target.pth could not be written: no space left"):
        convert(str(source), target, force=True)
    assert target.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.pth", "target.pth"]


def test_unwritable_targets_are_named(source, tool, tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder.pth").mkdir()
    for target in (tmp_path / "file" / "out.pth", tmp_path / "folder.pth"):
        status, _, error = tool(source, target, *(["--force"] if target.exists() else []))
        assert status == 1 and f"error: {target} could not be written: " in error, error
        assert "(--force)" not in error
    assert (tmp_path / "file").read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 3


def test_metadata_survives_every_container(tool, tmp_path):
    """Class names and origin, from one file through another kind and back."""
    state = {f"backbone.{k}": v for k, v in build_backbone(S0).state_dict().items()}
    state["neck.lateral_convs.0.conv.weight"] = torch.ones(1)
    meta = {"dataset_meta": {"classes": ("cat", "dog"), "palette": [(1, 2, 3), (4, 5, 6)]}}
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "a.pth")
    assert tool(tmp_path / "a.pth", tmp_path / "b.safetensors")[0] == 0
    assert tool(tmp_path / "b.safetensors", tmp_path / "c.pth")[0] == 0
    for name in ("b.safetensors", "c.pth"):
        content = safe_load.read(tmp_path / name)
        assert content["meta"]["dataset_meta"]["classes"] == ["cat", "dog"]
        assert content["meta"]["dataset_meta"]["palette"] == [[1, 2, 3], [4, 5, 6]]
        assert content["meta"]["mmeformer"]["variant"] == S0.name
        assert content["state_dict"].keys() == state.keys()


def test_a_new_file_has_the_usual_rights(source, tmp_path):
    convert(str(source), tmp_path / "deep" / "target.pth")
    (tmp_path / "plain").write_text("")
    usual = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "deep" / "target.pth").stat().st_mode == usual


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda state: state.pop("stem.conv1.conv.weight"), "only complete backbones"),
        (lambda state: state.update(extra=torch.ones(2)), r"no part of it: extra \(2,\)"),
        (
            lambda state: state["stem.conv1.conv.bias"].fill_(float("nan")),
            "stem.conv1.conv.bias has 16 of 16 values that are NaN",
        ),
        (
            lambda state: state.update({"stem.conv1.conv.bias": torch.ones(16, dtype=torch.int32)}),
            "type int32",
        ),
    ],
)
def test_what_cannot_be_converted_is_named_and_nothing_written(change, match, tool, tmp_path):
    state = build_backbone(S0).state_dict()
    change(state)
    torch.save(state, tmp_path / "bad.pth")
    status, _, error = tool(tmp_path / "bad.pth", tmp_path / "out.pth")
    assert status == 1 and "bad.pth" in error and re.search(match, error), error
    assert not (tmp_path / "out.pth").exists()


def test_bad_numbers_in_a_head_are_refused_too():
    state = {f"backbone.{k}": v for k, v in build_backbone(S0).state_dict().items()}
    state["neck.convs.0.weight"] = torch.tensor([float("inf")])
    with pytest.raises(CheckpointError, match="neck.convs.0.weight has 1 of 1 values"):
        convert_content(state, "bad.pth", "native")


def test_mmpretrain_has_no_v2(source, tool, tmp_path):
    status, _, error = tool(source, tmp_path / "out.pth", "--to", "mmpretrain")
    assert status == 1 and "efficientformerv2_s0, which mmpretrain" in error


def test_a_classifier_of_mmpretrain():
    published = manifest()["efficientformer_l1"]
    state = {
        f"backbone.{name}": torch.ones(shape) for name, shape in published["mmpretrain"].items()
    }
    for head in ("head.head", "head.dist_head"):
        state |= {f"{head}.weight": torch.ones(1000, 448), f"{head}.bias": torch.ones(1000)}
    content, report = convert_content({"state_dict": state}, "a.pth", "reference")
    assert len(report.head) == 6
    assert {name: list(tensor.shape) for name, tensor in content["model"].items()} == {
        name: shape for name, shape in published["classification"].items() if "_idxs" not in name
    }


def test_prefix_and_key_and_averages(tool, tmp_path):
    state = build_backbone(S0).state_dict()
    pair = {
        f"{owner}.backbone.{name}": tensor + (owner == "teacher")
        for owner in ("student", "teacher")
        for name, tensor in state.items()
    }
    torch.save({"weights": pair, "weights_ema": {}, "model_ema": state}, tmp_path / "a.pth")
    out = tmp_path / "out.pth"
    status, _, error = tool(tmp_path / "a.pth", out, "--key", "weights")
    assert status == 1 and "--prefix" in error
    arguments = ("--key", "weights", "--prefix", "teacher.backbone")
    status, _, error = tool(tmp_path / "a.pth", out, *arguments)
    assert status == 0, error
    converted = torch.load(out)["state_dict"]
    name = "backbone.stem.conv1.conv.weight"
    assert torch.equal(converted[name], state[name.removeprefix("backbone.")] + 1)
    status, _, error = tool(tmp_path / "a.pth", out, "--ema", "--force")
    assert status == 0, error
    converted = torch.load(out)["state_dict"]
    assert torch.equal(converted["stem.conv1.conv.weight"], state["stem.conv1.conv.weight"])


def test_bad_arguments_are_named(source, tool, tmp_path):
    status, _, error = tool(source, tmp_path / "out.txt")
    assert status == 1 and "must end in one of .pth, .pt, .bin, .safetensors" in error
    status, _, error = tool(tmp_path / "nowhere.pth", tmp_path / "out.pth")
    assert status == 1 and "nowhere.pth does not exist" in error
    with pytest.raises(ValueError, match="to must be one of"):
        convert(str(source), tmp_path / "out.pth", to="keras")
