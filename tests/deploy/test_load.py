# SPDX-License-Identifier: Apache-2.0
"""``from mmeformer import load``: work directories, checkpoints and exported files."""

import copy
import pickle
import shutil
import sys
import time
import types
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from PIL import Image
from safetensors.torch import save_file

import mmeformer
from mmeformer import runtime
from mmeformer.deploy import models as deploy_models
from mmeformer.deploy.metadata import export_metadata
from mmeformer.errors import UserError
from mmeformer.inference import load_predictor, videos
from mmeformer.model import supervision_fields
from mmeformer.results import (
    Classification,
    Detections,
    Mask,
    Pyramid,
    RotatedDetections,
    Segmentation,
)
from mmeformer.runtime import drawing
from mmeformer.runtime.metadata import Metadata

pytestmark = pytest.mark.usefixtures("quiet_logging")

NUMBERS = {
    "detection": ("boxes", "scores", "labels"),
    "segmentation": ("labels",),
    "rotated": ("boxes", "scores", "labels"),
}


@pytest.fixture(scope="module")
def work_dir(trained, tmp_path_factory):
    """``work_dir(task)``: of a training with a best and a last checkpoint."""

    def make(task):
        model = trained(task)
        folder = tmp_path_factory.mktemp("run")
        model.config.dump(folder / "config.py")
        shutil.copy(model.checkpoint, folder / "best_score_iter_2.pth")
        (folder / "iter_4.pth").write_text("the last one, which is not read")
        return folder

    return make


@pytest.fixture(scope="module")
def models(work_dir):
    """``models(task)``: a loaded work directory; made once."""
    made = {}

    def make(task):
        if task not in made:
            made[task] = mmeformer.load(work_dir(task), device="cpu", **options(task))
        return made[task]

    return make


def equal(one, other, task):
    assert type(one.result) is type(other)
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in NUMBERS[task])


EACH = ["detection", "segmentation", pytest.param("rotated", marks=pytest.mark.slow)]


@pytest.mark.parametrize("task", EACH)
def test_every_kind_of_input(task, models, trained, picture, tmp_path):
    model = models(task)
    assert model.path.name == "best_score_iter_2.pth" and model.path.name in repr(model)
    known = trained(task)
    predictor = load_predictor(known.config, known.checkpoint, device="cpu", **options(task))
    image = cv2.imread(str(picture))
    (expected,) = predictor.predict_images([image])
    assert expected.labels.size and model.classes == predictor.classes
    inputs = [str(picture), picture, image, picture.read_bytes(), Image.open(picture)]
    for one in inputs:
        assert equal(model(one), expected, task)
    assert equal(model.predict(picture), expected, task)
    many = model(inputs, batch_size=2)
    assert isinstance(many, list) and len(many) == 5
    # The values of a batch differ by rounding.
    assert [found.path for found in many] == [picture, picture, None, None, None]
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(picture, folder / "a.png")
    writer = cv2.VideoWriter(
        str(folder / "b.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, image.shape[1::-1]
    )
    for _ in range(2):
        writer.write(image)
    writer.release()
    found = model(folder)
    assert not isinstance(found, list)
    assert [(one.path.name, one.frame) for one in found] == [
        ("a.png", None),
        ("b.avi", 0),
        ("b.avi", 1),
    ]
    assert [one.frame for one in model(folder / "b.avi", batch_size=4)] == [0, 1]
    assert [equal(one, expected, task) for one in model(str(folder / "*.png"))] == [True]


def test_the_batch_size_holds_for_windows_too(models, monkeypatch):
    model = models("segmentation")
    predictor = model.backend.predictor
    sizes = []
    predict = predictor.predict
    monkeypatch.setattr(
        predictor, "predict", lambda items: (sizes.append(len(items)), predict(items))[1]
    )
    side = predictor.native_size
    # More than 8 sides long, so it is cut: steps of 3/4 of a side, the last one moved back.
    image = np.zeros((side, 9 * side, 3), np.uint8)
    (found,) = model([image], batch_size=5)
    assert found.labels.shape == image.shape[:2]
    # 12 windows; before them the list of whole images, which is empty.
    assert sizes == [0, 5, 5, 2]


def options(task):
    return {} if task == "segmentation" else dict(score_thr=0.05)


@pytest.mark.parametrize("task", EACH)
def test_a_prediction(task, models, picture, tmp_path):
    found = models(task)(picture)
    drawn = found.plot()
    assert drawn.dtype == np.uint8 and drawn.shape[2] == 3 and drawn.shape[0] >= 50
    assert found.save(tmp_path / "out.png") == tmp_path / "out.png"
    written = cv2.imread(str(tmp_path / "out.png"))
    # Masks have another shade each time.
    assert written.shape == drawn.shape and (written == drawn).mean() > 0.5
    assert not np.array_equal(drawn, cv2.resize(found.image, drawn.shape[1::-1]))
    with pytest.raises(AttributeError, match="nonsense"):
        found.nonsense  # noqa: B018
    if task == "segmentation":
        with pytest.raises(ValueError, match="has no objects"):
            found.to_coco()
        return
    coco = found.to_coco()
    assert coco["images"] == [dict(id=1, file_name="shapes.png", height=50, width=90)]
    assert len(coco["annotations"]) == len(found) == len(found.names) > 0
    names = {entry["id"]: entry["name"] for entry in coco["categories"]}
    assert [names[entry["category_id"]] for entry in coco["annotations"]] == found.names
    assert all(entry["image_id"] == 1 and entry["score"] > 0.05 for entry in coco["annotations"])


@pytest.mark.parametrize("task", EACH)
def test_pictures_of_several_threads(task, models, picture, monkeypatch):
    """Each is drawn alone: a visualizer draws all into one figure."""
    model, drawing, most = models(task), [], []
    draw = model.backend.predictor.draw

    def watched(image, result):
        drawing.append(image)
        most.append(len(drawing))
        time.sleep(0.02)
        drawn = draw(image, result)
        drawing.pop()
        return drawn

    monkeypatch.setattr(model.backend.predictor, "draw", watched)
    found = [model(picture), model(picture.read_bytes())] * 2
    with ThreadPoolExecutor(4) as pool:
        shapes = {drawn.shape for drawn in pool.map(lambda one: one.plot(), found)}
    assert len(shapes) == 1 and most == [1] * 4


def test_copies_and_other_processes(fake_file, models, picture):
    """A pickled model is its files; a pickled result has its numbers, and is drawn with them."""
    for model in models("detection"), mmeformer.load(fake_file(), classes=["dog"]):
        found = model(picture)
        assert copy.deepcopy(found)._backend is model.backend is copy.deepcopy(model).backend
        data = pickle.dumps((model, found))
        assert len(data) < 100_000
        again, result = pickle.loads(data)
        assert equal(result, found.result, "detection") and result.names == found.names
        assert equal(again(picture), found.result, "detection") and again.path == model.path
        assert result.plot().shape == found.plot().shape
        assert pickle.loads(pickle.dumps(again)).backend.category_ids == model.backend.category_ids


def test_a_notebook_shows_the_picture(models, picture):
    found = models("segmentation")(picture)
    shown = cv2.imdecode(np.frombuffer(found._repr_jpeg_(), np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(shown - found.plot().astype(float)).mean() < 5
    backbone = mmeformer.model.Prediction(Pyramid(()), IMAGE, (), models("segmentation").backend)
    assert backbone._repr_jpeg_() is None


def test_an_iterator_is_predicted_as_it_is_read(fake_file):
    model = mmeformer.load(fake_file())
    read = []
    images = (read.append(index) or IMAGE for index in range(5))
    found = model(images, batch_size=2)
    assert not read and len(next(found)) == 2 and read == [0, 1]
    assert len(list(found)) == 4 and read == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "task",
    [
        pytest.param("detection", marks=pytest.mark.slow),
        "segmentation",
        pytest.param("rotated", marks=pytest.mark.slow),
    ],
)
def test_an_exported_file(task, onnx_file, picture, tmp_path):
    path = onnx_file(task, size=None, preprocessing=task == "detection")
    model = mmeformer.load(path)
    expected = mmeformer.runtime.load(path).predict(picture)
    if task != "segmentation":
        expected = expected.take(expected.scores > 0.3)
    found = model(picture)
    assert equal(found, expected, task) and model.classes and model.path == path
    assert found.plot().shape == (50, 90, 3)
    assert not np.array_equal(found.plot(), found.image) or not expected.labels.any()
    found.save(tmp_path / "out.jpg")
    assert (tmp_path / "out.jpg").stat().st_size
    if task != "segmentation":
        assert len(found.to_coco()["annotations"]) == len(expected)
        name = model.classes[0]
        assert set(mmeformer.load(path, classes=[name])(picture).names) <= {name}
        with pytest.raises(ValueError, match="below the threshold"):
            mmeformer.load(path, score_thr=0.0)
    with pytest.raises(ValueError, match="needs no config"):
        mmeformer.load(path, config="config.py")


def test_a_classifier(work_dir, onnx_file, picture, tmp_path, monkeypatch):
    """Its work directory, its checkpoint with a config, and its exported file."""
    folder = work_dir("classification")
    config, checkpoint = folder / "config.py", next(folder.glob("best*"))
    file = onnx_file("classification", size=None, preprocessing=False)
    shutil.copy(checkpoint, tmp_path / "mine.pth")
    # As in a new process: nothing has set mmengine's default scope yet.
    monkeypatch.setattr(DefaultScope, "_instance_dict", OrderedDict())
    models = [
        mmeformer.load(folder, device="cpu"),
        mmeformer.load(tmp_path / "mine.pth", config=config, device="cpu"),
        mmeformer.load(file),
    ]
    expected = models[0](picture)
    for model in models:
        found = model(picture)
        np.testing.assert_allclose(found.scores, expected.scores, atol=2e-2)
        assert found.scores.sum() == pytest.approx(1, abs=1e-5)
        assert found.names == [model.classes[found.label]]
        drawn = found.plot()
        assert not np.array_equal(drawn, cv2.resize(found.image, drawn.shape[1::-1]))
        assert found.save(tmp_path / "out.png").stat().st_size
        coco = found.to_coco()
        assert [a["category_id"] - 1 for a in coco["annotations"]] == found.best(5)
        assert [a["score"] for a in coco["annotations"]] == sorted(found.scores, reverse=True)[:5]
    for place in (folder, file):
        with pytest.raises(ValueError, match="for detection"):
            mmeformer.load(place, score_thr=0.5)


class FakeFile:
    """Stands for a loaded exported file: finds one object of each class, with equal scores."""

    def __init__(self, metadata):
        self.metadata = metadata

    def predict_batch(self, images):
        count = len(self.metadata.classes)
        boxes = np.tile(np.array([[1, 1, 5, 5]], np.float32), (count, 1))
        scores = np.full(count, 0.5, np.float32)
        found = Detections(boxes, scores, np.arange(count), (10, 12), None)
        return [found.take(scores > self.metadata.score_threshold) for _ in images]


@pytest.fixture
def fake_file(tmp_path, monkeypatch):
    """``fake_file(**settings)``: path of a file of a detector, as :func:`runtime.load` reads it."""

    def make(**settings):
        zeros = (0.0,) * 3
        values = dict(classes=("cat", "dog"), score_threshold=0.05, **settings)
        metadata = Metadata("detection", "0", "config", zeros, zeros, True, **values)
        monkeypatch.setattr(runtime, "load", lambda path: FakeFile(metadata))
        (tmp_path / "model.onnx").touch()
        return tmp_path / "model.onnx"

    return make


IMAGE = np.zeros((10, 12, 3), np.uint8)


@pytest.mark.parametrize(("recorded", "ids"), [((7, 90), [7, 90]), ((), [1, 2])])
def test_category_ids_of_an_exported_file(fake_file, recorded, ids):
    coco = mmeformer.load(fake_file(category_ids=recorded))(IMAGE).to_coco()
    assert [(entry["id"], entry["name"]) for entry in coco["categories"]] == [
        (ids[0], "cat"),
        (ids[1], "dog"),
    ]
    assert [entry["category_id"] for entry in coco["annotations"]] == ids


WRONG = [
    (dict(score_thr=1.5), "score threshold 1.5 must be at least 0 and less than 1"),
    (dict(score_thr=float("nan")), "score threshold nan must be at least 0"),
    (dict(classes="cat"), r"classes is 'cat', but must be a list of names: \['cat'\]"),
    (dict(classes=[]), "classes is empty"),
    (dict(classes=["cow"]), r"the model has no class \['cow'\], only \['"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(case[0]) for case in WRONG])
def test_choices_that_report_nothing_are_refused(options, message, fake_file, work_dir):
    for path in (fake_file(), work_dir("detection")):
        with pytest.raises(ValueError, match=message):
            mmeformer.load(path, **options)


def test_a_choice_of_classes_and_scores(fake_file):
    assert mmeformer.load(fake_file(), classes=["dog"])(IMAGE).names == ["dog"]
    assert mmeformer.load(fake_file(), classes=("dog", "cat"))(IMAGE).names == ["cat", "dog"]
    # Every object of this file has a score of 0.5.
    assert len(mmeformer.load(fake_file(), score_thr=0.49)(IMAGE)) == 2
    assert len(mmeformer.load(fake_file(), score_thr=0.5)(IMAGE)) == 0


@pytest.mark.parametrize("task", ["detection", "rotated", "classification"])
def test_an_export_records_the_category_ids_of_the_checkpoint(task, trained):
    known = trained(task)
    model = deploy_models.build_model(known.config, str(known.checkpoint))
    classes = model.dataset_meta["classes"]
    ids = tuple(range(3, 3 + 7 * len(classes), 7))
    model.dataset_meta = {**model.dataset_meta, "category_ids": list(ids)}
    metadata = export_metadata(known.config, model, task)
    assert metadata.category_ids == ids and len(ids) > 1
    assert Metadata.from_json(metadata.to_json(), "model.onnx") == metadata
    del model.dataset_meta["category_ids"]
    counted = export_metadata(known.config, model, task).category_ids
    assert counted == tuple(range(1, len(classes) + 1))


def test_category_ids_that_are_not_those_of_the_classes(fake_file):
    with pytest.raises(ValueError, match="category_ids has 3 numbers for 2 classes"):
        fake_file(category_ids=(1, 2, 3))


def test_what_cannot_be_loaded(work_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        mmeformer.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a URL"):
        mmeformer.load("https://example.org/model.pth")
    with pytest.raises(UserError, match=f"{TAKES}") as error:
        mmeformer.load(tmp_path)
    assert f"{tmp_path} has no config (*.py) and no checkpoint (*.pth)" in str(error.value)
    shutil.copy(next(work_dir("segmentation").glob("best*")), tmp_path / "mine.pth")
    with pytest.raises(
        UserError, match=r"mine.pth has no config .* beside it; .*\"mine.pth\", conf"
    ):
        mmeformer.load(tmp_path / "mine.pth")
    with pytest.raises(UserError, match="has no config .*, so it is not the work directory"):
        mmeformer.load(tmp_path)
    (tmp_path / "mine.pth").rename(tmp_path / "config.py")
    with pytest.raises(UserError, match="has no checkpoint"):
        mmeformer.load(tmp_path)


TAKES = (
    r"; load takes the work directory of a training, a checkpoint \(.pth\) with its config, or an "
    "exported .onnx, .tflite or .pte file"
)
EXPORT = "; export the model with `mmeformer export --to onnx`, and load that file"


@pytest.mark.parametrize("config", [False, True])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.json", f"is no model{TAKES}"),
        ("photo.jpg", f"is no model{TAKES}"),
        ("last_checkpoint", f"is no model{TAKES}"),
        ("exported.json", "describes exported.tflite; load that file"),
        ("phone.mlpackage", f"is a Core ML package, .*{EXPORT}"),
        ("model.xml", f"is of OpenVINO, which runs the .onnx file itself .*{EXPORT}"),
        ("exported.bin", f"is of OpenVINO, which runs the .onnx file itself .*{EXPORT}"),
        ("model.engine", f"is of TensorRT, .*{EXPORT}"),
        (
            "config.py",
            r"is a config without weights; .* load\(\"epoch_12.pth\", config=\"config.py\"\)",
        ),
    ],
)
def test_what_is_no_model(name, message, config, tmp_path):
    """In one line, also where a config is beside it."""
    path = tmp_path / name
    for each in ("exported.tflite", "exported.xml", *(["other.py"] if config else [])):
        (tmp_path / each).touch()
    if name.endswith(".mlpackage"):
        path.mkdir()
    else:
        path.write_text("some text")
    with pytest.raises(UserError, match=f"^{path} {message}$"):
        mmeformer.load(path)


@pytest.mark.parametrize(
    ("name", "library"),
    [("model.tflite", "ai_edge_litert.interpreter"), ("model.pte", "executorch.runtime")],
)
def test_files_of_other_runtimes_name_their_package(name, library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"{name} needs \w+, which is not installed: pip install"):
        mmeformer.load(tmp_path / name)


@pytest.mark.parametrize("suffix", [".onnx", ".ONNX", ".tflite", ".pte"])
def test_exported_files_of_every_runtime(suffix, fake_file):
    path = fake_file()
    assert mmeformer.load(path.rename(path.with_suffix(suffix)))(IMAGE).names == ["cat", "dog"]


def test_a_checkpoint_of_any_name(work_dir, picture, tmp_path):
    """Also as safetensors, which has no names of classes."""
    folder = work_dir("segmentation")
    checkpoint = next(folder.glob("best*"))
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    save_file({k: v.contiguous().clone() for k, v in state.items()}, tmp_path / "a.safetensors")
    shutil.copy(checkpoint, tmp_path / "mine")
    expected = mmeformer.load(folder, device="cpu")(picture)
    for name in ("a.safetensors", "mine"):
        model = mmeformer.load(tmp_path / name, config=folder / "config.py", device="cpu")
        assert np.array_equal(model(picture).labels, expected.labels)


class TestDamagedFiles:
    """As `mmeformer predict`: a folder goes on without them, one file is an error."""

    @pytest.fixture
    def folder(self, tmp_path):
        """Two good images and three files that cannot be read."""
        folder = tmp_path / "images"
        folder.mkdir()
        for name in ("b.png", "d.png"):
            cv2.imwrite(str(folder / name), IMAGE)
        content = (folder / "b.png").read_bytes()
        (folder / "a.png").write_bytes(content[:-20])
        (folder / "c.jpg").touch()
        (folder / "e.mp4").write_bytes(b"nonsense")
        return folder

    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    @pytest.mark.parametrize("pattern", ["", "*"])
    def test_a_folder_goes_on(self, folder, fake_file, batch_size, pattern):
        model = mmeformer.load(fake_file())
        with pytest.warns(UserWarning) as told:
            found = list(model(folder / pattern, batch_size=batch_size))
        assert [(one.path, one.names) for one in found] == [
            (folder / name, ["cat", "dog"]) for name in ("b.png", "d.png")
        ]
        texts = [str(one.message) for one in told]
        assert [text.split()[:2] for text in texts] == [
            ["skipped:", str(folder / name)] for name in ("a.png", "c.jpg", "e.mp4")
        ]
        assert not any("\n" in text for text in texts)
        # Python shows the line that asked for the image.
        assert {one.filename for one in told} == {__file__}

    def test_a_video_that_ends_early_keeps_its_frames(self, tmp_path, fake_file, monkeypatch):
        path = tmp_path / "clips" / "a.avi"
        path.parent.mkdir()
        path.touch()

        def frames(self):
            yield IMAGE
            raise ValueError(f"{self.path} is truncated")

        monkeypatch.setattr(videos, "Video", type("Video", (), dict(__iter__=frames, path=path)))
        monkeypatch.setattr(videos.Video, "__init__", lambda self, path: None)
        model = mmeformer.load(fake_file())
        with pytest.warns(UserWarning, match="skipped: .*a.avi is truncated"):
            assert [one.frame for one in model(path.parent)] == [0]
        with pytest.raises(ValueError, match="a.avi is truncated"):
            list(model(path))

    def test_nothing_can_be_read(self, folder, fake_file):
        for name in ("b.png", "d.png"):
            (folder / name).unlink()
        model = mmeformer.load(fake_file())
        message = (
            f"{folder} has 3 files, and none can be read: {folder}/e.mp4 cannot be read as a v"
        )
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=message):
            list(model(folder))

    def test_a_file_and_a_list_are_errors(self, folder, fake_file):
        model = mmeformer.load(fake_file())
        for path in (folder / "a.png", folder / "c.jpg", folder / "e.mp4"):
            with pytest.raises(ValueError, match=str(path)):
                list(model(path))
        with pytest.raises(ValueError, match="a.png"):
            model([IMAGE, folder / "a.png"])
        with pytest.raises(ValueError, match="an image array must be"):
            model([IMAGE, IMAGE[..., 0].astype(float)])


def test_what_cannot_be_predicted(models, tmp_path):
    model = models("segmentation")
    with pytest.raises(ValueError, match="is a URL"):
        model("https://example.org/image.jpg")
    with pytest.raises(FileNotFoundError):
        model(tmp_path / "nothing.jpg")
    with pytest.raises(FileNotFoundError):
        model(tmp_path / "nothing.mp4")
    with pytest.raises(ValueError, match="batch_size 0"):
        model([], batch_size=0)
    assert model([]) == []


def test_names_and_number_of_objects():
    classes = ("cat", "dog", "owl")
    expected = [
        (RESULTS[0], ["dog"]),
        (RESULTS[1], ["dog"]),
        (Segmentation(np.array([[2, 2], [0, 2]], np.uint8)), ["cat", "owl"]),
        (Classification(np.array([0.2, 0.7, 0.1], np.float32)), ["dog"]),
    ]
    for result, names in expected:
        found = mmeformer.model.Prediction(result, IMAGE, classes, None)
        assert found.names == names and len(found) == len(names)
    pyramid = mmeformer.model.Prediction(Pyramid(()), IMAGE, (), None)
    with pytest.raises(TypeError, match="a backbone has no objects"):
        len(pyramid)


# --- supervision ---------------------------------------------------------------------------------

SQUARE = Mask.from_array(np.ones((2, 3), bool), 4, 1)
RESULTS = [
    Detections(
        np.array([[4, 1, 7, 3]], np.float32),
        np.array([0.5], np.float32),
        np.array([1]),
        (10, 12),
        (SQUARE,),
    ),
    RotatedDetections(
        np.array([[6, 5, 4, 2, np.pi / 2]], np.float32), np.array([0.5], np.float32), np.array([1])
    ),
    Segmentation(np.array([[0, 0], [1, 1]], np.uint8)),
]


def test_fields_for_supervision():
    boxes, turned, pixels = map(supervision_fields, RESULTS)
    assert boxes["xyxy"].tolist() == [[4, 1, 7, 3]] and boxes["mask"].shape == (1, 10, 12)
    assert boxes["mask"][0, 1:3, 4:7].all() and boxes["mask"].sum() == 6
    # A box of 4 x 2 that stands on its short side.
    assert turned["xyxy"] == pytest.approx(np.array([[5, 3, 7, 7]]), abs=1e-4)
    assert turned["data"]["xyxyxyxy"].shape == (1, 4, 2)
    assert pixels["xyxy"].tolist() == [[0, 0, 2, 1], [0, 1, 2, 2]]
    assert pixels["mask"].sum() == 4 and pixels["class_id"].tolist() == [0, 1]
    with pytest.raises(TypeError, match="Pyramid"):
        supervision_fields(Pyramid(()))


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_to_supervision(result):
    supervision = pytest.importorskip("supervision")
    image = np.zeros((10, 12, 3), np.uint8)
    found = mmeformer.model.Prediction(result, image, ("cat", "dog"), None).to_supervision()
    assert isinstance(found, supervision.Detections)
    assert list(found.data["class_name"])[-1] == "dog" and len(found) == len(found.class_id)


def test_supervision_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    image = np.zeros((10, 12, 3), np.uint8)
    with pytest.raises(UserError, match="pip install supervision"):
        mmeformer.model.Prediction(RESULTS[0], image, ("cat", "dog"), None).to_supervision()


def test_supervision_gets_names(monkeypatch):
    seen = types.SimpleNamespace(Detections=lambda **fields: fields)
    monkeypatch.setitem(sys.modules, "supervision", seen)
    image = np.zeros((10, 12, 3), np.uint8)
    found = mmeformer.model.Prediction(RESULTS[1], image, ("cat", "dog"), None).to_supervision()
    assert found["data"]["class_name"].tolist() == ["dog"] and "xyxyxyxy" in found["data"]


# --- drawing without PyTorch ---------------------------------------------------------------------


def test_drawing_with_opencv():
    image = np.full((200, 200, 3), 128, np.uint8)
    palette = ((255, 0, 0), (0, 0, 255))
    red, blue = np.array([0, 0, 255]), np.array([255, 0, 0])
    box = np.array([[20, 40, 120, 160]], np.float32)
    mask = Mask.from_array(np.ones((120, 100), bool), 20, 40)
    one = np.ones(1, np.float32)
    found = Detections(box, one, np.array([1]), (200, 200), (mask,))
    drawn = drawing.draw(image, found, ("cat", "dog"), palette)
    # Lines are smoothed.
    assert abs(drawn[40, 110] - blue).max() < 20 and (image == 128).all()
    # The mask is half transparent.
    assert drawn[100, 70].tolist() == [192, 64, 64] and drawn[180, 150].tolist() == [128] * 3
    turned = RotatedDetections(np.array([[100, 100, 80, 40, 0]], np.float32), one, np.array([0]))
    drawn = drawing.draw(image, turned, ("cat", "dog"), palette)
    assert abs(drawn[110, 60] - red).max() < 20 and drawn[110, 100].tolist() == [128] * 3
    labels = np.zeros((200, 200), np.uint8)
    labels[:, 100:] = 1
    drawn = drawing.draw(image, Segmentation(labels), ("cat", "dog"), palette)
    assert drawn[0, 0].tolist() == [64, 64, 192] and drawn[0, 199].tolist() == [192, 64, 64]
    # Without a palette classes have different colors.
    drawn = drawing.draw(image, Segmentation(labels), ("cat", "dog"))
    assert drawn[0, 0].tolist() != drawn[0, 199].tolist()
    with pytest.raises(TypeError, match="Pyramid"):
        drawing.draw(image, Pyramid(()), ())
