# SPDX-License-Identifier: Apache-2.0
"""The benchmark of light detectors, at small sizes."""

import copy
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import load_script
from mmengine.structures import InstanceData

from mmeformer.synthetic.shapes import write_coco_dataset

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SIDE = 64


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return load_script(BENCHMARKS / "lite.py")


@pytest.mark.parametrize("name", ["RTMDet-tiny", "lite V2-S0"])
def test_the_timed_graph_finds_what_mmdet_finds(benchmark, name):
    settings = benchmark.MODELS[name](3, SIDE, False)
    benchmark.set_test(settings, 0.02)
    model = benchmark.built(settings)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.bbox_head.parameters():
        # Untrained heads give nearly the same score everywhere.
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    if name != "RTMDet-tiny":
        # Untrained, all distances have the same probability, and all boxes cover the image.
        model.bbox_head.gfl_reg.bias.data -= torch.arange(17).repeat(4)
    image = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    with torch.no_grad():
        size = torch.tensor([[SIDE, SIDE]]).float()
        boxes, scores, labels, _ = benchmark.build_graph(model, SIDE)(image, size)
        meta = dict(img_shape=(SIDE, SIDE), scale_factor=(1.0, 1.0))
        maps = model.bbox_head(model.extract_feat(image))
        (expected,) = model.bbox_head.predict_by_feat(*maps, batch_img_metas=[meta])
    assert isinstance(expected, InstanceData) and 10 < len(boxes) == len(expected.bboxes)
    torch.testing.assert_close(boxes, expected.bboxes, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(scores, expected.scores, atol=1e-4, rtol=1e-4)
    assert labels.tolist() == expected.labels.tolist()


def test_halves_share_no_pixel(benchmark, tmp_path, monkeypatch):
    source = write_coco_dataset(tmp_path / "shapes", train=1, val=0, size=96)
    image = np.zeros((96, 96, 3), np.uint8)
    image[:, 48:] = 255
    cv2.imwrite(str(source / "train2017" / "000000.png"), image)
    monkeypatch.setattr(benchmark, "LEAST", 1)
    benchmark.write_tiles(source, 32, True, tmp_path / "tiles")
    content = {
        split: json.loads((tmp_path / "tiles" / f"{split}.json").read_text())
        for split in ("train", "val")
    }
    # Columns 0, 16 and rows 0, 24, 48, 64 of the left half; without overlap 0, 16 and 0, 32, 64.
    for split, value, count in (("train", 0, 8), ("val", 255, 6)):
        names = [item["file_name"] for item in content[split]["images"]]
        assert len(names) == count
        for name in names:
            assert (cv2.imread(str(tmp_path / "tiles" / name)) == value).all()
    boxes = [a["bbox"] for part in content.values() for a in part["annotations"]]
    assert boxes and all(x >= 0 and x + w <= 32 and y + h <= 32 for x, y, w, h in boxes)


@pytest.mark.parametrize(
    ("gain", "ratio", "reached"),
    [(2.5, 1.0, True), (1.5, 1.0, False), (0.5, 0.6, True), (-0.5, 0.6, False), (9.0, 1.5, False)],
)
def test_verdict(benchmark, gain, ratio, reached):
    assert ("reached" in benchmark.verdict(gain, ratio)) is reached


@pytest.mark.slow
def test_comparison(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SHAPES", dict(train=8, val=4, size=SIDE))
    monkeypatch.setattr(benchmark, "TURNS", 1)
    names = ["RTMDet-tiny", "lite V2-S0", "Mask R-CNN V2-S0"]
    options = ["--out", str(tmp_path), "--side", str(SIDE), "--minutes", "0.01", "--seeds", "1"]
    options += ["--threads", "1", "--rounds", "2", "--batch", "2", "--models", *names]
    benchmark.main(["compare", *options])
    first = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [key.split("|")[1] for key in results] == names
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    assert set(seconds) == {f"shapes|{name}" for name in names}
    for key, item in results.items():
        expected = max(1, round(0.6 / seconds["|".join(key.split("|")[:2])]))
        assert item["length"] == expected and item["minutes"] > 0
    table = (tmp_path / "comparison.md").read_text()
    # Both are told for the two that are compared with RTMDet, whose time is 1.
    assert table in first and table.count("goal ") == 2 and "| 1.00 (" in table
    # A second run trains nothing, and what it reads is what it prints.
    kept = copy.deepcopy(results)
    benchmark.main(["compare", *options])
    assert json.loads((tmp_path / "results.json").read_text()) == kept


@pytest.mark.slow
def test_search(benchmark, tmp_path, capsys):
    options = ["--out", str(tmp_path), "--side", str(SIDE), "--threads", "1", "--rounds", "2"]
    options += ["--variants", "efficientformerv2_s0", "--widths", "64", "--depths", "1,1"]
    benchmark.main(["search", *options])
    lines = (tmp_path / "search.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines[2:]]
    # RTMDet, the config, stride 4, the other width, the other depth.
    assert [row[1:5] for row in cells[1:]] == [
        ["96", "1", "2", "8 to 32"],
        ["96", "1", "2", "4 to 32"],
        ["64", "1", "2", "8 to 32"],
        ["96", "1", "1", "8 to 32"],
    ]
    parameters = [float(row[5]) for row in cells]
    assert parameters[0] == pytest.approx(4.9, abs=0.1)
    assert parameters[1] < parameters[2] and parameters[1] > max(parameters[3:])
    assert all(row[7].startswith("1.00 (") for row in cells[:1])
    assert (tmp_path / "search.md").read_text() in capsys.readouterr().out
