# SPDX-License-Identifier: Apache-2.0
"""The report of a classifier, and ``load``; counts of predictions that were made by hand."""

import json
import shutil

import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement

import mmeformer
from mmeformer.classification.review import ClassificationReview
from mmeformer.report import build
from mmeformer.results import Classification
from mmeformer.runtime import drawing

pytestmark = pytest.mark.usefixtures("quiet_logging")


def test_confusion_and_precision_of_images():
    review = ClassificationReview(("cat", "dog", "owl"))
    found = [
        # label, probabilities
        (0, (0.7, 0.2, 0.1)),
        (0, (0.3, 0.6, 0.1)),
        (1, (0.6, 0.3, 0.1)),
        (1, (0.1, 0.8, 0.1)),
    ]
    for label, scores in found:
        sample = BaseDataElement(gt_label=torch.tensor([label]))
        score = review.add(Classification(np.array(scores, np.float32)), sample)
        assert score == pytest.approx(scores[label])
        assert review.truth(sample).label == label
    summary = review.summary()
    assert summary.confusion.counts.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    cat, dog = summary.curves
    # By their score for cats: cat, dog, cat, dog. For dogs: dog, cat, dog, cat.
    for curve in (cat, dog):
        assert curve.precision[:51] == pytest.approx(1)
        assert curve.precision[51:] == pytest.approx(2 / 3)
    assert summary.table.rows[0] == ("cat", 2, 0.5, 0.5, pytest.approx((51 + 50 * 2 / 3) / 101))
    assert summary.table.rows[2] == ("owl", 0, None, None, None)
    assert review.truth(BaseDataElement()) is None


@pytest.fixture(scope="module")
def work_dir(config_file, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "run"
    logs = folder / "20260101_100000" / "vis_data"
    logs.mkdir(parents=True)
    row = dict(iter=1, step=1, loss=1.0, lr=0.1, time=0.1, data_time=0.01)
    (logs / "scalars.json").write_text(json.dumps(row) + "\n")
    shutil.copy(config_file, folder / "config.py")
    shutil.copy(trained, folder / "epoch_2.pth")
    return folder


def test_the_report(work_dir):
    text = build.write(work_dir, device="cpu").read_text()
    assert "Not available" not in text and "No predictions" not in text
    assert "epoch_2.pth on all validation images" in text and "probability of the right" in text
    assert text.count("data:image/jpeg") == 8 and "16 training images, 16 labels" in text


def test_load(work_dir, root, tmp_path):
    picture = sorted((root / "val").rglob("*.png"))[0]
    model = mmeformer.load(work_dir, device="cpu")
    found = model(picture)
    assert found.names == [model.classes[int(np.argmax(found.scores))]]
    assert found.to_coco()["annotations"][0]["category_id"] == found.label + 1
    assert found.save(tmp_path / "out.png").is_file()
    # Drawn without PyTorch: white letters.
    drawn = drawing.draw(found.image, found.result, model.classes)
    assert (drawn == 255).any() and not np.array_equal(drawn, found.image)
