# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of every published format, against the manifest and timm's own models."""

from functools import cache

import pytest
import timm
import torch
from golden_weights import manifest
from timm.models.efficientformer import checkpoint_filter_fn

from mmeformer.checkpoints import formats
from mmeformer.checkpoints.translate import (
    backbone_shapes,
    from_native,
    identify_variant,
    to_native,
)
from mmeformer.variants import VARIANTS, Architecture

MANIFEST_FORMATS = {
    "classification": formats.REFERENCE,
    "detection": formats.REFERENCE_DOWNSTREAM,
    "segmentation": formats.REFERENCE_DOWNSTREAM,
    "huggingface": formats.HUGGINGFACE,
    "mmpretrain": formats.MMPRETRAIN,
    "mmpretrain-downstream": formats.MMPRETRAIN_DOWNSTREAM,
}
CASES = [
    (name, form)
    for name in VARIANTS
    for form in (*MANIFEST_FORMATS, "timm")
    if form == "timm" or form in manifest()[name]
]


@cache
def timm_shapes(name):
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    return {key: list(tensor.shape) for key, tensor in model.state_dict().items()}


def published(name, form):
    """(format, state dict with a number of its own in every tensor, taking no memory)."""
    shapes = timm_shapes(name) if form == "timm" else manifest()[name][form]
    state = {
        key: torch.tensor(float(number)).expand(shape)
        for number, (key, shape) in enumerate(shapes.items())
    }
    return MANIFEST_FORMATS.get(form, formats.TIMM), state


def number(tensor):
    return tensor[(0,) * tensor.dim()].item()


def bias_grid(form):
    return {"detection": 25, "segmentation": 16}.get(form, 7)


@pytest.mark.parametrize("name, form", CASES)
def test_every_published_name_is_mapped_once_or_dropped_by_rule(name, form):
    variant = VARIANTS[name]
    form_found, state = published(name, form)
    shapes = backbone_shapes(variant.family, variant.arch, bias_grid(form))
    found = to_native(state, form_found, variant.family, variant.architecture, shapes)

    assert found.unexplained == []
    dropped = [key for keys in found.dropped.values() for key in keys]
    mapped = list(found.origin.values())
    assert sorted(mapped + dropped) == sorted(state)
    assert len(set(mapped)) == len(mapped)
    absent = set(shapes) - set(found.tensors)
    assert all(key.startswith("norms.") for key in absent)
    if form_found.pyramid_norms:
        assert not absent
    for key, tensor in found.tensors.items():
        assert tuple(tensor.shape) == shapes[key], key


@pytest.mark.parametrize("name, form", CASES)
def test_round_trip_is_a_bijection(name, form):
    variant = VARIANTS[name]
    form_found, state = published(name, form)
    shapes = backbone_shapes(variant.family, variant.arch, bias_grid(form))
    arguments = form_found, variant.family, variant.architecture
    found = to_native(state, *arguments, shapes)
    back, no_place = from_native(found.tensors, *arguments)
    assert no_place == {}
    assert set(back) == set(found.origin.values())
    for key, tensor in back.items():
        assert tensor.shape == state[key].shape and number(tensor) == number(state[key]), key
    again = to_native(back, *arguments, shapes)
    for key, tensor in found.tensors.items():
        assert number(again.tensors[key]) == number(tensor), key


@pytest.mark.parametrize("name, form", CASES)
def test_format_and_variant_are_found_by_looking(name, form):
    expected, state = published(name, form)
    assert formats.detect(state) is expected
    found = identify_variant(state, expected)
    assert found.complete and found.variant.name == name


def test_our_own_format_is_found_by_looking(variant):
    shapes = backbone_shapes(variant.family, variant.arch)
    state = {key: torch.tensor(0.0).expand(shape) for key, shape in shapes.items()}
    assert formats.detect(state) is formats.NATIVE
    assert identify_variant(state, formats.NATIVE).variant is variant


def test_dropped_rules_are_named_as_published():
    counts = {}
    for form in ("classification", "detection"):
        expected, state = published("efficientformerv2_s0", form)
        variant = VARIANTS["efficientformerv2_s0"]
        found = to_native(
            state,
            expected,
            "v2",
            variant.architecture,
            backbone_shapes("v2", "s0", bias_grid(form)),
        )
        counts[form] = {rule: len(keys) for rule, keys in found.dropped.items()}
    assert counts == {
        "classification": {formats.INDICES: 5, formats.FINAL_NORM: 5, formats.HEADS: 4},
        "detection": {formats.UNREAD_TABLES: 5, formats.INDICES: 10},
    }


@pytest.mark.parametrize("name", [name for name in VARIANTS if VARIANTS[name].family == "v1"])
def test_names_agree_with_timms_own_converter(name):
    variant = VARIANTS[name]
    for key in backbone_shapes("v1", variant.arch):
        if key.startswith("norms."):
            continue
        arguments = key, "v1", variant.architecture
        # The converter counts the downsamples that went before, so it must see them in order.
        stage = int(key.split(".")[1]) if key.startswith("stages.") else 0
        before = {f"network.{2 * i + 1}.proj.weight": None for i in range(stage)}
        reference = formats.REFERENCE.name(*arguments)
        before.pop(reference, None)
        converted = checkpoint_filter_fn({**before, reference: None}, None)
        assert list(converted)[-1] == formats.TIMM.name(*arguments)


def test_a_rule_never_swallows_a_tensor_of_the_backbone(variant):
    for form in (*MANIFEST_FORMATS.values(), formats.TIMM):
        if variant.family not in form.families:
            continue
        for name in backbone_shapes(variant.family, variant.arch):
            if form.holds(name):
                foreign = form.name(name, variant.family, variant.architecture)
                assert form.rule(foreign) is None, foreign


def test_rectangular_tables_take_their_grid_from_the_model():
    name = "stages.3.blocks.1.token_mixer.attention_bias.table"
    variant = VARIANTS["efficientformer_l1"]
    name = name.replace("1", "3")
    table = torch.arange(8 * 25 * 42.0).view(8, 25, 42)
    state, _ = from_native({name: table}, formats.TIMM, "v1", variant.architecture)
    assert list(state) == ["stages.3.blocks.4.token_mixer.attention_biases"]
    back = to_native(state, formats.TIMM, "v1", variant.architecture, {name: (8, 25, 42)})
    assert torch.equal(back.tensors[name], table)


def test_unknown_names_are_refused():
    assert formats.detect(["layer1.0.conv1.weight", "fc.weight"]) is None
    architecture = VARIANTS["efficientformer_l1"].architecture
    early = Architecture.from_mapping(
        dict(widths=(8, 16, 24, 32), depths=(1, 1, 2, 2), attention_blocks=(0, 0, 1, 1))
    )
    for call in (
        lambda: formats.TIMM.name("norms.0.weight", "v1", architecture),
        lambda: formats.HUGGINGFACE.name("norms.0.weight", "v1", architecture),
        lambda: formats.HUGGINGFACE.name("stem.conv1.conv.weight", "v2", architecture),
        lambda: formats.HUGGINGFACE.name("stem.conv1.conv.weight", "v1", early),
        lambda: formats.REFERENCE.name("head.weight", "v1", architecture),
    ):
        with pytest.raises(KeyError):
            call()
