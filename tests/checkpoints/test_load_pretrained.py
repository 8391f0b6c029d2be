# SPDX-License-Identifier: Apache-2.0
"""Loading every format into backbones: all of it, or a clear error and an untouched model."""

import copy
import logging
import os
import re

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from golden_weights import (
    golden,
    image,
    manifest,
    published_state_dict,
    relative_error,
    weight,
)
from helpers import build_backbone
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from tiny import ARCH as TINY

from mmeformer.backbones import EfficientFormer, EfficientFormerV2
from mmeformer.checkpoints import formats, safe_load
from mmeformer.checkpoints.load import NOT_BUILT, load_backbone, load_pretrained
from mmeformer.checkpoints.parse import parse_checkpoint
from mmeformer.checkpoints.report import NEW_COUNTERS, NEW_NORMS
from mmeformer.errors import CheckpointError
from mmeformer.variants import VARIANTS

S0 = VARIANTS["efficientformerv2_s0"]
L1 = VARIANTS["efficientformer_l1"]


@pytest.fixture(autouse=True)
def quiet_init_log(monkeypatch):
    """mmengine lists every parameter of a stand-alone module; that is not what is tested."""
    monkeypatch.setattr("mmengine.model.BaseModule._dump_init_info", lambda self: None)


@pytest.fixture
def log():
    """Records of mmengine's logger."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def timm_weights(model):
    """The golden rule of values over timm's names, computed indices left out."""
    return {
        key: weight(key, tuple(tensor.shape))
        for key, tensor in model.state_dict().items()
        if not key.endswith("attention_bias_idxs")
    }


def initialized(variant, path, **kwargs):
    """A backbone of ``variant`` initialized from ``path`` by init_cfg."""
    init_cfg = dict(type="Pretrained", checkpoint=str(path), **kwargs.pop("init", {}))
    backbone = build_backbone(variant, init_cfg=init_cfg, **kwargs)
    backbone.init_weights()
    return backbone


def snapshot(backbone):
    return {name: tensor.clone() for name, tensor in backbone.state_dict().items()}


def assert_untouched(backbone, before):
    after = backbone.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


# --- every format gives the published outputs -------------------------------------------------


@torch.no_grad()
def test_reference_classification_gives_the_golden_features(small_variant, tmp_path):
    path = tmp_path / "reference.pth"
    torch.save({"model": published_state_dict(small_variant.name, "classification")}, path)
    backbone = initialized(small_variant, path).eval()
    backbone.norms.clear()
    output = backbone(image(224, 224))[3]
    assert relative_error(output, golden(small_variant.name)["classification/stage3"]) < 1e-5


@torch.no_grad()
def test_timm_weights_give_timms_features(any_variant):
    model = timm.create_model(any_variant.name, pretrained=False).eval()
    # As initialized, layer scales of 1e-5 and zero biases would hide attention from the test.
    for name, tensor in model.state_dict().items():
        if name.endswith(("gamma", "running_var")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("attention_biases", "running_mean", "bias")):
            tensor.normal_(0, 0.5)
    backbone = build_backbone(any_variant).eval()
    load_backbone(backbone, parse_checkpoint(model.state_dict(), "timm"))
    backbone.norms.clear()

    # In float64, where rounding (which these weights amplify) hides nothing.
    model.double(), backbone.double()
    pixels = image(224, 224).double()
    theirs = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, output: theirs.append(output))
    model.forward_features(pixels)
    for ours, stage in zip(backbone(pixels), theirs, strict=True):
        if stage.dim() == 3:
            stage = stage.transpose(1, 2).unflatten(2, (7, 7))
        assert relative_error(ours, stage) < 1e-10


@torch.no_grad()
def test_hugging_face_weights_give_its_logits(tmp_path):
    state = published_state_dict(L1.name, "huggingface")
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path)
    backbone = initialized(L1, path).eval()
    backbone.norms.clear()
    tokens = backbone(image(224, 224))[3].flatten(2).transpose(1, 2)
    normed = torch.nn.functional.layer_norm(
        tokens,
        (tokens.shape[-1],),
        state["efficientformer.layernorm.weight"],
        state["efficientformer.layernorm.bias"],
    ).mean(1)
    logits = sum(
        normed @ state[f"{head}.weight"].T + state[f"{head}.bias"]
        for head in ("classifier", "distillation_classifier")
    )
    assert relative_error(logits / 2, golden(L1.name)["huggingface/logits"]) < 1e-5


@pytest.mark.parametrize("form, grid, size", [("detection", 25, (128, 160))])
@torch.no_grad()
def test_reference_detector_gives_the_golden_pyramid(small_variant, form, grid, size, tmp_path):
    backbone = published_state_dict(small_variant.name, form)
    state = {f"backbone.{key}": tensor for key, tensor in backbone.items()}
    state["neck.lateral_convs.0.conv.weight"] = torch.ones(1)
    path = tmp_path / "detector.pth"
    torch.save({"state_dict": state, "meta": {"CLASSES": ("cat",)}, "optimizer": {}}, path)
    backbone = initialized(small_variant, path, bias_grid=grid, bias_resize="matrix").eval()
    for level, output in enumerate(backbone(image(*size))):
        stored = golden(small_variant.name)[f"{form}/stage{level}"]
        assert relative_error(output, stored) < 1e-5


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_our_own_files_round_trip(small_variant, suffix, tmp_path):
    source = build_backbone(small_variant, bias_grid=(5, 9))
    path = tmp_path / f"native{suffix}"
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        safetensors.torch.save_file(source.state_dict(), path)
    target = initialized(small_variant, path, bias_grid=(5, 9))
    assert_untouched(target, snapshot(source))


@torch.no_grad()
def test_mmpretrain_weights_give_its_features(tmp_path):
    path = tmp_path / "mmpretrain.pth"
    torch.save({"state_dict": published_state_dict(L1.name, "mmpretrain-downstream")}, path)
    output = initialized(L1, path).eval()(image(224, 224))[3]
    assert relative_error(output, golden(L1.name)["mmpretrain/stage3"]) < 1e-5


def test_a_classifier_of_mmpretrain(tmp_path):
    state = {
        f"backbone.{name}": tensor
        for name, tensor in published_state_dict(L1.name, "mmpretrain").items()
    }
    state["head.head.weight"] = state["head.dist_head.weight"] = torch.ones(1000, 448)
    report = load_backbone(
        build_backbone(L1), parse_checkpoint({"state_dict": state, "meta": {}}, "a.pth")
    )
    assert report.format == "mmpretrain, classification" and report.variant == L1.name
    dropped = {name for names in report.dropped.values() for name in names}
    assert dropped == {
        "backbone.norm3.weight",
        "backbone.norm3.bias",
        "head.head.weight",
        "head.dist_head.weight",
    }


@pytest.mark.parametrize(
    "prefix",
    [
        "backbone.",
        "module.backbone.",
        "module.",
        "model.",
        "_orig_mod.",
        "_orig_mod.module.",
        "module._orig_mod.",
        "module.module.",
        "model.backbone.",
        "module.model._orig_mod.backbone.",
        "backbone.module.",
        "backbone._orig_mod.",
        "model.backbone.model.",
    ],
)
def test_whole_models_of_ours(prefix, tmp_path):
    source = build_backbone(S0)
    state = {f"{prefix}{name}": tensor for name, tensor in source.state_dict().items()}
    if "backbone" in prefix:
        state[prefix.replace("backbone", "neck") + "convs.0.weight"] = torch.ones(2)
    if prefix != "_orig_mod.":
        # Losses and metrics of a wrapper are beside the model.
        state["head.weight"] = torch.ones(2)
    path = tmp_path / "model.pth"
    torch.save({"state_dict": state, "meta": {"epoch": 3}, "optimizer": {"state": {}}}, path)
    target = initialized(S0, path)
    assert_untouched(target, snapshot(source))


def test_compiled_parts_of_a_backbone():
    source = build_backbone(S0)
    state = {
        re.sub(r"^(stages\.\d)", r"\1._orig_mod", name): tensor
        for name, tensor in source.state_dict().items()
    }
    assert any("_orig_mod" in name for name in state)
    target = build_backbone(S0)
    load_backbone(target, parse_checkpoint(state, "compiled.pth"))
    assert_untouched(target, snapshot(source))


def test_two_backbones_under_known_names_are_ambiguous():
    state = {
        f"{owner}backbone.{name}": tensor
        for owner in ("model.", "module.model.")
        for name, tensor in build_backbone(S0).state_dict().items()
    }
    assert_refused(build_backbone(S0), state, "several backbones, model.backbone., module.model")
    load_backbone(build_backbone(S0), parse_checkpoint(state, "two.pth", prefix="model.backbone"))


def averaged(kind):
    """(weights, averages, file with both) as programs write them."""
    last, average = build_backbone(S0).state_dict(), build_backbone(S0).state_dict()
    average["stem.conv1.conv.weight"] = last["stem.conv1.conv.weight"] + 1
    wrapped = {f"module.{name}": tensor for name, tensor in average.items()}
    content = {
        "timm": {"state_dict": last, "state_dict_ema": average, "epoch": 3},
        "deit": {"model": last, "model_ema": average},
        "pytorch": {
            "state_dict": last,
            "ema_state_dict": {"n_averaged": torch.tensor(7), **wrapped},
        },
        "mmengine": {
            "state_dict": {f"backbone.{name}": tensor for name, tensor in average.items()},
            "ema_state_dict": {
                "steps": torch.tensor(7),
                **{f"module.backbone.{name}": tensor for name, tensor in last.items()},
            },
            "meta": {},
        },
    }[kind]
    return last, average, content


@pytest.mark.parametrize("kind", ["timm", "deit", "pytorch", "mmengine"])
def test_moving_averages_by_choice_and_never_in_silence(kind, tmp_path, log):
    last, average, content = averaged(kind)
    path = tmp_path / "both.pth"
    torch.save(content, path)
    usual = initialized(S0, path)
    assert_untouched(usual, average if kind == "mmengine" else last)
    chosen = initialized(S0, path, init=dict(ema=True))
    assert_untouched(chosen, average)
    report = load_backbone(build_backbone(S0), parse_checkpoint(content, "both.pth"))
    if kind == "mmengine":
        assert not report.needs_attention
        assert "moving averages (EMA) of the training, 'state_dict'" in str(report)
    else:
        assert report.needs_attention
        (key,) = [name for name in content if "ema" in name]
        (warning,) = report.warnings
        assert "last ones" in warning and repr(key) in warning and "ema=True" in warning
        assert_untouched(initialized(S0, path, init=dict(key=key)), average)


def test_averages_and_entries_that_are_not_there():
    state = build_backbone(S0).state_dict()
    content = {"model_state_dict": state, "epoch": 3}
    assert_refused(build_backbone(S0), content, "under model_state_dict: choose with key=")
    assert_refused(build_backbone(S0), content, "no moving averages", ema=True)
    assert_refused(build_backbone(S0), content, "no tensors under 'net': its entries", key="net")
    load_backbone(build_backbone(S0), parse_checkpoint(content, "a.pth", key="model_state_dict"))


def test_backbone_deep_inside_needs_its_prefix(tmp_path):
    source = build_backbone(S0)
    state = {
        f"{owner}.backbone.{name}": tensor + (owner == "teacher")
        for owner in ("student", "teacher")
        for name, tensor in source.state_dict().items()
    }
    path = tmp_path / "pair.pth"
    torch.save({"state_dict": state}, path)
    with pytest.raises(
        CheckpointError, match="set prefix=.* such as student.backbone., teacher.backbone."
    ):
        initialized(S0, path)
    with pytest.raises(CheckpointError, match="no tensor whose name starts with prefix 'head.'"):
        initialized(S0, path, init=dict(prefix="head"))
    target = initialized(S0, path, init=dict(prefix="student.backbone"))
    assert_untouched(target, snapshot(source))


def test_custom_size_and_map_location_through_the_registry(tmp_path):
    source = EfficientFormerV2(TINY)
    path = tmp_path / "tiny.pth"
    torch.save({"state_dict": source.state_dict()}, path)
    config = dict(
        type="mmeformer.EfficientFormerV2",
        arch=TINY,
        init_cfg=[
            dict(type="Pretrained", checkpoint=str(path), map_location="cpu"),
            dict(type="Constant", layer="Conv2d", val=3.0),
        ],
    )
    target = MODELS.build(copy.deepcopy(config))
    target.init_weights()
    # Pretrained comes last, whatever the order of the list; and the config stays as given.
    assert_untouched(target, snapshot(source))
    assert target.init_cfg == config["init_cfg"]


def test_initialization_without_weights_is_as_before():
    backbone = EfficientFormer(TINY, init_cfg=dict(type="Constant", layer="Conv2d", val=3.0))
    backbone.init_weights()
    assert (backbone.stem.conv1.conv.weight == 3).all()
    assert 0.01 < backbone.stages[3].blocks[-1].token_mixer.qkv.weight.std() < 0.03


# --- timm:// -----------------------------------------------------------------------------------


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """An empty cache of the Hugging Face hub and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def fill_cache(hub, repository, name, write):
    folder = hub / f"models--{repository.replace('/', '--')}"
    snapshot_folder = folder / "snapshots" / "0123456789012345678901234567890123456789"
    snapshot_folder.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(snapshot_folder.name)
    write(snapshot_folder / name)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_timm_name_from_an_offline_cache(file, offline_hub):
    weights = timm_weights(timm.create_model(S0.name, pretrained=False))
    save = safetensors.torch.save_file if file.endswith("safetensors") else torch.save
    fill_cache(
        offline_hub, f"timm/{S0.name}.snap_dist_in1k", file, lambda path: save(weights, path)
    )
    backbone = initialized(S0, f"timm://{S0.name}.snap_dist_in1k")
    ours = backbone.state_dict()["stages.3.downsample.attn.attention_bias.table"]
    theirs = weights["stages.3.downsample.attn.attention_biases"]
    assert torch.equal(ours.flatten(1), theirs)


def test_timm_name_without_network_or_cache_says_what_to_do(offline_hub):
    with pytest.raises(CheckpointError, match="download model.safetensors elsewhere"):
        initialized(S0, f"timm://{S0.name}.snap_dist_in1k")
    with pytest.raises(CheckpointError, match="unknown to timm"):
        initialized(S0, "timm://efficientformerv3_s0.best")


def test_a_bad_file_in_the_cache_runs_nothing(offline_hub, tmp_path):
    marker = tmp_path / "the-code-ran"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    fill_cache(
        offline_hub,
        f"timm/{S0.name}.snap_dist_in1k",
        "pytorch_model.bin",
        lambda path: torch.save({"a": Payload()}, path),
    )
    with pytest.raises(CheckpointError, match="weights_only=True blocked loading"):
        initialized(S0, f"timm://{S0.name}.snap_dist_in1k")
    assert not marker.exists()


def test_a_damaged_file_in_the_cache_is_named(offline_hub):
    fill_cache(
        offline_hub,
        f"timm/{S0.name}.snap_dist_in1k",
        "model.safetensors",
        lambda path: path.write_bytes(b"\x80"),
    )
    with pytest.raises(CheckpointError, match="timm://efficientformerv2_s0.*could neither be read"):
        initialized(S0, f"timm://{S0.name}.snap_dist_in1k")


def test_address_is_downloaded_once_into_torchs_cache(tmp_path, monkeypatch):
    source = build_backbone(S0)
    torch.save(source.state_dict(), tmp_path / "there.pth")
    fetched = []

    def download(url, path, progress):
        fetched.append(url)
        torch.save(torch.load(tmp_path / "there.pth", weights_only=True), path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    url = "https://example.org/weights/there.pth?download=1"
    for _ in range(2):
        assert_untouched(initialized(S0, url), snapshot(source))
    assert fetched == [url]
    with pytest.raises(CheckpointError, match="names no file"):
        safe_load.load("https://example.org/")
    # What a download left behind is not downloaded again by itself.
    (tmp_path / "cache/checkpoints/page.pth").write_text("<html>log in</html>")
    match = r"(?s)page\.pth is a web page.*copy of https://.*delete it to download it again"
    with pytest.raises(CheckpointError, match=match):
        safe_load.load("https://example.org/page.pth")

    def fail(url, path, progress):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(CheckpointError, match="example.org/other.pth could not be downloaded"):
        safe_load.load("https://example.org/other.pth")


# --- the report --------------------------------------------------------------------------------


def test_report_accounts_for_every_tensor(variant):
    state = {
        key: torch.ones(()).expand(shape)
        for key, shape in manifest()[variant.name]["classification"].items()
    }
    backbone = build_backbone(variant, bias_grid=14)
    report = load_backbone(backbone, parse_checkpoint({"model": state}, "file.pth"))
    dropped = [name for names in report.dropped.values() for name in names]
    assert len(report.loaded) + len(dropped) == len(state)
    assert set(report.dropped) == {formats.HEADS, formats.FINAL_NORM, formats.INDICES}
    new = [name for names in report.new.values() for name in names]
    assert sorted(report.loaded + new) == sorted(backbone.state_dict())
    assert report.variant == variant.name
    changes = {(old, grid) for _, old, grid in report.resized}
    if variant.family == "v1":
        assert set(report.new) == {NEW_NORMS} and len(new) == 8
        assert changes == {((7, 7), (14, 14))}
    else:
        assert not new
        assert changes == {((7, 7), (14, 14)), ((14, 14), (28, 28))}


def test_report_is_one_log_block(log, tmp_path):
    state = published_state_dict(L1.name, "classification")
    path = tmp_path / "l1.pth"
    torch.save({"model": {k: v.half() for k, v in state.items()}, "epoch": 299}, path)
    initialized(L1, path, bias_grid=(25, 42))
    blocks = [record for record in log if "Checkpoint loaded" in record.getMessage()]
    assert len(blocks) == 1 and blocks[0].levelno == logging.INFO
    text = blocks[0].getMessage()
    for line in (
        "Checkpoint loaded into efficientformer_l1",
        f"source     {path}",
        "format     reference implementation, classification",
        "variant    efficientformer_l1",
        "loaded     274 tensors of the backbone",
        "dropped    4 classifier heads: head.weight, head.bias, dist_head.weight, dist_head.bias",
        "dropped    2 final norm of the classifier: norm.weight, norm.bias",
        "new        8 pyramid norms",
        "resized    1 bias tables 7 x 7 -> 25 x 42: "
        "stages.3.blocks.3.token_mixer.attention_bias.table",
        "cast       to float32 from float16",
        "note       entries of the file that are not read: epoch",
    ):
        assert f"  {line}" in text or text.startswith(line), (line, text)
    resized = next(line for line in text.splitlines() if "resized" in line)
    assert resized.endswith("attention_bias.table")


def test_reference_downstream_warns_where_published_scores_are_lost(log, tmp_path):
    path = tmp_path / "detector.pth"
    state = published_state_dict(S0.name, "detection")
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in state.items()}}, path)
    backbone = initialized(S0, path, bias_grid=16)
    record = next(r for r in log if "Checkpoint loaded" in r.getMessage())
    assert record.levelno == logging.WARNING
    assert "bias_grid=(25, 25)" in record.getMessage()
    assert "bias_resize='matrix'" in record.getMessage()
    assert "5 ImageNet bias tables that the reference never reads" in record.getMessage()
    table = backbone.stages[3].blocks[-1].token_mixer.attention_bias.table
    assert table.shape == (8, 16, 16)
    log.clear()
    initialized(S0, path, bias_grid=25, bias_resize="matrix")
    record = next(r for r in log if "Checkpoint loaded" in r.getMessage())
    assert record.levelno == logging.INFO and "WARNING" not in record.getMessage()


def test_stages_that_the_model_leaves_out_are_dropped_by_rule(small_variant):
    source = build_backbone(small_variant)
    state = source.state_dict()
    backbone = build_backbone(small_variant, out_indices=(1, 2))
    report = load_backbone(backbone, parse_checkpoint(state, "file.pth"))
    assert_untouched(backbone, {name: state[name] for name in backbone.state_dict()})
    assert set(report.dropped) == {NOT_BUILT}
    left_out = set(report.dropped[NOT_BUILT])
    assert left_out == set(state) - set(backbone.state_dict())
    assert any(name.startswith("stages.3.") for name in left_out)


def test_missing_counters_of_batch_norms_are_reported():
    state = {
        name: tensor
        for name, tensor in build_backbone(S0).state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    report = load_backbone(build_backbone(S0), parse_checkpoint(state, "file.pth"))
    assert set(report.new) == {NEW_COUNTERS}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast_and_reported(dtype):
    source = build_backbone(S0)
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in source.state_dict().items()
    }
    backbone = build_backbone(S0, bias_grid=14)
    report = load_backbone(backbone, parse_checkpoint(state, "file.pth"))
    assert report.cast == {str(dtype).removeprefix("torch.")}
    assert all(p.dtype == torch.float32 for p in backbone.parameters())
    assert torch.equal(backbone.stem.conv1.conv.weight, state["stem.conv1.conv.weight"].float())


# --- errors ------------------------------------------------------------------------------------


def assert_refused(backbone, content, match, **kwargs):
    before = snapshot(backbone)
    with pytest.raises(CheckpointError, match=match) as error:
        load_backbone(backbone, parse_checkpoint(content, "some/file.pth", **kwargs))
    assert_untouched(backbone, before)
    assert "some/file.pth" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("form", ["classification", "native", "timm"])
def test_another_variant_is_named(form):
    if form == "native":
        state = build_backbone(VARIANTS["efficientformerv2_s1"]).state_dict()
    elif form == "timm":
        state = timm.create_model("efficientformerv2_s1", pretrained=False).state_dict()
    else:
        state = published_state_dict("efficientformerv2_s1", form)
    message = assert_refused(
        build_backbone(S0),
        state,
        r"this file holds efficientformerv2_s1, the model is efficientformerv2_s0\.",
    )
    assert "tensors of another shape" in message
    assert "tensors in the file, but no part of the model" in message


@pytest.mark.parametrize("form", ["classification", "huggingface"])
def test_another_family_is_named(form):
    state = published_state_dict(L1.name, form)
    match = "this file holds efficientformer_l1, the model is efficientformerv2_s0"
    assert_refused(build_backbone(S0), state, match)


def test_v2_into_v1():
    state = published_state_dict(S0.name, "classification")
    match = "this file holds efficientformerv2_s0, the model is efficientformer_l1"
    assert_refused(build_backbone(L1), state, match)


def test_half_a_file_is_called_incomplete(small_variant):
    state = published_state_dict(small_variant.name, "classification")
    half = dict(list(state.items())[: len(state) // 2])
    match = rf"holds only \d+ of the \d+ tensors of {small_variant.name}: it is incomplete"
    message = assert_refused(build_backbone(small_variant), half, match)
    assert "tensors missing in the file" in message and "more" in message


def test_missing_unknown_and_wrongly_shaped_tensors_are_listed():
    state = build_backbone(S0).state_dict()
    del state["stages.0.blocks.0.ls2.gamma"]
    state["stages.0.blocks.0.extra.weight"] = torch.ones(3, 4)
    state["stem.conv1.conv.weight"] = torch.ones(16, 3, 5, 5)
    message = assert_refused(build_backbone(S0), {"state_dict": state}, "was not loaded")
    assert "1 tensors missing in the file:\n  stages.0.blocks.0.ls2.gamma (32,)" in message
    assert "no part of the model:\n  stages.0.blocks.0.extra.weight (3, 4)" in message
    assert "stem.conv1.conv.weight (16, 3, 5, 5) where stem.conv1.conv.weight is (16, 3, 3, 3)" in (
        message
    )
    assert "allow_partial=True" in message


def test_partial_loading_only_on_request_and_reported(log, tmp_path):
    source = build_backbone(S0)
    state = source.state_dict()
    del state["stages.0.blocks.0.ls2.gamma"]
    state["stages.0.blocks.0.extra.weight"] = torch.ones(3, 4)
    path = tmp_path / "changed.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError):
        initialized(S0, path)
    backbone = initialized(S0, path, init=dict(allow_partial=True))
    assert torch.equal(backbone.stem.conv1.conv.weight, source.stem.conv1.conv.weight)
    record = next(r for r in log if "Checkpoint loaded" in r.getMessage())
    assert record.levelno == logging.WARNING
    assert "PROBLEM    1 missing in the file: stages.0.blocks.0.ls2.gamma (32,)" in (
        record.getMessage()
    )
    assert "stages.0.blocks.0.extra.weight (3, 4)" in record.getMessage()
    with pytest.raises(CheckpointError, match="not one tensor fits"):
        parsed = parse_checkpoint(published_state_dict(L1.name, "huggingface"), "some/file.pth")
        load_backbone(backbone, parsed, allow_partial=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    state = published_state_dict(S0.name, "classification")
    state["network.0.0.mlp.fc1.weight"][0, 0] = value
    content = {f"backbone.{key}": tensor for key, tensor in state.items()}
    match = r"backbone\.network\.0\.0\.mlp\.fc1\.weight has 1 of 4096 values that are NaN"
    assert_refused(build_backbone(S0), content, match)


def test_weights_too_large_for_the_model():
    state = build_backbone(S0).state_dict()
    state["stem.conv1.conv.bias"] = torch.full((16,), 1e39, dtype=torch.float64)
    assert_refused(build_backbone(S0), state, r"stem\.conv1\.conv\.bias has 16 of 16 values")


@pytest.mark.parametrize(
    "change, kind",
    [
        (lambda tensor: tensor.long(), "int64"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda tensor: tensor.to(torch.complex64), "complex64"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "qint8"),
        (lambda tensor: tensor.to_sparse(), "float32, sparse_coo"),
    ],
)
def test_weights_of_another_type(change, kind):
    state = build_backbone(S0).state_dict()
    state["stem.conv1.conv.weight"] = change(state["stem.conv1.conv.weight"])
    match = rf"tensor stem\.conv1\.conv\.weight is of type {kind}.*Convert it to float32"
    assert_refused(build_backbone(S0), state, match)


@pytest.mark.parametrize(
    "content, match",
    [
        ({}, "holds no tensors"),
        ({"epoch": 3, "lr": 0.1}, "has no state dict"),
        ({"state_dict": {"a": "text"}}, "something else: a"),
        ({"layer1.0.conv1.weight": torch.ones(2)}, "no EfficientFormer in a known format"),
        ({"backbone.layer1.weight": torch.ones(2)}, "no EfficientFormer in a known format"),
    ],
)
def test_files_without_a_backbone(content, match):
    assert_refused(build_backbone(S0), content, match)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
        load_pretrained(build_backbone(S0), str(tmp_path / "nowhere.pth"))


# --- the pretrained biases survive at any resolution ---------------------------------------------


def interpolated(table, dy, dx, height, width):
    """Brute force: the table read linearly at displacement (dy, dx) of a height x width map."""
    rows, columns = table.shape
    by_row = [
        np.interp(dy * rows / height, np.arange(rows), table[:, column])
        for column in range(columns)
    ]
    return np.interp(dx * columns / width, np.arange(columns), by_row)


@pytest.mark.parametrize("size", [(448, 448), (800, 1344)])
@pytest.mark.parametrize("bias_grid", [7, 14, (25, 42)])
def test_pretrained_biases_are_kept_by_displacement(small_variant, size, bias_grid, tmp_path):
    model = timm.create_model(small_variant.name, pretrained=False)
    weights = timm_weights(model)
    path = tmp_path / "timm.pth"
    torch.save(weights, path)
    backbone = initialized(small_variant, path, bias_grid=bias_grid).eval()
    last = len(backbone.stages[3].blocks) - 1
    shift = 1 if small_variant.family == "v1" else 0
    stages = backbone.stages
    places = [(stages[3].blocks[last].token_mixer, f"3.blocks.{last + shift}.token_mixer", 32)]
    if small_variant.family == "v2":
        before = len(stages[2].blocks) - 1
        places += [
            (stages[2].blocks[before].token_mixer, f"2.blocks.{before}.token_mixer", 32),
            (stages[3].downsample.attn, "3.downsample.attn", 16),
        ]
    cases = [
        (place.attention_bias, f"stages.{name}.attention_biases", stride)
        for place, name, stride in places
    ]
    rng = np.random.default_rng(0)
    grid = np.array(bias_grid if isinstance(bias_grid, tuple) else (bias_grid, bias_grid))
    for module, name, stride in cases:
        height, width = size[0] // stride, size[1] // stride
        flat = weights[name]
        side = int(flat.shape[1] ** 0.5)
        table = flat.view(8, side, side).double().numpy()
        with torch.no_grad():
            bias = module((height, width)).numpy()
        step = module.query_stride
        columns = -(-width // step)
        checked = 0
        # A table resized at loading and again at run time is linear between its own points only.
        exact = tuple(grid) in {(7, 7), (size[0] // 32, size[1] // 32)}
        for _ in range(400):
            query, key = rng.integers(bias.shape[1]), rng.integers(bias.shape[2])
            dy = abs(step * (query // columns) - key // width)
            dx = abs(step * (query % columns) - key % width)
            whole = dy * side % height == 0 and dx * side % width == 0
            if not exact and not whole:
                continue
            checked += 1
            head = rng.integers(8)
            if whole:
                wanted = table[head, dy * side // height, dx * side // width]
            else:
                wanted = interpolated(table[head], dy, dx, height, width)
            if exact or (grid % 7 == 0).all():
                assert abs(bias[head, query, key] - wanted) < 1e-5
        assert checked or not exact
        # Displacement 0 is displacement 0, whatever the grids.
        assert np.allclose(bias[:, 0, 0], table[:, 0, 0], atol=1e-6)


def test_classification_tables_are_resized_as_tables_in_matrix_mode_too():
    state = {"model": published_state_dict(S0.name, "classification")}
    displacement, matrix = (
        build_backbone(S0, bias_grid=14, bias_resize=mode) for mode in ("displacement", "matrix")
    )
    for backbone in (displacement, matrix):
        load_backbone(backbone, parse_checkpoint(state, "file.pth"))
    assert_untouched(matrix, snapshot(displacement))
    source = published_state_dict(S0.name, "classification")
    table = source["network.6.3.token_mixer.attention_biases"].view(8, 7, 7)
    ours = matrix.stages[3].blocks[3].token_mixer.attention_bias.table
    assert torch.equal(ours[:, ::2, ::2], table)
