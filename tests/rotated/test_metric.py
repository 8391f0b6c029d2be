# SPDX-License-Identifier: Apache-2.0
"""The metric in mmengine's evaluator: patches, whole images, submissions, and mistakes."""

import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.logging import MMLogger
from mmengine.structures import InstanceData
from mmrotate.structures.bbox import QuadriBoxes, RotatedBoxes
from rotated_boxes import random_boxes, random_detections

from mmeformer.registry import METRICS
from mmeformer.results import RotatedDetections
from mmeformer.rotated.dota import DotaObject, format_label, read_labels
from mmeformer.rotated.evaluation import GroundTruth, evaluate
from mmeformer.rotated.metric import enclosing_boxes
from mmeformer.rotated.patches import CutSettings, PatchName, objects_inside
from mmeformer.rotated_boxes import corners
from mmeformer.windows import windows

META = dict(classes=("plane", "ship", "harbor"))


def build(**kwargs):
    metric = METRICS.build({"type": "mmeformer.DOTAMetric"} | kwargs)
    metric.dataset_meta = META
    return metric


def instances(boxes, labels, **others):
    return InstanceData(
        bboxes=RotatedBoxes(torch.as_tensor(boxes, dtype=torch.float32)),
        labels=torch.as_tensor(labels),
        **others,
    )


def sample(name, detections, truth=None):
    """What a detector and the pipeline give, as the evaluator hands it on."""
    found = instances(detections.boxes, detections.labels, scores=torch.tensor(detections.scores))
    data = DetDataSample(metainfo=dict(img_id=name), pred_instances=found)
    if truth is None:
        data.gt_instances, data.ignored_instances = InstanceData(), InstanceData()
    else:
        for key, wanted in (("gt_instances", False), ("ignored_instances", True)):
            which = truth.ignored == wanted
            data.set_data({key: instances(truth.boxes[which], truth.labels[which])})
    return data.to_dict()


def run(metric, samples):
    """Two batches through the metric."""
    metric.process({}, samples[:1])
    metric.process({}, samples[1:])
    return metric.evaluate(len(samples))


def near(truth, generator):
    """Predictions somewhat beside their objects."""
    shift = generator.normal(0, 1.5, truth.boxes.shape) * [1, 1, 1, 1, 0.05]
    boxes = (truth.boxes + shift).astype(np.float32)
    boxes[:, 2:4] = boxes[:, 2:4].clip(2)
    return RotatedDetections(boxes, generator.random(len(boxes)).astype(np.float32), truth.labels)


def random_truth(generator, count=30, side=150):
    return GroundTruth(
        random_boxes(generator, count, side),
        generator.integers(0, 3, count),
        generator.random(count) < 0.3,
    )


@pytest.mark.parametrize("mode", ["11points", "area"])
def test_scores_of_patches_are_means_over_classes_and_thresholds(mode):
    generator = np.random.default_rng(0)
    images = [
        (near(truth, generator), truth)
        for truth in (random_truth(generator), random_truth(generator, 0))
    ]
    scores = run(build(eval_mode=mode), [sample(f"P{n}", *pair) for n, pair in enumerate(images)])
    ap = evaluate(images, 3, mode).ap
    assert set(scores) == {"dota/AP", "dota/AP50", "dota/AP75"}
    assert scores["dota/AP50"] == pytest.approx(ap[0].mean())
    assert scores["dota/AP75"] == pytest.approx(ap[5].mean())
    assert scores["dota/AP"] == pytest.approx(ap.mean())
    assert 0 < scores["dota/AP75"] < scores["dota/AP"] < scores["dota/AP50"] < 1


def test_default_is_the_11_points_of_dota():
    assert build().eval_mode == "11points"


def test_table_has_all_classes(caplog):
    generator = np.random.default_rng(1)
    truth = GroundTruth(random_boxes(generator, 4, 100), np.array([0, 0, 1, 1]), np.zeros(4, bool))
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        exact = RotatedDetections(truth.boxes, np.ones(4, np.float32), truth.labels)
        scores = run(build(), [sample("P", exact, truth)])
    finally:
        logger.removeHandler(caplog.handler)
    assert scores["dota/AP"] == 1
    rows = [line.split() for line in caplog.text.splitlines() if line.startswith("|")]
    cells = {row[1]: row[3::2] for row in rows}
    assert cells["class"] == ["objects", "detections", "recall50", "AP50", "AP75", "AP"]
    assert cells["plane"] == ["2", "2", "1.000", "1.000", "1.000", "1.000"]
    assert cells["harbor"] == ["0", "0", "-", "-", "-", "-"]
    assert cells["mean"] == ["4", "4", "1.000", "1.000", "1.000", "1.000"]


def write_labels(folder, truths):
    """Original label files of whole images; the ignored objects are difficult."""
    folder.mkdir()
    for name, truth in truths.items():
        lines = [
            format_label(polygon, META["classes"][label], int(hard))
            for polygon, label, hard in zip(
                corners(truth.boxes), truth.labels, truth.ignored, strict=True
            )
        ]
        text = "imagesource:GoogleEarth\ngsd:0.1\n" + "\n".join(lines)
        (folder / f"{name}.txt").write_text(text)


def cut(name, detections, side, size, overlap):
    """A whole image's predictions as those of its patches; cut ones score less."""
    objects = [
        DotaObject(polygon, str(row), 0, 0) for row, polygon in enumerate(detections.corners())
    ]
    for window in windows(side, side, size, overlap):
        rows = [
            int(item.name)
            for item in objects_inside(objects, window, CutSettings(size, overlap, iof=1.0))
        ]
        patch = str(PatchName(name, size, *window[:2]))
        yield sample(patch, detections.take(rows).moved(-window[0], -window[1]))


def test_merged_patches_are_evaluated_with_the_original_labels(tmp_path):
    generator = np.random.default_rng(2)
    truths = {name: random_truth(generator, side=300) for name in ("P__1", "P2")}
    truths["empty"] = random_truth(generator, 0)
    write_labels(tmp_path / "labelTxt", truths)
    found = {name: near(truth, generator).suppressed(0.1) for name, truth in truths.items()}
    samples = [
        item
        for name, part in found.items()
        for item in cut(name, part, side=300, size=150, overlap=80)
    ]
    metric = build(
        merge_patches=True,
        ann_dir=str(tmp_path / "labelTxt"),
        submission_dir=str(tmp_path / "sub" / "mission"),
    )
    scores = run(metric, samples)
    # Objects beyond the image's border are in no patch wholly.
    seen = {}
    for name, part in found.items():
        points = part.corners()
        seen[name] = part.take(((points > 0) & (points < 300)).all((1, 2)))
    expected = evaluate([(seen[name], truths[name]) for name in truths], 3)
    assert scores["dota/AP50"] == pytest.approx(expected.ap[0].mean(), abs=1e-6)
    assert scores["dota/AP"] == pytest.approx(expected.ap.mean(), abs=5e-3)
    assert 0.1 < scores["dota/AP"] < 0.9

    files = sorted(path.name for path in (tmp_path / "sub" / "mission").iterdir())
    assert files == ["Task1.zip", "Task1_harbor.txt", "Task1_plane.txt", "Task1_ship.txt"]
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["mission"]
    lines = (tmp_path / "sub" / "mission" / "Task1_ship.txt").read_text().splitlines()
    assert len(lines) == sum(int((part.labels == 1).sum()) for part in seen.values())
    assert {line.split()[0] for line in lines} == {"P__1", "P2"}
    assert all(len(line.split()) == 10 for line in lines)
    with zipfile.ZipFile(tmp_path / "sub" / "mission" / "Task1.zip") as archive:
        assert sorted(archive.namelist()) == files[1:]
        assert archive.read("Task1_ship.txt").decode().splitlines() == lines


def test_difficult_objects_of_label_files_are_ignored_above_the_threshold(tmp_path):
    generator = np.random.default_rng(3)
    truth = random_truth(generator)
    write_labels(tmp_path / "labelTxt", {"P": truth})
    found = near(truth, generator)
    for threshold, ignored in ((0, truth.ignored), (1, np.zeros(30, bool))):
        metric = build(ann_dir=str(tmp_path / "labelTxt"), diff_thr=threshold)
        expected = evaluate([(found, replace(truth, ignored=ignored))], 3).ap[0].mean()
        assert run(metric, [sample("P", found)])["dota/AP50"] == pytest.approx(expected, abs=1e-6)


def test_submission_without_labels(tmp_path):
    found = random_detections(np.random.default_rng(4), 10, 100)
    metric = build(submission_dir=str(tmp_path / "task1"))
    assert run(metric, [sample("P1", found), sample("P2", RotatedDetections.concatenate([]))]) == {}
    assert len((tmp_path / "task1" / "Task1_plane.txt").read_text().splitlines()) == int(
        (found.labels == 0).sum()
    )
    # A second test replaces the first one's submission.
    metric = build(submission_dir=str(tmp_path / "task1"))
    metric.process({}, [sample("P3", found.take([0]))])
    assert metric.evaluate(1) == {}
    texts = [path.read_text() for path in (tmp_path / "task1").glob("*.txt")]
    assert len(texts) == 3 and "".join(texts).startswith("P3") and len(texts) == 3
    # Other files are never touched.
    (tmp_path / "task1" / "notes.txt").touch()
    with pytest.raises(
        FileExistsError, match="task1 has files that are not of a submission; choose another"
    ):
        build(submission_dir=str(tmp_path / "task1"))
    with pytest.raises(FileExistsError, match="notes.txt has files that are not of a submission"):
        build(submission_dir=str(tmp_path / "task1" / "notes.txt"))


def test_mistakes_are_named(tmp_path):
    found = random_detections(np.random.default_rng(5), 10, 100)
    with pytest.raises(ValueError, match="eval_mode is 'coco'"):
        build(eval_mode="coco")
    with pytest.raises(ValueError, match="merge_patches needs ann_dir"):
        build(merge_patches=True)
    with pytest.raises(FileNotFoundError, match="label folder .* does not exist"):
        build(ann_dir=str(tmp_path / "labelTxt"))
    with pytest.raises(ValueError, match="1 of 1 images have no objects loaded.*LoadAnnotations"):
        run(build(), [sample("P1", found)])
    with pytest.raises(ValueError, match="two images of the data set have the same name"):
        run(build(), [sample("P1", found), sample("P1", found)])
    nothing = random_truth(np.random.default_rng(6), 0)
    with pytest.raises(ValueError, match="no image has an object to find"):
        run(build(), [sample("P1", found, nothing)])
    write_labels(tmp_path / "labels", {"P1": nothing})
    with pytest.raises(ValueError, match="'P1' is not the name of a patch"):
        run(build(ann_dir=str(tmp_path / "labels"), merge_patches=True), [sample("P1", found)])
    with pytest.raises(FileNotFoundError, match="has no label file for 1 of 1 images.*P2"):
        run(build(ann_dir=str(tmp_path / "labels")), [sample("P2", found)])
    (tmp_path / "labels" / "P1.txt").write_text("0 0 1 0 1 1 0 1 barge 0")
    with pytest.raises(ValueError, match="(?s)'barge': 1 objects.*dropped_classes"):
        run(build(ann_dir=str(tmp_path / "labels")), [sample("P1", found)])
    quads = sample("P1", found, nothing)
    quads["gt_instances"]["bboxes"] = QuadriBoxes(torch.rand(0, 8))
    with pytest.raises(ValueError, match="boxes have 8 numbers.*ConvertBoxType"):
        run(build(), [quads])


def test_boxes_around_rectangles_are_these_rectangles(tmp_path):
    boxes = random_boxes(np.random.default_rng(7), 50, 20_000)
    path = tmp_path / "a.txt"
    path.write_text("\n".join(format_label(polygon, "ship", 0) for polygon in corners(boxes)))
    found = enclosing_boxes(read_labels(path))
    points = [np.sort(corners(each).reshape(-1, 8), axis=1) for each in (boxes, found)]
    np.testing.assert_allclose(*points, atol=0.03)
    assert enclosing_boxes([]).shape == (0, 5)
