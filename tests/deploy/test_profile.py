# SPDX-License-Identifier: Apache-2.0
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import build_backbone
from tiny import small_config
from torch import nn

from mmeformer.commands.profile import main
from mmeformer.deploy import models
from mmeformer.deploy import profile as profiling
from mmeformer.deploy.graphs import graph_class
from mmeformer.deploy.metadata import export_metadata
from mmeformer.deploy.onnx import example_inputs
from mmeformer.paths import tools_dir
from mmeformer.variants import VARIANTS


def test_classifiers_have_the_published_figures(variant):
    parts = profiling.count_classifier(variant)
    digits = 2 if variant.family == "v1" else 1
    assert round(sum(part.params for part in parts) / 1e6, digits) == variant.params
    assert round(sum(part.macs for part in parts) / 1e9, 2) == variant.macs
    assert [part.name for part in parts][1:5] == [f"stages.{index}" for index in range(4)]


@pytest.mark.parametrize(
    "task, parts",
    [
        ("segmentation", {"neck", "decode_head"}),
        ("detection", {"neck", "rpn_head", "roi_head.bbox_head", "roi_head.mask_head"}),
        ("rotated", {"neck", "bbox_head"}),
    ],
)
def test_parts_add_up(task, parts):
    if task == "rotated":
        pytest.importorskip("mmrotate")
    config = small_config(task)
    model = models.build_model(copy.deepcopy(config))
    metadata = export_metadata(config, model, task, size=(64, 64), batch=1)
    graph = graph_class(task, "onnx")(model)
    found = profiling.count_parts(graph, tuple(example_inputs(graph, metadata).values()))
    stages = {f"backbone.stages.{index}" for index in range(4)}
    assert {part.name for part in found} == {"backbone.stem", *stages, *parts}
    assert sum(part.params for part in found) == sum(p.numel() for p in model.parameters())
    assert all(part.macs > 0 for part in found)


def test_inference_memory_is_what_lives_at_one_time():
    x = torch.zeros(1000)

    def chain():
        y = x + 1
        y = y * 2  # two tensors of 4 kB at a time, the third only after the first is gone
        y = y + 3
        return y.view(10, 100)

    assert profiling.inference_memory(chain) == 8000
    assert profiling.inference_memory(lambda: [x + 1 for _ in range(5)]) == 20000
    assert profiling.inference_memory(lambda: x.view(-1)[::2].add_(1)) == 0


def test_training_memory_is_what_the_backward_pass_needs():
    layer = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Sigmoid())
    # The input (it is kept for the weight's gradient) and the output of the sigmoid.
    assert profiling.training_memory(layer, torch.zeros(50, 10)) == 2 * 50 * 10 * 4
    backbone = build_backbone(VARIANTS["efficientformerv2_s0"]).train()
    small, large = (
        profiling.training_memory(backbone, torch.zeros(2, 3, side, side)) for side in (64, 128)
    )
    assert 3.5 * small < large < 6 * small


def test_latencies_are_taken_in_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    result = profiling.measure(calls, rounds=3)
    assert order == list("ab" * 5)
    assert result["a"].runs == 3 and 0 <= result["a"].low <= result["a"].median <= result["a"].high


def test_command(tmp_path, capsys):
    out = tmp_path / "profile.json"
    modes = ["eager", "channels_last", "folded", "folded_channels_last", "onnxruntime"]
    arguments = ["efficientformerv2_s0", "--size", "64", "64", "--rounds", "2", "--json", str(out)]
    assert main([*arguments, "--modes", *modes]) == 0
    found = json.loads(out.read_text())
    assert list(found["latency"]) == modes
    assert all(times["median"] > 0 for times in found["latency"].values())
    assert found["size"] == [64, 64] and found["total"]["params"] == pytest.approx(3.5e6, rel=0.02)
    assert "total" in capsys.readouterr().out
    assert main(["gone.py"]) == 1
    assert "gone.py does not exist" in capsys.readouterr().err
    assert main(["efficientformerv2_s0", "--size", "64", "96"]) == 1


@pytest.mark.slow
def test_compile(capsys):
    arguments = ["efficientformerv2_s0", "--size", "64", "64", "--rounds", "2"]
    assert main([*arguments, "--modes", "compile"]) == 0


def test_the_standard_library_keeps_its_module():
    """Commands have their folder first on the path, and PyTorch imports cProfile there."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import cProfile, profile; "
        "print(profile.__file__, hasattr(profile, 'Profile'))"
    )
    command = [sys.executable, "-c", program, str(tools_dir())]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    path, has_class = printed.rsplit(maxsplit=1)
    assert Path(path).parent != tools_dir() and has_class == "True"
