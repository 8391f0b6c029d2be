# SPDX-License-Identifier: Apache-2.0
"""Large images: the same boxes as from the whole image, in batches, in bounded memory.

A stand-in for the detector finds bright rectangles with OpenCV, so that the right answer is known.
"""

import tracemalloc

import cv2
import numpy as np
import pytest
import tiny
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from mmrotate.structures.bbox import RotatedBoxes
from rotated_boxes import polygon_iou
from torch import nn

from mmeformer import configs
from mmeformer.rotated import detect_large_image, from_instances

AREA = 30 * 12
PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="mmdet.LoadAnnotations", with_bbox=True, box_type="qbox"),
    dict(type="ConvertBoxType", box_type_mapping=dict(gt_bboxes="rbox")),
    dict(type="mmdet.PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape")),
]


class BrightRectangles(nn.Module):
    """Finds rectangles: green ones are class 1, red ones class 2. Its score is the share of an
    object that it sees, and less than half an object is nothing."""

    def __init__(self):
        super().__init__()
        dataset = dict(type="mmeformer.DOTADataset", pipeline=PIPELINE)
        self.cfg = Config(dict(default_scope="mmrotate", test_dataloader=dict(dataset=dataset)))
        self.batches, self.shapes = [], set()

    def predict_batch(self, data):
        """Predictions of one batch, as mmdet's detectors give them."""
        self.batches.append(len(data["inputs"]))
        return [self._detect(image.permute(1, 2, 0).numpy()) for image in data["inputs"]]

    test_step = predict_batch

    def _detect(self, image):
        self.shapes.add(image.shape)
        boxes, scores, labels = [], [], []
        for label in (1, 2):
            mask = (image[..., label] == 255).astype(np.uint8)
            for contour in cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]:
                (x, y), (width, height), angle = cv2.minAreaRect(contour)
                if width * height > AREA / 2:
                    boxes.append([x, y, width, height, np.deg2rad(angle)])
                    scores.append(width * height / AREA)
                    labels.append(label)
        return DetDataSample(
            pred_instances=InstanceData(
                bboxes=RotatedBoxes(torch.tensor(boxes).reshape(-1, 5)),
                scores=torch.tensor(scores, dtype=torch.float32),
                labels=torch.tensor(labels, dtype=torch.int64),
            )
        )


def scene(width, height, seed=0):
    """Rotated rectangles of one size and two colors on a grid, so that they never touch."""
    generator = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.uint8)
    for x in range(25, width - 24, 50):
        for y in range(25, height - 24, 50):
            center = (x + generator.uniform(-4, 4), y + generator.uniform(-4, 4))
            corners = cv2.boxPoints((center, (30, 12), generator.uniform(0, 180)))
            color = (0, 255, 0) if generator.random() < 0.5 else (0, 0, 255)
            cv2.fillPoly(image, [corners.round().astype(np.int32)], color)
    return image


def by_place(detections):
    """The same boxes, sorted by their centers."""
    return detections.take(np.lexsort(detections.boxes.round(1)[:, :2].T))


@pytest.mark.parametrize("size", [(330, 250), (256, 700), (127, 110)])
def test_windows_give_what_the_whole_image_gives(size):
    image = scene(*size)
    model = BrightRectangles()
    whole = by_place(from_instances(model._detect(image).pred_instances))
    assert set(whole.labels) == {1, 2}
    merged = detect_large_image(model, image, size=128, overlap=50, batch_size=3)
    found = by_place(from_instances(merged.pred_instances))
    np.testing.assert_allclose(found.boxes[:, :2], whole.boxes[:, :2], atol=1e-3)
    np.testing.assert_array_equal(found.labels, whole.labels)
    np.testing.assert_allclose(np.diag(polygon_iou(found.boxes, whole.boxes)), 1, atol=1e-3)
    assert merged.ori_shape == image.shape[:2] and merged.img_path is None
    scores = merged.pred_instances.scores
    assert (scores.diff() <= 0).all()


def test_batches_progress_and_shapes():
    model = BrightRectangles()
    steps = []
    detect_large_image(
        model,
        scene(330, 60),
        size=128,
        overlap=28,
        batch_size=3,
        progress=lambda done, total: steps.append((done, total)),
    )
    # Three full windows and one that is moved back to the border.
    assert model.batches == [3, 1] and steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert model.shapes == {(128, 128, 3)}


def test_overlap_threshold_is_passed_on():
    image = scene(200, 200)
    model = BrightRectangles()
    counts = [
        len(detect_large_image(model, image, size=128, overlap=100, iou_thr=thr).pred_instances)
        for thr in (0.1, 1.0)
    ]
    assert counts[0] < counts[1]


def test_files_and_other_scopes(tmp_path):
    image = scene(150, 100)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    model = BrightRectangles()
    with DefaultScope.overwrite_default_scope("mmdet"):
        found = detect_large_image(model, tmp_path / "a.png", size=64, overlap=40)
    expected = detect_large_image(model, image, size=64, overlap=40)
    assert found.img_path == str(tmp_path / "a.png")
    assert torch.equal(found.pred_instances.bboxes.tensor, expected.pred_instances.bboxes.tensor)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="b.png cannot be read"):
        detect_large_image(model, tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"not \(100, 150\) uint8"):
        detect_large_image(model, image[..., 0])


def test_memory_does_not_grow_with_the_image():
    peaks = []
    for side in (600, 2400):
        image, model = scene(side, side), BrightRectangles()
        detect_large_image(model, image[:300, :300], size=256, overlap=60)
        tracemalloc.start()
        merged = detect_large_image(model, image, size=256, overlap=60, batch_size=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(merged.pred_instances) == (side // 50) ** 2
    window = 256 * 256 * 3
    # Sixteen times the windows; 2,304 boxes are all that is kept of them.
    assert peaks[1] < peaks[0] + 4 * window < 2400 * 2400 * 3 / 4


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A tiny detector through config file and checkpoint."""
    folder = tmp_path_factory.mktemp("detector")
    config = tiny.rotated(folder, iterations=1)
    configs.drop_pretrained(config.model)
    config.model.test_cfg.score_thr = 0.0
    config.model.test_cfg.nms_pre = 50
    meta = dict(config.test_dataloader.dataset.metainfo)
    config.dump(folder / "config.py")
    with DefaultScope.overwrite_default_scope("mmrotate"):
        model = MODELS.build(config.model)
    weights = dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta))
    torch.save(weights, folder / "epoch_1.pth")
    return init_detector(str(folder / "config.py"), str(folder / "epoch_1.pth"), device="cpu")


def test_detectors_of_mmdet_work_with_config_and_checkpoint_alone(detector, tmp_path):
    assert detector.dataset_meta["classes"] == ("ship", "vehicle", "plane", "court")
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    whole = inference_detector(detector, str(tmp_path / "a.png"))
    assert whole.pred_instances.bboxes.shape[1] == 5 and len(whole.pred_instances) > 0
    # One window as large as the image is the same thing.
    merged = detect_large_image(detector, str(tmp_path / "a.png"), size=128, overlap=0)
    expected = from_instances(inference_detector(detector, image).pred_instances)
    found = from_instances(merged.pred_instances)
    np.testing.assert_allclose(found.scores, expected.suppressed(0.1).scores, atol=1e-6)
    np.testing.assert_allclose(found.boxes, expected.suppressed(0.1).boxes, atol=1e-3)
    # Batches change nothing.
    large = np.random.default_rng(1).integers(0, 256, (128, 200, 3), np.uint8)
    one, two = (
        from_instances(
            detect_large_image(
                detector, large, size=128, overlap=60, batch_size=batch
            ).pred_instances
        )
        for batch in (1, 2)
    )
    np.testing.assert_allclose(one.scores, two.scores, atol=1e-5)
