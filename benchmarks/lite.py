# SPDX-License-Identifier: Apache-2.0
"""Choose the sizes of the light detectors, and compare them with RTMDet-tiny.

    python benchmarks/lite.py search --out work_dirs/lite --iterations 300
    python benchmarks/lite.py needs --out work_dirs/lite
    python benchmarks/lite.py compare --out work_dirs/lite --minutes 3 \
        --labeled nuclei data/nuclei 64 --halves ships data/dota 96

`search` builds candidates of widths, depths and strides and lists parameters, MACs and time in
onnxruntime; with `--iterations` it also trains each for so many, on the data of `compare`. `needs`
lists one model of every kind.

`compare` trains the light detectors, mmdet's RTMDet-tiny and Mask R-CNN from scratch on generated
shapes and on folders of labeled images: the same data, augmentation, optimizer, processor time and
seeds for all. Iterations are timed in turns, once, and their number is then fixed. Images are cut
into tiles of a given side and resized to one input size. A folder of `--labeled` has its own split
or gets one; of one of `--halves` every image is cut down the middle, the left half is for training.
Afterwards all models are timed in onnxruntime on images of the validation, whole, with NMS.

All inputs are small, so that many trainings fit into hours on one core: nothing here says anything
about COCO. The folder gets results.json, and a second run continues where the first one stopped;
`--seeds 0` prints what is there.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import mmdet
import numpy as np
import onnx
import onnxruntime
import recipes
import torch
from mmdet.models.detectors import RTMDet
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmeformer import configs, tasks
from mmeformer.deploy import models
from mmeformer.deploy.fold import fold
from mmeformer.deploy.graphs import Graph, cell_shifts, graph_class
from mmeformer.deploy.simplify import simplify
from mmeformer.deploy.substitutes import substitute_for_graph
from mmeformer.detection.dense_graph import DenseGraph, is_dense
from mmeformer.detection.starter import inside, write_coco
from mmeformer.files import write_text
from mmeformer.formats.find import read_folder
from mmeformer.formats.tree import Options
from mmeformer.images import read_image, write_image
from mmeformer.labeled import POLYGONS, LabeledData, LabeledImage
from mmeformer.synthetic.shapes import write_coco_dataset
from mmeformer.variants import VARIANTS
from mmeformer.windows import Window, crop, windows

BASE = "detection/mask-rcnn_efficientformerv2-s0_fpn_quickstart.py"
"""Gives loops, hooks and evaluator; model, data and schedule are replaced."""
LITE = {
    "efficientformerv2_s0": "detection/gfl-lite_efficientformerv2-s0_pafpn_300e_coco-416x416.py",
    "efficientformerv2_s1": "detection/gfl-lite_efficientformerv2-s1_pafpn_300e_coco-416x416.py",
    "efficientformerv2_s2": "detection/gfl-lite_efficientformerv2-s2_pafpn_300e_coco-416x416.py",
    "efficientformer_l1": "detection/gfl-lite_efficientformer-l1_pafpn_300e_coco-416x416.py",
}
REFERENCE = "RTMDet-tiny"
SHAPES = dict(train=400, val=80, size=96, max_shapes=6, radii=((0.07, 0.1), (0.15, 0.3)))
"""Of the generated images: half of the objects are small, half are large."""
OVERLAP = 0.25
"""Of neighboring tiles of the training, as a share of their side."""
TURNS = 2
"""How often every training is timed."""
LEAST = 50
"""Classes with fewer objects are left out: their AP would be noise."""
FOUND = 100
"""Most objects per image."""

# --- models ---------------------------------------------------------------------------------------


def from_scratch(backbone: dict, variant: str, side: int) -> None:
    """Change one of our backbones' config: no pretrained weights, for inputs of one side."""
    cells = max(1, side // 32)
    backbone.update(layer_scale_init_value=1.0, bias_grid=cells, init_cfg=None)
    if VARIANTS[variant].family == "v2":
        backbone.update(norm_eval=False, head_bias_keys=cells**2)


def lite(variant: str, classes: int, side: int) -> dict:
    """A light detector of ours."""
    model = configs.load_config(LITE[variant]).model
    from_scratch(model.backbone, variant, side)
    model.bbox_head.num_classes = classes
    return model


def mask_rcnn(classes: int, side: int, masks: bool) -> dict:
    """Our Mask R-CNN of S0 with the template's settings for small objects; Faster R-CNN without
    masks."""
    kind = "mask-rcnn" if masks else "faster-rcnn"
    model = configs.load_config(f"detection/{kind}_efficientformerv2-s0_fpn_1x_coco.py").model
    from_scratch(model.backbone, "efficientformerv2_s0", side)
    model.neck.norm_cfg = dict(type="BN")
    model.rpn_head.anchor_generator["scales"] = [4]
    model.train_cfg.rcnn.sampler.num = 128
    model.roi_head.bbox_head.num_classes = classes
    if masks:
        model.roi_head.mask_head.num_classes = classes
    return model


def rtmdet(classes: int) -> dict:
    """mmdet's RTMDet-tiny without pretrained weights."""
    folder = Path(mmdet.__file__).parent / ".mim" / "configs" / "rtmdet"
    config = Config.fromfile(folder / "rtmdet_tiny_8xb32-300e_coco.py")
    # Norms that processes share are plain ones in one process.
    text = config.model.to_dict() if hasattr(config.model, "to_dict") else dict(config.model)
    model = json.loads(json.dumps(text).replace("SyncBN", "BN"))
    model["backbone"].pop("init_cfg")
    model["bbox_head"]["num_classes"] = classes
    return model


MODELS: dict[str, Callable[[int, int, bool], dict]] = {
    REFERENCE: lambda classes, side, masks: rtmdet(classes),
    "lite V2-S0": lambda classes, side, masks: lite("efficientformerv2_s0", classes, side),
    "lite V1-L1": lambda classes, side, masks: lite("efficientformer_l1", classes, side),
    "Mask R-CNN V2-S0": mask_rcnn,
}


def set_test(model: dict, score_thr: float) -> None:
    """Give a model of any kind the same limits in its test settings."""
    test = model["test_cfg"]
    if "rcnn" in test:
        test["rcnn"].update(score_thr=score_thr, max_per_img=FOUND)
        return
    nms = dict(type="nms", iou_threshold=test["nms"]["iou_threshold"])
    test.update(score_thr=score_thr, nms_pre=1000, max_per_img=FOUND, nms=nms)


# --- data -----------------------------------------------------------------------------------------


def cut(image: LabeledImage, places: Sequence[Window], split: str, folder: Path) -> list:
    """Write windows of an image as images of a split, with the objects inside them."""
    pixels = read_image(image.path)
    tiles = []
    for window in places:
        path = folder / split / f"{image.path.stem}_{window[0]}_{window[1]}.png"
        write_image(path, crop(pixels, window))
        objects = [part for item in image.objects if (part := inside(item, window)) is not None]
        size = window[2] - window[0], window[3] - window[1]
        tiles.append(LabeledImage(path, *size, objects, split=split))
    return tiles


def write_tiles(source: Path, tile: int, halves: bool, folder: Path) -> None:
    """Write tiles of a folder of labeled images, and a COCO file per split, unless it is there.

    Args:
        source: any format that ``mmeformer init`` reads.
        tile: side in pixels.
        halves: the left half of every image is for training, the right one for validation.
        folder: of the tiles.
    """
    if (folder / "val.json").is_file():
        return
    data: LabeledData = read_folder(source, Options(), skip_bad=True)
    images = data.images
    if halves:
        # An only image is there twice, for training and validation.
        images = list({image.path: image for image in images}.values())
    counts = Counter(item.label for image in images for item in image.objects)
    kept = [label for label in range(len(data.classes)) if counts[label] >= LEAST]
    tiles = []
    for image in images:
        objects = [item for item in image.objects if item.label in kept]
        objects = [replace(item, label=kept.index(item.label)) for item in objects]
        image = replace(image, objects=objects)
        spans = [(0, image.width, "train" if image.split == "train" else "val")]
        if halves:
            middle = image.width // 2
            spans = [(0, middle, "train"), (middle, image.width, "val")]
        for left, right, split in spans:
            overlap = round(OVERLAP * tile) if split == "train" else 0
            places = windows(right - left, image.height, tile, overlap)
            moved = [(x0 + left, y0, x1 + left, y1) for x0, y0, x1, y1 in places]
            tiles += cut(image, moved, split, folder)
    for split in ("train", "val"):
        chosen = [image for image in tiles if image.split == split]
        classes = [data.classes[label] for label in kept]
        path = folder / f"{split}.json"
        write_coco(path, chosen, classes, folder, data.kind == POLYGONS)


def write_data(args: argparse.Namespace) -> dict[str, Path]:
    """Write all data sets below the output folder; returns their folders by name."""
    root = args.out / "data"
    shapes = write_coco_dataset(root / "shapes", **args.shapes)
    for split in ("train", "val"):
        content = json.loads((shapes / f"annotations/instances_{split}2017.json").read_text())
        for image in content["images"]:
            image["file_name"] = f"{split}2017/{image['file_name']}"
        write_text(shapes / f"{split}.json", json.dumps(content))
    found = {"shapes": shapes}
    for halves, given in ((False, args.labeled), (True, args.halves)):
        for name, source, tile in given:
            write_tiles(Path(source), int(tile), halves, root / name)
            found[name] = root / name
    return found


# --- trainings ------------------------------------------------------------------------------------


WEIGHTS = "weights.pth"


@HOOKS.register_module(force=True)
class KeepWeights(Hook):
    """Writes the weights of the finished model into the work directory."""

    def after_train(self, runner) -> None:
        """Write them."""
        torch.save(dict(state_dict=runner.model.state_dict()), Path(runner.work_dir, WEIGHTS))


def build_config(name: str, data: Path, side: int, batch: int, rate: float) -> Config:
    """The training of a model on a data set; its length is set later."""
    content = json.loads((data / "train.json").read_text())
    classes = tuple(item["name"] for item in content["categories"])
    masks = any("segmentation" in item for item in content["annotations"])
    config = configs.load_config(BASE)
    config.model = MODELS[name](len(classes), side, masks)
    set_test(config.model, 0.001)
    masks = masks and "MaskRCNN" in config.model["type"]
    size = (side, side)
    load = [
        dict(type="mmeformer.LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=masks),
    ]
    augment = [
        dict(type="RandomResize", scale=size, ratio_range=(0.75, 1.25), keep_ratio=True),
        dict(type="RandomCrop", crop_size=size, allow_negative_crop=True),
        dict(type="RandomFlip", prob=0.75, direction=["horizontal", "vertical", "diagonal"]),
        dict(type="Pad", size=size),
        dict(type="PackDetInputs"),
    ]
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    resize = dict(type="Resize", scale=size, keep_ratio=True)
    test = [load[0], resize, load[1], dict(type="PackDetInputs", meta_keys=keys)]
    for loader, split, pipeline in (
        (config.train_dataloader, "train", load + augment),
        (config.val_dataloader, "val", test),
        (config.test_dataloader, "val", test),
    ):
        loader.batch_size = batch
        loader.dataset.update(
            data_root=f"{data.resolve()}/",
            ann_file=f"{split}.json",
            data_prefix=dict(img=""),
            metainfo=dict(classes=classes),
            pipeline=pipeline,
        )
    for evaluator in (config.val_evaluator, config.test_evaluator):
        evaluator.update(ann_file=str(data.resolve() / "val.json"), metric=["bbox"])
    end = config.train_cfg.max_iters
    # Both factors are multiplied, so that the training may be shorter than the warm-up.
    config.param_scheduler = [
        dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=20),
        dict(type="CosineAnnealingLR", by_epoch=False, begin=0, end=end, eta_min=0),
    ]
    config.optim_wrapper.optimizer.lr = rate
    # RTMDet's levels share their convolutions.
    config.optim_wrapper.paramwise_cfg.bypass_duplicate = True
    config.custom_hooks = [dict(type="KeepWeights")]
    return config


def write_configs(sets: dict[str, Path], args: argparse.Namespace) -> dict[tuple[str, str], Path]:
    """Write the training of every model on every data set; returns the files."""
    files = {}
    for data, folder in sets.items():
        for name in args.models:
            files[data, name] = place(args, data, name) / "config.py"
            config = build_config(name, folder, args.side, args.batch, args.lr)
            files[data, name].parent.mkdir(parents=True, exist_ok=True)
            config.dump(files[data, name])
    return files


def place(args: argparse.Namespace, data: str, name: str) -> Path:
    """Folder of a model on a data set."""
    return args.out / data / name.replace(" ", "-")


def seconds_per_iteration(
    files: dict[tuple[str, str], Path], args: argparse.Namespace
) -> dict[str, float]:
    """Processor time of an iteration of every training, measured once for all seeds.

    Trainings take turns and the fastest turn counts: processor time grows with what else the
    machine does, and this way no model gets fewer iterations for it.
    """
    path = args.out / "seconds.json"
    found: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    missing = {pair: file for pair, file in files.items() if "|".join(pair) not in found}
    turns: dict[str, list[float]] = {}
    for _ in range(TURNS):
        for pair, file in missing.items():
            seconds, _ = recipes.seconds_per_iteration(str(file), place(args, *pair) / "timed", {})
            turns.setdefault("|".join(pair), []).append(seconds)
    found |= {name: min(values) for name, values in turns.items()}
    write_text(path, json.dumps(found, indent=1))
    return found


def train(file: Path, folder: Path, seed: int, length: int) -> dict[str, Any]:
    """Train with one seed for a number of iterations; returns what is kept of it."""
    config = recipes.prepare(str(file), folder, seed, {})
    recipes.set_length(config, length)
    clock, metrics, _ = recipes.run(config)
    return dict(metrics=metrics, minutes=clock.seconds / 60, length=length)


def train_all(
    sets: dict[str, Path], args: argparse.Namespace, iterations: int | None = None
) -> dict[str, dict]:
    """Train every model on every data set with every seed; returns all results by their keys.

    Args:
        sets: folders by name.
        args: of the command line.
        iterations: of each training; default: as many as take ``args.minutes``.
    """
    files = write_configs(sets, args)
    seconds = {} if iterations else seconds_per_iteration(files, args)
    path = args.out / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    # Seeds outermost: what is there after an interruption is a fair comparison.
    for seed in range(args.seeds):
        for (data, name), file in files.items():
            key = f"{data}|{name}|{seed}|{budget(args, iterations)}"
            if key in results:
                continue
            length = iterations or max(1, round(60 * args.minutes / seconds[f"{data}|{name}"]))
            results[key] = train(file, place(args, data, name) / str(seed), seed, length)
            write_text(path, json.dumps(results, indent=1))
            found = {k.removeprefix("coco/"): v for k, v in results[key]["metrics"].items()}
            print(key, length, f"{results[key]['minutes']:.2f} min", found, flush=True)
    return results


def budget(args: argparse.Namespace, iterations: int | None) -> str:
    """End of the keys of results: minutes, or iterations."""
    return f"{iterations} iterations" if iterations else f"{args.minutes:g}"


# --- exported files -------------------------------------------------------------------------------


class RTMDetGraph(DenseGraph):
    """Our graph of one-stage detectors for RTMDet: only what its head's maps mean differs.

    Args:
        model: with an ``RTMDetHead``.
    """

    def __init__(self, model: Any) -> None:
        # The base class takes no other heads than GFL's.
        Graph.__init__(self)
        self.model = model

    def boxes(self, level: int, cells: Tensor, distances: Tensor, size: tuple[int, ...]) -> Tensor:
        """See the base class; ``distances`` (B, K, 4) in pixels."""
        head = self.model.bbox_head
        points = cell_shifts(size, head.prior_generator.strides[level], distances)[cells.flatten()]
        decoded: Tensor = head.bbox_coder.decode(points, distances.flatten(0, 1))
        return decoded.view(cells.shape[0], -1, 4)


def build_graph(model: nn.Module, side: int, task: str = "detection") -> Graph:
    """The graph of a copy of a model whose norms and biases are constants."""
    ours = type(model.backbone).__module__.startswith("mmeformer.")
    folded = fold(model, (side, side) if ours else None)
    substitute_for_graph(folded)
    plain = isinstance(model, RTMDet) and not is_dense(model)
    graph = RTMDetGraph if plain else graph_class(task, "onnx", folded)
    made: Graph = graph(folded).eval()
    made.raw_names = ()
    return made


def extra_inputs(graph: Graph, side: int) -> dict[str, Tensor]:
    """Inputs beside an image of a side."""
    known = dict(
        image_size=torch.tensor([[side, side]], dtype=torch.float32),
        output_size=torch.tensor([side, side]),
    )
    return {name: known[name] for name in graph.extra_inputs}


def write_onnx(graph: Graph, side: int, path: Path) -> None:
    """Write a graph for one image of a side, shortened as exported files are."""
    inputs = dict(image=torch.rand(1, 3, side, side), **extra_inputs(graph, side))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            tuple(inputs.values()),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=list(inputs),
            output_names=list(graph.output_names),
            dynamic_axes=graph.output_axes(any_size=False),
        )
    onnx.save(simplify(onnx.load(path)), path)


def feeds(graph: Graph, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Inputs of the ONNX file for normalized images (3, side, side)."""
    others = {k: v.numpy() for k, v in extra_inputs(graph, images[0].shape[1]).items()}
    return [{"image": image[None], **others} for image in images]


class _Reader(CalibrationDataReader):
    def __init__(self, items: Sequence[dict[str, np.ndarray]]) -> None:
        self.items = iter(items)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input."""
        return next(self.items, None)


def write_int8(source: Path, out: Path, items: Sequence[dict[str, np.ndarray]]) -> None:
    """Quantize all convolutions and matrix products of a file."""
    prepared = source.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(out),
        _Reader(items),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
    )


def ratios(
    files: dict[str, Path],
    items: dict[str, list[dict[str, np.ndarray]]],
    reference: str,
    threads: int,
    rounds: int,
) -> dict[str, tuple[float, float]]:
    """Time of every file: median milliseconds, and median ratio to the reference of its round.

    Files take turns, so that all of them meet the same disturbances.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    sessions = {
        name: onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for name, path in files.items()
    }
    times: dict[str, list[float]] = {name: [] for name in files}
    for turn in range(rounds + 2):
        for name, session in sessions.items():
            item = items[name][turn % len(items[name])]
            start = time.perf_counter()
            session.run(None, item)
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {
        name: (
            1000 * statistics.median(values),
            statistics.median(
                mine / other for mine, other in zip(values, times[reference], strict=True)
            ),
        )
        for name, values in times.items()
    }


def count(model: nn.Module, graph: Graph, side: int) -> tuple[int, int]:
    """Parameters, and multiply-accumulates for one image (with its proposals, if any)."""
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        graph(image, *extra_inputs(graph, side).values())
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


# --- comparison -----------------------------------------------------------------------------------


def images_of(config: Config, model: nn.Module, side: int, limit: int) -> list[np.ndarray]:
    """Validation images as a model takes them: normalized, (3, side, side)."""
    folder = Path(config.val_dataloader.dataset.data_root)
    names = [i["file_name"] for i in json.loads((folder / "val.json").read_text())["images"]]
    arrays = []
    for name in names[:: max(1, len(names) // limit)][:limit]:
        image = cv2.resize(read_image(folder / name), (side, side))
        batch = dict(inputs=[torch.from_numpy(image).permute(2, 0, 1)], data_samples=None)
        arrays.append(model.data_preprocessor(batch)["inputs"][0].numpy())
    return arrays


def time_models(
    data: str, side: int, args: argparse.Namespace, seed: int = 0
) -> dict[str, dict[str, Any]] | None:
    """Parameters, MACs and times of the trained models of a data set for inputs of a side; None if
    a model is missing."""
    rows: dict[str, dict[str, Any]] = {}
    files, items = {}, {}
    with TemporaryDirectory() as text:
        for name in args.models:
            folder = place(args, data, name)
            weights = folder / str(seed) / WEIGHTS
            if not weights.is_file():
                return None
            config = Config.fromfile(folder / "config.py")
            set_test(config.model, 0.05)
            model = models.build_model(copy.deepcopy(config))
            model.load_state_dict(torch.load(weights, weights_only=True)["state_dict"])
            graph = build_graph(model, side)
            parameters, macs = count(model, graph, side)
            rows[name] = dict(parameters=parameters, macs=macs)
            files[name] = Path(text, f"{name}.onnx")
            write_onnx(graph, side, files[name])
            items[name] = feeds(graph, images_of(config, model, side, 8))
        reference = REFERENCE if REFERENCE in files else args.models[0]
        for threads in args.threads:
            for name, found in ratios(files, items, reference, threads, args.rounds).items():
                rows[name][f"ms, {threads}"], rows[name][f"ratio, {threads}"] = found
    return rows


def verdict(gain: float, ratio: float) -> str:
    """Whether a model is ahead of the reference by the goal of the light detectors.

    Args:
        gain: AP minus that of the reference, in points.
        ratio: time by that of the reference.
    """
    if ratio <= 1.05 and gain >= 2:
        return "goal reached: 2 points more at the same time"
    if ratio <= 0.7 and gain >= 0:
        return "goal reached: as good in 0.7 of the time"
    return "goal missed"


def seeds(results: dict, data: str, name: str, end: str) -> list[dict[str, Any]]:
    """The trainings of a model on a data set; ``end`` as :func:`budget` has it."""
    start, end = f"{data}|{name}|", f"|{end}"
    return [run for key, run in results.items() if key.startswith(start) and key.endswith(end)]


def aps(
    results: dict, data: str, name: str, end: str, key: str = "mAP"
) -> tuple[str, float | None]:
    """An AP of a model on a data set, in points: mean and deviation of its seeds as text, and mean.

    Empty and None without trainings, and where there are no objects of that size.
    """
    runs = seeds(results, data, name, end)
    values = [100 * run["metrics"][f"coco/bbox_{key}"] for run in runs]
    # COCO's code gives -1 where there are no such objects.
    if not values or statistics.mean(values) < 0:
        return "", None
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}", statistics.mean(values)


def comparison_table(sets: Sequence[str], args: argparse.Namespace, results: dict) -> str:
    """All results as a Markdown table."""
    head = ["data", "model", "M parameters", "GMACs", "iterations", "CPU min", "AP", "AP50"]
    head += ["AP small", "AP medium"]
    sides = args.time_sides or [args.side]
    runs_of = [(side, n) for side in sides for n in args.threads]
    head += [f"time at {side} px, {n} thread{'s' * (n > 1)}" for side, n in runs_of]
    head += [f"against {REFERENCE}"]
    lines = [head, ["---"] * len(head)]
    for data in sets:
        timed = {side: time_models(data, side, args) for side in sides}
        means: dict[str, float] = {}
        for name in args.models:
            runs = seeds(results, data, name, budget(args, None))
            if not runs:
                continue
            row = [data, name, "", ""]
            if found := timed[sides[0]]:
                row[2] = f"{found[name]['parameters'] / 1e6:.2f}"
                row[3] = f"{found[name]['macs'] / 1e9:.2f}"
            row.append(f"{statistics.mean(run['length'] for run in runs):.0f}")
            row.append(f"{statistics.mean(run['minutes'] for run in runs):.1f}")
            for key in ("mAP", "mAP_50", "mAP_s", "mAP_m"):
                text, mean = aps(results, data, name, budget(args, None), key)
                row.append(text)
                if key == "mAP" and mean is not None:
                    means[name] = mean
            for side, threads in runs_of:
                at = timed[side]
                row.append(
                    f"{at[name][f'ratio, {threads}']:.2f} ({at[name][f'ms, {threads}']:.1f} ms)"
                    if at
                    else ""
                )
            text = ""
            if found and name != REFERENCE and REFERENCE in means:
                gain = means[name] - means[REFERENCE]
                ratio = found[name][f"ratio, {args.threads[0]}"]
                text = f"{gain:+.1f} AP, {ratio:.2f} of the time: {verdict(gain, ratio)}"
            lines.append([*row, text])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def compare(args: argparse.Namespace) -> None:
    """Train, time and print the table."""
    sets = write_data(args)
    results = train_all(sets, args)
    table = comparison_table(list(sets), args, results)
    print(table, flush=True)
    write_text(args.out / "comparison.md", table)


# --- search ---------------------------------------------------------------------------------------


def candidates(
    variant: str, widths: Sequence[int], depths: Sequence[tuple[int, int]]
) -> list[tuple[str, int, int, int, int]]:
    """Arguments of :func:`candidate`: the config's sizes, and one change at a time.

    Args:
        variant: of the backbone.
        widths: channels of neck and head.
        depths: blocks of the neck's layers, and layers of the head's tower.
    """
    model = configs.load_config(LITE[variant]).model
    width, blocks, layers = (
        model.neck.out_channels,
        model.neck.num_csp_blocks,
        model.bbox_head.stacked_convs,
    )
    found = [(variant, width, blocks, layers, finest) for finest in (8, 4)]
    found += [(variant, other, blocks, layers, 8) for other in widths]
    found += [(variant, width, *depth, 8) for depth in depths]
    return list(dict.fromkeys(found))


def candidate(
    variant: str, width: int, blocks: int, layers: int, finest: int, classes: int, side: int
) -> dict:
    """A light detector of other sizes."""
    model = lite(variant, classes, side)
    channels = list(VARIANTS[variant].architecture.widths)
    if finest == 4:
        model.backbone.out_indices = (0, 1, 2, 3)
        model.neck.in_channels = channels
        model.bbox_head.anchor_generator.strides = [4, 8, 16, 32]
    model.neck.update(out_channels=width, num_csp_blocks=blocks)
    model.bbox_head.update(in_channels=width, feat_channels=width, stacked_convs=layers)
    return model


def built(model: dict) -> nn.Module:
    """A model of a config's `model`, with random weights and the limits of a deployed one."""
    set_test(model, 0.05)
    torch.manual_seed(0)
    config = configs.load_config(BASE)
    config.model = model
    return models.build_model(config)


def learned(choices: Sequence[tuple], args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Train candidates; returns the APs of each by data set, mean and deviation of the seeds."""
    names = {"-".join(map(str, choice)): choice for choice in choices}
    for name, choice in names.items():
        MODELS[name] = lambda classes, side, masks, choice=choice: candidate(*choice, classes, side)
    args = argparse.Namespace(**{**vars(args), "side": args.train_side, "models": list(names)})
    sets = write_data(args)
    results = train_all(sets, args, args.iterations)
    end = budget(args, args.iterations)
    return {name: {data: aps(results, data, name, end)[0] for data in sets} for name in names}


def search(args: argparse.Namespace) -> None:
    """Print the table of candidates."""
    head = ["backbone", "width", "neck blocks", "head layers", "strides", "M parameters", "GMACs"]
    kinds = [(kind, n) for kind in ("fp32", "int8") for n in args.threads]
    head += [f"{kind}, {n} thread{'s' * (n > 1)}" for kind, n in kinds]
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(3, args.side, args.side)).astype(np.float32) for _ in range(4)]
    built_models = {REFERENCE: built(rtmdet(args.classes))}
    rows = {REFERENCE: [REFERENCE, "96", "1", "2", "8 to 32"]}
    choices = [c for name in args.variants for c in candidates(name, args.widths, args.depths)]
    found = learned(choices, args) if args.iterations else {}
    for choice in choices:
        variant, width, blocks, layers, finest = choice
        name = "-".join(map(str, choice))
        built_models[name] = built(candidate(*choice, args.classes, args.side))
        rows[name] = [variant, str(width), str(blocks), str(layers), f"{finest} to 32"]
    with TemporaryDirectory() as text:
        files: dict[str, dict[str, Path]] = {"fp32": {}, "int8": {}}
        items = {}
        for name, model in built_models.items():
            graph = build_graph(model, args.side)
            parameters, macs = count(model, graph, args.side)
            rows[name] += [f"{parameters / 1e6:.2f}", f"{macs / 1e9:.2f}"]
            items[name] = feeds(graph, images)
            for kind in files:
                files[kind][name] = Path(text, f"{name}.{kind}.onnx")
            write_onnx(graph, args.side, files["fp32"][name])
            write_int8(files["fp32"][name], files["int8"][name], items[name])
        for kind, threads in kinds:
            timed = ratios(files[kind], items, REFERENCE, threads, args.rounds)
            for name, (milliseconds, ratio) in timed.items():
                rows[name].append(f"{ratio:.2f} ({milliseconds:.1f} ms)")
    sets = list(next(iter(found.values()), {}))
    head += [f"AP, {data}" for data in sets]
    for name, row in rows.items():
        row += [found.get(name, {}).get(data, "") for data in sets]
    lines = [head, ["---"] * len(head), *rows.values()]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    print(table, flush=True)
    write_text(args.out / "search.md", table)


# --- one model per need ---------------------------------------------------------------------------


def needs(args: argparse.Namespace) -> None:
    """Print a table of models for different needs, with random weights."""
    head = ["need", "config", "side", "M parameters", "GMACs"]
    head += [f"time, {n} thread{'s' * (n > 1)}" for n in args.threads]
    rows, files, items = {}, {}, {}
    rng = np.random.default_rng(0)
    with TemporaryDirectory() as text:
        for number, (need, path, side) in enumerate(NEEDS):
            side = args.side or side
            key = str(number)
            config = configs.load_config(path)
            torch.manual_seed(0)
            model = models.build_model(config)
            graph = build_graph(model, side, tasks.of_config(config).name)
            parameters, macs = count(model, graph, side)
            rows[key] = [need, Path(path).stem, f"{side}", f"{parameters / 1e6:.1f}"]
            rows[key].append(f"{macs / 1e9:.1f}")
            files[key] = Path(text, f"{key}.onnx")
            write_onnx(graph, side, files[key])
            image = rng.normal(size=(3, side, side)).astype(np.float32)
            items[key] = feeds(graph, [image])
        for threads in args.threads:
            for key, found in ratios(files, items, "0", threads, args.rounds).items():
                rows[key].append(f"{found[1]:.2f} ({found[0]:.0f} ms)")
    lines = [head, ["---"] * len(head), *rows.values()]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    print(table, flush=True)
    write_text(args.out / "needs.md", table)


NEEDS = (
    ("phone", LITE["efficientformerv2_s0"], 416),
    ("CPU", LITE["efficientformer_l1"], 416),
    ("GPU", "detection/gfl_efficientformerv2-s2_fpn_1x_coco.py", 640),
    (
        "masks, phone or CPU",
        "detection/rtmdet-ins-lite_efficientformerv2-s0_pafpn_300e_coco-640x640.py",
        640,
    ),
    ("masks", "detection/mask-rcnn_efficientformerv2-s0_fpn_1x_coco.py", 640),
    (
        "rotated, phone",
        "rotated/rotated-gfl-lite-le135_efficientformerv2-s0_pafpn_1x_dota.py",
        640,
    ),
    ("rotated", "rotated/rotated-gfl-le135_efficientformerv2-s0_fpn_1x_dota.py", 640),
    ("segmentation", "segmentation/semantic-fpn_efficientformerv2-s0_40k_ade20k-512x512.py", 512),
)
"""Need, config and side of the input. The first one is the baseline of the times."""


# --- command line ---------------------------------------------------------------------------------


def depth(text: str) -> tuple[int, int]:
    """``BLOCKS,LAYERS`` as two numbers."""
    blocks, layers = text.split(",")
    return int(blocks), int(layers)


def add_training_options(command: argparse.ArgumentParser) -> None:
    """Options of the data sets and the trainings."""
    for option in ("--labeled", "--halves"):
        command.add_argument(
            option, nargs=3, action="append", default=[], metavar=("NAME", "FOLDER", "TILE")
        )
    command.add_argument("--seeds", type=int)
    command.add_argument("--batch", type=int, default=4)
    command.add_argument("--lr", type=float, default=1e-3, help="of all models")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for work in (search, compare, needs):
        command = commands.add_parser(work.__name__, help=work.__doc__)
        command.set_defaults(work=work, shapes=SHAPES)
        command.add_argument("--out", type=Path, default=Path("work_dirs/lite"))
        command.add_argument("--threads", type=int, nargs="+", default=[1, 2])
        command.add_argument("--rounds", type=int, default=30, help="timed runs of every file")
        sides = {search: 416, compare: 96}
        command.add_argument("--side", type=int, default=sides.get(work), help="of inputs, px")
        if work is needs:
            continue
        add_training_options(command)
        if work is search:
            command.set_defaults(seeds=1)
            command.add_argument(
                "--iterations", type=int, default=0, help="of trainings; 0: train nothing"
            )
            command.add_argument("--train-side", type=int, default=96, help="of trainings, px")
            command.add_argument("--variants", nargs="+", choices=list(LITE), default=list(LITE))
            command.add_argument("--widths", type=int, nargs="+", default=[64, 96, 128, 160])
            command.add_argument(
                "--depths",
                type=depth,
                nargs="+",
                default=[(1, 1), (1, 3), (2, 2)],
                metavar="BLOCKS,LAYERS",
            )
            command.add_argument("--classes", type=int, default=80, help="of timed models")
            continue
        command.set_defaults(seeds=3)
        command.add_argument(
            "--minutes", type=float, default=3, help="processor time of a training"
        )
        command.add_argument(
            "--time-sides",
            type=int,
            nargs="+",
            help="of inputs that are timed, px; the first counts (default: --side)",
        )
        command.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    args = parser.parse_args(argv)
    args.work(args)


if __name__ == "__main__":
    main()
