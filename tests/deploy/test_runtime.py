# SPDX-License-Identifier: Apache-2.0
import copy
import io
import json
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmeformer import configs, runtime, tasks
from mmeformer.deploy import models
from mmeformer.deploy.metadata import export_metadata
from mmeformer.images import as_image
from mmeformer.inference import load_predictor
from mmeformer.results import Mask
from mmeformer.rotated_boxes import rotated_iou, rotated_nms
from mmeformer.runtime.images import prepare
from mmeformer.runtime.metadata import KEY, Metadata
from mmeformer.training_images import TrainingImages
from mmeformer.windows import crop, windows

METADATA = Metadata(
    task="detection",
    version="0",
    config="config",
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    bgr_to_rgb=True,
    scale=(133, 80),
    pad_divisor=32,
)

# None in sys.modules makes an import fail as a missing package does.
PROGRAM = """
import json, sys
for name in "torch torchvision timm mmengine mmcv mmdet mmseg mmrotate mmpretrain".split():
    sys.modules[name] = None
from mmeformer import runtime
import mmeformer
result = runtime.load(sys.argv[1]).predict(sys.argv[2])
print(json.dumps([mmeformer.__version__, result.boxes.tolist(), result.masks().sum().item()]))
"""


def test_needs_neither_pytorch_nor_openmmlab(onnx_file, picture):
    path = onnx_file("detection", size=(64, 96), batch=2, preprocessing=False)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), str(picture)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    version, boxes, pixels = json.loads(done.stdout)
    result = runtime.load(path).predict(picture)
    assert version == result_version() and pixels == result.masks().sum() > 0
    np.testing.assert_array_equal(np.array(boxes, np.float32), result.boxes)


def result_version() -> str:
    from mmeformer import __version__

    return __version__


def pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module", params=["detection", "segmentation"])
def published(request):
    """(task, test pipeline, model, metadata) of a published config."""
    task = request.param
    if task == "detection":
        config = configs.load_config("detection/mask-rcnn_efficientformerv2-s0_fpn_1x_coco.py")
    else:
        name = "segmentation/semantic-fpn_efficientformerv2-s0_40k_ade20k-512x512.py"
        config = configs.load_config(name)
    pipeline = [
        step
        for step in config.test_dataloader.dataset.pipeline
        if not step.type.rpartition(".")[2].startswith(("Load", "Pack"))
    ]
    pipeline[0].scale = (133, 80)
    config.test_dataloader.dataset.pipeline = pipeline
    model = models.build_model(copy.deepcopy(config))
    return task, pipeline, model, export_metadata(config, model, task)


@pytest.mark.parametrize("size", [(33, 47), (200, 90), (80, 133), (7, 300), (480, 640)])
def test_prepares_as_the_test_pipelines_do(published, size):
    """Against mmdet's and mmseg's own transforms and data preprocessors."""
    task, pipeline, model, metadata = published
    image = pixels(*size)
    ours = prepare(image, metadata)

    from mmcv.transforms import Compose
    from mmengine.registry import TRANSFORMS, DefaultScope

    with DefaultScope.overwrite_default_scope("mmdet" if task == "detection" else "mmseg"):
        steps = Compose([TRANSFORMS.build(step) for step in pipeline])
        theirs = steps(dict(img=image, img_shape=size, ori_shape=size))["img"]
    assert ours.size == theirs.shape[:2] and ours.original == size
    if task == "detection":
        from mmdet.structures import DetDataSample as Sample
    else:
        from mmseg.structures import SegDataSample as Sample
    data = dict(
        inputs=[torch.from_numpy(np.ascontiguousarray(theirs.transpose(2, 0, 1)))],
        data_samples=[Sample(metainfo=dict(img_shape=theirs.shape[:2], ori_shape=size))],
    )
    (batch,) = model.data_preprocessor(data)["inputs"]
    np.testing.assert_allclose(ours.data, batch.numpy(), rtol=0, atol=1e-6)


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    fixed=st.tuples(st.integers(32, 200), st.integers(32, 200)),
    scale=st.one_of(st.none(), st.tuples(st.integers(16, 300), st.integers(16, 300))),
    keep_ratio=st.booleans(),
    task=st.sampled_from(["detection", "segmentation"]),
)
def test_everything_fits_a_fixed_size(size, fixed, scale, keep_ratio, task):
    metadata = replace(METADATA, task=task, size=fixed, scale=scale, keep_ratio=keep_ratio)
    item = prepare(np.zeros((*size, 3), np.uint8), metadata)
    assert item.data.shape == (3, *fixed)
    assert all(0 < side <= limit for side, limit in zip(item.size, fixed, strict=True))
    if task == "segmentation":
        assert item.size == fixed


@settings(max_examples=80)
@given(
    edges=st.tuples(*[st.floats(-20, 60, width=32)] * 4),
    image=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    side=st.sampled_from([14, 28]),
)
def test_masks_are_pasted_as_mmdet_does(edges, image, side):
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    left, top, right, bottom = edges
    box = np.array([min(left, right), min(top, bottom), max(left, right), max(top, bottom)])
    if min(box[2] - box[0], box[3] - box[1]) < 0.1:
        return
    scores = np.random.default_rng(0).random((side, side)).astype(np.float32)
    ours = np.zeros(image, bool)
    Mask.from_scores(scores, box, 0.5, image).paste(ours)
    theirs, _ = _do_paste_mask(
        torch.from_numpy(scores)[None, None],
        torch.tensor(box, dtype=torch.float32)[None],
        *image,
        skip_empty=False,
    )
    close = np.abs(theirs[0].numpy() - 0.5) < 1e-4
    np.testing.assert_array_equal(ours[~close], (theirs[0].numpy() >= 0.5)[~close])


# The two have different smallest areas that they call an area.
SIDE = st.just(0) | st.floats(1e-3, 30)
BOX = st.tuples(st.floats(0, 40), st.floats(0, 40), SIDE, SIDE, st.floats(-4, 4))


@settings(max_examples=150)
@given(box=BOX, others=st.lists(BOX, min_size=1, max_size=5))
def test_rotated_iou_is_that_of_training(box, others):
    iou = pytest.importorskip("mmeformer.ops.iou")
    others = [box, *others]
    theirs = iou.rotated_iou(
        torch.tensor(box, dtype=torch.float64), torch.tensor(others, dtype=torch.float64)
    )
    np.testing.assert_allclose(rotated_iou(box, others), theirs.numpy(), atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_rotated_nms_is_that_of_mmcv(seed):
    from mmcv.ops import batched_nms

    random = np.random.default_rng(seed)
    center, size = random.uniform(0, 100, (150, 2)), random.uniform(4, 40, (150, 2))
    angle = random.uniform(-0.78, 2.35, (150, 1))
    boxes = np.concatenate([center, size, angle], 1).astype(np.float32)
    scores = random.random(150).astype(np.float32)
    labels = random.integers(0, 3, 150)
    _, theirs = batched_nms(
        *map(torch.from_numpy, (boxes, scores, labels)), dict(type="nms_rotated", iou_threshold=0.1)
    )
    kept = rotated_nms(boxes, scores, labels, 0.1)
    assert 10 < len(kept) < 140
    assert kept.tolist() == theirs.tolist()
    assert len(rotated_nms(boxes[:0], scores[:0], labels[:0], 0.1)) == 0


def test_corners_are_those_of_mmrotate():
    structures = pytest.importorskip("mmrotate.structures.bbox")
    boxes = np.array([[10, 20, 30, 8, 0.3], [5, 5, 2, 9, -0.7]], np.float32)
    result = runtime.RotatedDetections(boxes, np.ones(2), np.zeros(2, int))
    theirs = structures.RotatedBoxes(torch.from_numpy(boxes)).convert_to("qbox").tensor
    ours = {tuple(np.round(corner, 3)) for corner in result.corners().reshape(-1, 2).tolist()}
    assert ours == {tuple(np.round(corner, 3)) for corner in theirs.view(-1, 2).tolist()}


def test_a_model_of_patches_cuts_and_pads(onnx_file):
    predictor = runtime.load(onnx_file("rotated", size=None))
    assert predictor.metadata.patch_size == predictor.patch_size == 64
    small, large = pixels(30, 40), pixels(50, 150)
    found = predictor.predict_batch([small, large, pixels(64, 64)])
    padded = crop(small, (0, 0, 40, 30), 64)
    np.testing.assert_array_equal(found[0].boxes, predictor.predict(padded).boxes)
    places = windows(150, 50, 64, 16)
    assert len(places) == 3
    parts = predictor.predict_batch([crop(large, place, 64) for place in places])
    expected = runtime.RotatedDetections.merged(places, parts, predictor.metadata.iou_threshold)
    assert len(expected) > 3
    np.testing.assert_allclose(found[1].boxes, expected.boxes, atol=1e-3)
    whole = runtime.Predictor(predictor.session, replace(predictor.metadata, patch_size=0))
    assert whole.predict(large).boxes.shape != found[1].boxes.shape


def test_windows_fit_a_file_of_a_smaller_size_than_the_training(onnx_file):
    predictor = runtime.load(onnx_file("rotated", size=None))
    metadata = replace(predictor.metadata, patch_size=512, scale=(1024, 1024), size=(512, 640))
    assert runtime.Predictor(predictor.session, metadata).patch_size == 256


def test_an_image_at_another_scale_than_in_training_is_named(onnx_file):
    predictor = runtime.load(onnx_file("rotated", size=None))
    metadata = replace(predictor.metadata, patch_size=0, training_sides=(30, 40))
    whole = runtime.Predictor(predictor.session, metadata)
    with pytest.warns(UserWarning, match="80 x 20 px: objects appear at 0.5 times the scale"):
        whole.predict(pixels(20, 80))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole.predict(pixels(20, 36))


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize("sides", [None, (30, 400)])
def test_the_size_from_which_the_checkpoint_cuts_is_recorded(trained, task, sides):
    """By the rule of ``Predictor.window_of``."""
    known = trained(task)
    model = models.build_model(known.config, known.checkpoint)
    if sides:
        model.dataset_meta = model.dataset_meta | TrainingImages(sides).to_meta()
    metadata = export_metadata(known.config, model, task)
    limit = metadata.cut_above
    assert metadata.window == configs.native_size(known.config)
    assert limit == 8 * (400 if sides else configs.native_size(known.config))
    predictor = load_predictor(known.config, known.checkpoint, device="cpu")
    predictor.training_images = TrainingImages(sides)
    assert predictor.window_of((limit + 1, 20)) and not predictor.window_of((20, limit))


def test_a_rotated_detector_cuts_by_its_patches(onnx_file):
    assert runtime.load(onnx_file("rotated", size=None)).metadata.cut_above is None


def test_files_of_earlier_versions_load():
    values = json.loads(METADATA.to_json())
    for name in ("patch_size", "training_sides", "category_ids", "cut_above", "window"):
        del values[name]
    assert Metadata.from_json(json.dumps(values), "old.onnx") == METADATA


@pytest.mark.parametrize("task", ["detection", "rotated"])
def test_scores_below_the_threshold_are_left_out_whatever_the_graph_does(task):
    metadata = replace(METADATA, task=task, score_threshold=0.5, iou_threshold=0.5)
    boxes = np.array([[0, 0, 9, 9, 0], [20, 20, 8, 9, 0], [40, 40, 9, 9, 0]], np.float32)
    outputs = dict(
        boxes=boxes if task == "rotated" else boxes[:, :4] + [0, 0, 40, 40],
        scores=np.array([0.9, 0.5, 0.2], np.float32),
        labels=np.zeros(3, np.int64),
        image_index=np.zeros(3, np.int64),
    )
    batch = [prepare(pixels(80, 80), metadata)]
    (found,) = tasks.load(metadata.export.decoder)(batch, outputs, metadata)
    assert found.scores.tolist() == [np.float32(0.9)]


@pytest.fixture
def segmentor(onnx_file) -> Path:
    """File of an exported segmentor of a fixed size."""
    return onnx_file("segmentation", size=(64, 96), batch=2, preprocessing=True)


def test_images_come_in_many_forms(segmentor, tmp_path):
    predictor = runtime.load(segmentor)
    image = pixels(50, 70)
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), image)
    expected = predictor.predict(path).labels
    content = path.read_bytes()
    opaque = np.dstack([image, np.full((50, 70), 9, np.uint8)])
    given = [image, content, bytearray(content), io.BytesIO(content), Image.open(path), opaque]
    given += [Image.fromarray(cv2.cvtColor(opaque, cv2.COLOR_BGRA2RGBA)), path.open("rb")]
    assert len(np.unique(expected)) > 1
    for found in predictor.predict_batch(given):
        np.testing.assert_array_equal(found.labels, expected)
    gray = image[..., 0]
    expected = predictor.predict(np.dstack([gray] * 3)).labels
    for found in predictor.predict_batch([gray, gray[..., None], Image.fromarray(gray)]):
        np.testing.assert_array_equal(found.labels, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pillow_images_are_turned_as_opencv_turns_files(orientation, tmp_path):
    image = Image.fromarray(pixels(20, 30))
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "turned.jpg"
    image.save(path, exif=exif, quality=100)
    ours, theirs = as_image(Image.open(path)), cv2.imread(str(path))
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 3


def test_options_of_the_session(segmentor):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 3
    predictor = runtime.load(segmentor, options=options)
    assert predictor.session.get_session_options().intra_op_num_threads == 3
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(predictor)


def test_predictors_go_to_other_processes(segmentor):
    predictor = runtime.load(segmentor, threads=2)
    again = pickle.loads(pickle.dumps(predictor))
    assert again.session.get_session_options().intra_op_num_threads == 2
    image = pixels(40, 60)
    np.testing.assert_array_equal(again.predict(image).labels, predictor.predict(image).labels)


def test_batches_and_sizes_may_mix(segmentor, picture):
    predictor = runtime.load(segmentor)
    images = [pixels(64, 64), pixels(40, 90), pixels(64, 64), picture, pixels(64, 64)]
    results = predictor.predict_batch(images)
    for image, result in zip(images, results, strict=True):
        single = predictor.predict(image)
        shown = cv2.imread(str(picture)) if image is picture else image
        assert single.labels.shape == shown.shape[:2]
        np.testing.assert_array_equal(single.labels, result.labels)
    palette = predictor.metadata.palette
    np.testing.assert_array_equal(
        results[1].colors(palette)[0, 0], palette[results[1].labels[0, 0]]
    )


def test_huge_segmentations_keep_to_the_memory(segmentor, monkeypatch):
    predictor = runtime.load(segmentor)
    image = pixels(60, 120)
    full = predictor.predict(image).labels
    monkeypatch.setattr(runtime.predictor, "MAX_LOGITS", 60 * 120 * 5 // 4)
    small = predictor.predict(image).labels
    assert small.shape == full.shape
    assert 0.5 < (small == full).mean() < 1


class TestBadInput:
    def test_images(self, segmentor, tmp_path):
        predictor = runtime.load(segmentor)
        with pytest.raises(FileNotFoundError, match="gone.jpg"):
            predictor.predict("gone.jpg")
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no image")
        with pytest.raises(ValueError, match="broken.png cannot be read"):
            predictor.predict(broken)
        for shape, kind in (((4, 4, 2), "u1"), ((4, 4, 3), "f8"), ((0, 4, 3), "u1"), ((4,), "u1")):
            with pytest.raises(ValueError, match=r"must be \(H, W\), .* of uint8, but is"):
                predictor.predict(np.zeros(shape, kind))
        with pytest.raises(ValueError, match="the image cannot be read as an image"):
            predictor.predict(b"no image")
        with pytest.raises(TypeError, match="not list"):
            predictor.predict([[1, 2], [3, 4]])
        with pytest.raises(TypeError, match="opened in binary mode"):
            predictor.predict(io.StringIO("text"))
        with pytest.raises(ValueError, match="the mode I;16, more than 8 bits"):
            predictor.predict(Image.fromarray(np.zeros((4, 4), np.uint16)))

    def test_providers(self, segmentor, monkeypatch):
        with pytest.raises(ValueError, match=r"has no CUDAExecutionProvider, only .*CPUExecution"):
            runtime.load(segmentor, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
        # Known, but its libraries are missing: onnxruntime goes on with the CPU.
        known = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
        with (
            warnings.catch_warnings(),
            pytest.raises(ValueError, match="could not start CUDAExecutionProvider"),
        ):
            warnings.simplefilter("ignore")
            runtime.load(segmentor, providers=[("CUDAExecutionProvider", {"device_id": 0})])

    def test_files(self, segmentor, tmp_path):
        with pytest.raises(FileNotFoundError, match="gone.onnx does not exist"):
            runtime.load("gone.onnx")
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(b"no model")
        with pytest.raises(ValueError, match="broken.onnx: onnxruntime cannot load it"):
            runtime.load(broken)
        proto = onnx.load(str(segmentor))
        (entry,) = (item for item in proto.metadata_props if item.key == KEY)
        text = json.loads(entry.value)
        for change, message in (
            ("{", "metadata is damaged"),
            (json.dumps({**text, "format": 99}), "has format 99"),
            (json.dumps({**text, "colour": 1}), r"unknown entries \['colour'\]"),
        ):
            entry.value = change
            onnx.save(proto, str(broken))
            with pytest.raises(ValueError, match=message):
                runtime.load(broken)
        proto.metadata_props.remove(entry)
        onnx.save(proto, str(broken))
        with pytest.raises(ValueError, match="broken.onnx has no metadata of mmeformer"):
            runtime.load(broken)

    def test_task(self):
        with pytest.raises(ValueError, match="task must be one of"):
            replace(METADATA, task="cooking")
