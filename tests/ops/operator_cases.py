# SPDX-License-Identifier: Apache-2.0
"""Calls of ``mmcv.ops`` on which mmcv's compiled operators and ours are compared.

``python tests/ops/operator_cases.py`` writes ``tests/ops/golden/operators.npz`` in an environment
whose mmcv has compiled operators.
"""

import importlib
import math
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden" / "operators.npz"


def uniform(name: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Numbers that follow from their name alone."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy((low + (high - low) * rng.random(shape)).astype(np.float32))


def upright(name: str, count: int, side: float = 200) -> Tensor:
    """Boxes (count, 4) with corners in pixels, sides of 4 to 64, in a square of ``side``."""
    corner = uniform(f"{name}/corner", count, 2, high=side)
    return torch.cat([corner, corner + uniform(f"{name}/size", count, 2, low=4, high=64)], 1)


def turned(name: str, count: int, side: float = 200) -> Tensor:
    """Boxes (count, 5) with centres in a square of ``side`` pixels, sides of 4 to 64, any angle."""
    return torch.cat(
        [
            uniform(f"{name}/center", count, 2, high=side),
            uniform(f"{name}/size", count, 2, low=4, high=64),
            uniform(f"{name}/angle", count, 1, low=-math.pi, high=math.pi),
        ],
        1,
    )


def scores(name: str, count: int, levels: int = 0) -> Tensor:
    """Scores, all different; with ``levels`` only that many different ones."""
    values = uniform(f"{name}/score", count)
    if levels:
        return (values * levels).floor() / levels
    return (values.argsort(stable=True).argsort() + 1) / (count + 1)


def labels(name: str, count: int, classes: int = 3) -> Tensor:
    return (uniform(f"{name}/label", count) * classes).long()


def features(name: str) -> Tensor:
    """Maps (2, 2, 12, 16)."""
    return uniform(f"{name}/features", 2, 2, 12, 16, low=-1)


def regions(name: str, count: int = 7) -> Tensor:
    """Regions (count, 5) of both maps at 1/4 of an image of 48 x 64 px, some outside."""
    corner = uniform(f"{name}/corner", count, 2, low=-16, high=60)
    size = uniform(f"{name}/size", count, 2, low=0.5, high=40)
    return torch.cat([torch.arange(count)[:, None] % 2, corner, corner + size], 1).float()


def turned_regions(name: str, count: int = 7) -> Tensor:
    """Rotated regions (count, 6) of both maps at 1/4 of an image of 48 x 64 px, some outside."""
    boxes = torch.cat(
        [
            uniform(f"{name}/center", count, 2, low=-8, high=64),
            uniform(f"{name}/size", count, 2, low=0.5, high=40),
            uniform(f"{name}/angle", count, 1, low=-math.pi, high=math.pi),
        ],
        1,
    )
    return torch.cat([torch.arange(count)[:, None] % 2, boxes], 1).float()


# Two pairs whose IoU is 1/2 without rounding, and a box apart.
AT_THRESHOLD = torch.tensor(
    [
        [4.0, 4.0, 8.0, 4.0, 0.0],
        [4.0, 4.0, 4.0, 4.0, 0.0],
        [32.0, 4.0, 8.0, 8.0, 0.0],
        [32.0, 4.0, 8.0, 4.0, 0.0],
        [64.0, 4.0, 8.0, 4.0, 0.0],
    ]
)
# No width, no height, a point; each alone and over a box.
NO_AREA = torch.tensor(
    [
        [20.0, 20.0, 16.0, 8.0, 0.3],
        [20.0, 20.0, 0.0, 8.0, 0.3],
        [20.0, 20.0, 16.0, 0.0, 0.3],
        [20.0, 20.0, 0.0, 0.0, 0.3],
        [20.0, 20.0, 0.0, 0.0, 0.3],
        [20.0, 20.0, 16.0, 8.0, 0.4],
    ]
)


# Boxes, scores and threshold of cases with equal scores.
TIES = {
    "nms/ties": (upright("c", 300), scores("c", 300, levels=4), 0.5),
    "nms/equal scores": (upright("d", 300), torch.full((300,), 0.5), 0.5),
    "nms_rotated/ties": (turned("d", 300), scores("d", 300, levels=4), 0.1),
    "nms_rotated/equal scores": (turned("e", 300), torch.full((300,), 0.5), 0.1),
}


def corners(boxes: Tensor) -> Tensor:
    """Corners of boxes (N, 5), their angles left out."""
    return torch.cat([boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2], 1)


def _nms_cases() -> dict[str, Callable[[], dict[str, Tensor]]]:
    def case(boxes, values, iou_thr=0.5, **options):
        from mmcv.ops import nms

        return {"kept": nms(boxes, values, iou_thr, **options)[1]}

    def batched(name, count, **config):
        from mmcv.ops import batched_nms

        arguments = upright(name, count), scores(name, count), labels(name, count)
        return {"kept": batched_nms(*arguments, dict(type="nms", iou_threshold=0.5, **config))[1]}

    return {
        "nms/300": lambda: case(upright("a", 300), scores("a", 300)),
        "nms/5000": lambda: case(upright("b", 5000, 1000), scores("b", 5000), 0.3),
        "nms/ties": lambda: case(*TIES["nms/ties"]),
        "nms/equal scores": lambda: case(*TIES["nms/equal scores"]),
        "nms/offset": lambda: case(upright("e", 300).round(), scores("e", 300), offset=1),
        "nms/at the threshold": lambda: case(corners(AT_THRESHOLD), scores("f", 5)),
        "nms/no area": lambda: case(corners(NO_AREA), scores("g", 6)),
        "nms/one": lambda: case(upright("h", 1), scores("h", 1)),
        "nms/empty": lambda: case(upright("i", 0), scores("i", 0)),
        "nms/options": lambda: case(
            upright("j", 300), scores("j", 300), score_threshold=0.2, max_num=20
        ),
        "nms/batched": lambda: batched("k", 300),
        "nms/batched in parts": lambda: batched("l", 300, split_thr=100),
    }


def _nms_rotated_cases() -> dict[str, Callable[[], dict[str, Tensor]]]:
    def case(boxes, values, iou_thr=0.1, **options):
        from mmcv.ops import nms_rotated

        kept = nms_rotated(boxes, values, iou_thr, **options)[1]
        return {"kept": torch.zeros(0, dtype=torch.long) if kept is None else kept}

    def batched(name, count):
        from mmcv.ops import batched_nms

        arguments = turned(name, count), scores(name, count), labels(name, count)
        return {"kept": batched_nms(*arguments, dict(type="nms_rotated", iou_threshold=0.1))[1]}

    return {
        "nms_rotated/300": lambda: case(turned("a", 300), scores("a", 300)),
        "nms_rotated/5000": lambda: case(turned("b", 5000, 2000), scores("b", 5000)),
        "nms_rotated/crowded": lambda: case(turned("c", 3000, 200), scores("c", 3000), 0.4),
        "nms_rotated/ties": lambda: case(*TIES["nms_rotated/ties"]),
        "nms_rotated/equal scores": lambda: case(*TIES["nms_rotated/equal scores"]),
        "nms_rotated/float64": lambda: case(turned("f", 300).double(), scores("f", 300).double()),
        "nms_rotated/counter-clockwise": lambda: case(
            turned("g", 300), scores("g", 300), clockwise=False
        ),
        "nms_rotated/six columns": lambda: case(
            torch.cat([turned("h", 300), scores("h", 300)[:, None]], 1), scores("h", 300)
        ),
        "nms_rotated/at the threshold": lambda: case(
            AT_THRESHOLD, torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), 0.5
        ),
        "nms_rotated/no area": lambda: case(NO_AREA, scores("j", 6)),
        "nms_rotated/one": lambda: case(turned("k", 1), scores("k", 1)),
        "nms_rotated/empty": lambda: case(turned("l", 0), scores("l", 0)),
        "nms_rotated/one label": lambda: case(
            turned("m", 300), scores("m", 300), labels=torch.ones(300)
        ),
        "nms_rotated/labels": lambda: case(
            turned("n", 300), scores("n", 300), labels=labels("n", 300).float()
        ),
        "nms_rotated/batched": lambda: batched("o", 300),
    }


def _iou_cases() -> dict[str, Callable[[], dict[str, Tensor]]]:
    def case(boxes1, boxes2, **options):
        from mmcv.ops import box_iou_rotated

        return {"overlap": box_iou_rotated(boxes1, boxes2, **options)}

    a, b = turned("iou/a", 20, 80), turned("iou/b", 30, 80)
    columns = torch.cat([a, scores("iou/a", 20)[:, None]], 1)
    return {
        "box_iou_rotated/matrix": lambda: case(a, b),
        "box_iou_rotated/iof": lambda: case(a, b, mode="iof"),
        "box_iou_rotated/aligned": lambda: case(a, b[:20], aligned=True),
        "box_iou_rotated/aligned iof": lambda: case(a, b[:20], mode="iof", aligned=True),
        "box_iou_rotated/counter-clockwise": lambda: case(a, b, clockwise=False),
        "box_iou_rotated/six columns": lambda: case(columns, columns[:10]),
        "box_iou_rotated/no area": lambda: case(NO_AREA, NO_AREA),
        "box_iou_rotated/no area iof": lambda: case(NO_AREA, NO_AREA, mode="iof"),
        "box_iou_rotated/one": lambda: case(a[:1], b[:1]),
        "box_iou_rotated/no first": lambda: case(a[:0], b),
        "box_iou_rotated/no second": lambda: case(a, b[:0]),
        "box_iou_rotated/none aligned": lambda: case(a[:0], b[:0], aligned=True),
    }


def _roi_align_cases() -> dict[str, Callable[[], dict[str, Tensor]]]:
    def case(name, rois=None, size=3, dtype=torch.float32, **options):
        from mmcv.ops import roi_align

        maps = features(name).to(dtype).requires_grad_()
        rois = (regions(name) if rois is None else rois).to(dtype)
        options = (
            dict(spatial_scale=0.25, sampling_ratio=0, pool_mode="avg", aligned=True) | options
        )
        output = roi_align(maps, rois, size, *options.values())
        output.backward(uniform(f"{name}/gradient", *output.shape, low=-1).to(dtype))
        return {"output": output.detach(), "gradient": maps.grad}

    return {
        "roi_align/adaptive": lambda: case("a"),
        "roi_align/two samples": lambda: case("b", sampling_ratio=2),
        "roi_align/not aligned": lambda: case("c", aligned=False),
        "roi_align/oblong": lambda: case("d", size=(2, 5)),
        "roi_align/float64": lambda: case("e", dtype=torch.float64),
        "roi_align/no area": lambda: case(
            "f", torch.tensor([[0.0, 8, 8, 8, 8], [1, 8, 8, 24, 8]]), sampling_ratio=2
        ),
        "roi_align/one": lambda: case("g", regions("g", 1)),
        "roi_align/empty": lambda: case("h", regions("h", 0)),
    }


def _roi_align_rotated_cases() -> dict[str, Callable[[], dict[str, Tensor]]]:
    def case(name, rois=None, size=3, dtype=torch.float32, **options):
        from mmcv.ops import roi_align_rotated

        maps = features(name).to(dtype).requires_grad_()
        rois = (turned_regions(name) if rois is None else rois).to(dtype)
        options = (
            dict(spatial_scale=0.25, sampling_ratio=0, aligned=True, clockwise=False) | options
        )
        output = roi_align_rotated(maps, rois, size, *options.values())
        output.backward(uniform(f"{name}/gradient", *output.shape, low=-1).to(dtype))
        return {"output": output.detach(), "gradient": maps.grad}

    return {
        "roi_align_rotated/adaptive": lambda: case("a"),
        "roi_align_rotated/two samples": lambda: case("b", sampling_ratio=2),
        "roi_align_rotated/not aligned": lambda: case("c", aligned=False),
        "roi_align_rotated/clockwise": lambda: case("d", clockwise=True),
        "roi_align_rotated/oblong": lambda: case("e", size=(2, 5), clockwise=True),
        "roi_align_rotated/whole scale": lambda: case("f", spatial_scale=1.0, clockwise=True),
        "roi_align_rotated/float64": lambda: case("g", dtype=torch.float64),
        "roi_align_rotated/no area": lambda: case(
            "h", torch.tensor([[0.0, 8, 8, 0, 0, 1], [1, 8, 16, 0, 8, 1]]), sampling_ratio=2
        ),
        "roi_align_rotated/no area adaptive": lambda: case(
            "i", torch.tensor([[0.0, 8, 8, 0, 0, 1], [1, 8, 16, 0, 8, 1]])
        ),
        "roi_align_rotated/no area, not aligned": lambda: case(
            "j", torch.tensor([[0.0, 8, 8, 0, 0, 1], [1, 8, 16, 0, 8, 1]]), aligned=False
        ),
        "roi_align_rotated/one": lambda: case("k", turned_regions("k", 1)),
        "roi_align_rotated/empty": lambda: case("l", turned_regions("l", 0)),
    }


CASES = (
    _nms_cases()
    | _nms_rotated_cases()
    | _iou_cases()
    | _roi_align_cases()
    | _roi_align_rotated_cases()
)


def write_goldens() -> None:
    """Store what the compiled operators return."""
    extension = importlib.import_module("mmcv._ext")
    if getattr(extension, "IS_SUBSTITUTE", False):
        sys.exit("this mmcv has no compiled operators")
    arrays = {}
    for name, case in CASES.items():
        for key, value in case().items():
            array = value.numpy()
            arrays[f"{name}/{key}"] = array.astype(np.int16) if key == "kept" else array
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {len(arrays)} arrays, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    write_goldens()
