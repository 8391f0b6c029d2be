# SPDX-License-Identifier: Apache-2.0
"""No setting is ignored in silence: not below the model, not in a file, not for any task."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny
import torch
from mmcv.transforms import LoadAnnotations, RandomFlip
from mmengine.config import Config

from mmeformer import configs, settings
from mmeformer.checks.dataset import check_flips, check_model
from mmeformer.commands import check_dataset, train
from mmeformer.deploy import models
from mmeformer.inference.predictor import load_predictor
from mmeformer.paths import config_dir
from mmeformer.tasks import TASKS
from mmeformer.training import engine
from mmeformer.training.runner import Runner

pytestmark = pytest.mark.usefixtures("quiet_logging")

SHIPPED = [path for task in TASKS for path in sorted((config_dir() / task).glob("*.py"))]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Task -> a config file of a training of one step."""
    folder = tmp_path_factory.mktemp("settings")
    found = {}
    for task, make in tiny.ALL_TASKS.items():
        config = make(folder, 1)
        config.train_cfg.val_interval = 1
        config.dump(found.setdefault(task, folder / f"{task}.py"))
    return found


# Task, settings, and what the error says beside the first.
WRONG = [
    ("detection", "model.test_cfg.rcnn.scor_thr=0.5", "mean .*rcnn.score_thr"),
    ("detection", "model.test_cfg.score_thr=0.5", "mean model.test_cfg.rcnn.score_thr"),
    ("detection", "model.test_cfg.rcnn.nms.iou_thr=0.5", "mean .*rcnn.nms.iou_threshold"),
    ("detection", "model.test_cfg.rccn.score_thr=0.5", "mean model.test_cfg.rcnn.score_thr"),
    ("detection", "model.train_cfg.rpn.assigner.pos_iou=0.3", "mean .*pos_iou_thr"),
    ("detection", "val_evaluator.metrics=bbox", "mean .*metric"),
    ("detection", "train_cfg.max_iter=3", "mean .*max_iters"),
    ("detection", "val_cfg.val_interval=3", "mean train_cfg.val_interval"),
    ("detection", "val_interval=3", "mean train_cfg.val_interval"),
    ("detection", "param_schedulers=3", "mean .*param_scheduler"),
    ("detection", "optim_wrapper.optimizer.learning_rate=0.1", "AdamW has no .* it has .*lr"),
    ("detection", "optim_wrapper.paramwise_cfg.norm_decay_mul=0", "mean .*norm_decay_mult"),
    ("detection", "optim_wrapper.clip_grad.max_nrom=1", "mean .*max_norm"),
    ("detection", "optim_wrapper.type=AmpOptimWraper", "mean AmpOptimWrapper"),
    ("detection", "auto_scale_lr.enabled=True", "mean auto_scale_lr.enable"),
    ("detection", "env_cfg.cudnn_bench=True", "mean env_cfg.cudnn_benchmark"),
    ("detection", "randomness.sed=3", "mean .*seed"),
    ("detection", "default_hooks.logger.intervall=2", "mean .*interval"),
    ("detection", "train_dataloader.batchsize=3", "mean .*batch_size"),
    ("detection", "train_dataloader.dataset.metainfo.class=a", "mean .*metainfo.classes"),
    ("detection", "train_dataloader.dataset.pipeline.1.with_box=True", "mean .*with_bbox"),
    ("detection", "model.backbone.drop_path=0.1", "mean .*drop_path_rate"),
    ("segmentation", "model.test_cfg.modes=slide", "mean model.test_cfg.mode"),
    ("segmentation", "val_evaluator.iou_metric=mDice", "mean .*iou_metrics"),
    ("segmentation", "train_dataloader.dataset.data_prefix.img=x", "mean .*data_prefix.img_path"),
    ("segmentation", "train_dataloader.dataset.reduce_zero_labels=True", "mean .*zero_label"),
    ("segmentation", "train_dataloader.batch_size=9 train_dataloader.drop_last=True "
     "train_dataloader.sampler.type=DefaultSampler", "all 8 samples"),
    ("rotated", "model.test_cfg.scor_thr=0.5", "mean model.test_cfg.score_thr"),
    ("rotated", "train_dataloader.dataset.patchsize=3", "mean .*patch_size"),
    ("classification", "model.head.num_class=3", "mean .*num_classes"),
    ("classification", "val_evaluator.top_k=1", "mean .*topk"),
    ("classification", "train_dataloader.dataset.with_labels=True", "mean .*with_label"),
]  # fmt: skip


def error_of(command, capfd, config, folder, *options) -> str:
    """The one line that a command ends with."""
    work = ["--out", str(folder)]
    if command is train:
        work = ["--work-dir", str(folder), "--log", "none"]
    assert command.main([str(config), *work, *options]) == 1
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return error


@pytest.mark.parametrize(("task", "options", "message"), WRONG, ids=[row[1] for row in WRONG])
def test_wrong_setting_is_one_line(files, tmp_path, capfd, task, options, message):
    folder = tmp_path / "run"
    error = error_of(train, capfd, files[task], folder, "--cfg-options", *options.split())
    name = options.split()[0].partition("=")[0].removeprefix("train_dataloader.")
    assert name in error and re.search(message, error)
    assert not list(folder.glob("*.pth"))


@pytest.mark.parametrize("command", [train, check_dataset])
@pytest.mark.parametrize("key", ["class", "class_names", "CLASSES", "names", "categories"])
@pytest.mark.parametrize("task", tiny.all_tasks())
def test_classes_of_another_name(files, tmp_path, capfd, task, key, command):
    """mmengine cannot write a config with `class`; others leave COCO's classes, or none."""
    path = tmp_path / "config.py"
    line = f"\ntrain_dataloader['dataset']['metainfo'] = {{{key!r}: ('a', 'b')}}\n"
    path.write_text(files[task].read_text() + line)
    error = error_of(command, capfd, path, tmp_path / "run")
    place = "train_dataloader.dataset.metainfo"
    assert f"{place}.{key}=('a', 'b') changes nothing" in error
    assert error.endswith(f"did you mean {place}.classes?")


ALL_WAYS = ["horizontal", "vertical", "diagonal"]


@pytest.mark.parametrize(
    ("step", "prob", "directions"),
    [
        (dict(prob=[0.5, 0, 0], direction=ALL_WAYS), [0.5, 0.0, 0.0], {"horizontal"}),
        (dict(prob=(0, 0, 0), direction=ALL_WAYS), [0.0, 0.0, 0.0], set()),
        (dict(prob=1), 1.0, {"horizontal"}),
        (dict(prob=[0.5]), [0.5], {"horizontal"}),
        (dict(prob=0), 0.0, set()),
        (dict(prob=0.6, direction=ALL_WAYS), 0.6, set(ALL_WAYS)),
    ],
)
def test_flips_may_be_whole_numbers(step, prob, directions):
    """mmcv takes floats only, and fails without a message."""
    inner = dict(type="mmdet.RandomFlip", **step)
    config = Config(dict(train_dataloader=dict(dataset=dict(dataset=dict(pipeline=[inner])))))
    settings.prepare_flips(config)
    made = config.train_dataloader.dataset.dataset.pipeline[0]
    assert repr(made.prob) == repr(prob)
    assert settings.flip_directions(config.train_dataloader) == directions
    RandomFlip(**{key: value for key, value in made.items() if key != "type"})


@pytest.mark.parametrize("prob", [[0.5, 0.5, 0.5], [0.5], [0.5, -0.1, 0], "often", 2, ["a", 0, 0]])
def test_flips_that_are_no_shares(tmp_path, prob):
    path = tmp_path / "config.py"
    step = dict(type="RandomFlip", prob=prob, direction=ALL_WAYS)
    path.write_text(f"train_dataloader = dict(dataset=dict(pipeline=[{step}]))")
    expected = "train_dataloader.dataset.pipeline.0.prob=.* must be the share of flipped images"
    with pytest.raises(settings.SettingError, match=expected):
        configs.load_config(path)


@pytest.mark.parametrize("key", ["class_names", "classes"])
@pytest.mark.parametrize("task", tiny.all_tasks())
def test_classes_outside_of_metainfo(files, tmp_path, capfd, task, key):
    if (task, key) == ("classification", "classes"):
        pytest.skip("an argument of mmpretrain's data sets")
    path = tmp_path / "config.py"
    change = f"train_dataloader['dataset'].update(metainfo=None, {key}='a')"
    path.write_text(f"{files[task].read_text()}\n{change}\n")
    error = error_of(check_dataset, capfd, path, tmp_path / "run")
    place = "train_dataloader.dataset"
    meant = f"{place}.classes" if task == "classification" else f"{place}.metainfo.classes"
    assert f"{place}.{key}='a'" in error and error.endswith(f"did you mean {meant}?")


@pytest.mark.parametrize(
    ("metainfo", "refused"),
    [
        (dict(class_names=("b",), authors=["c"]), True),
        (dict(classes=("a",), class_names=("b",), authors=["c"]), False),
        (dict(dropped_classes=("plane",)), False),
        (dict(palette=[(1, 2, 3)], task_name="of 2026"), False),
    ],
)
def test_entries_of_users_in_metainfo(metainfo, refused):
    dataset = dict(type="RepeatDataset", dataset=dict(metainfo=metainfo))
    expected = (
        pytest.raises(settings.SettingError, match="class_names") if refused else nullcontext()
    )
    with expected as error:
        settings.require_class_names(dict(train_dataloader=dict(dataset=dataset)))
    assert (error is not None) == refused


# Task, setting, and number of the classes.
FLIPS = ["horizontal", "vertical", "diagonal"]
COUNTS = [
    ("detection", "model.roi_head.mask_head.num_classes", 4),
    ("detection", "model.roi_head.bbox_head.num_classes", 4),
    ("segmentation", "model.decode_head.num_classes", 5),
    ("rotated", "model.bbox_head.num_classes", 4),
    ("classification", "model.head.num_classes", 4),
    ("classification", "model.head.loss.num_classes", 4),
    ("classification", "model.data_preprocessor.num_classes", 4),
]


@pytest.mark.parametrize("command", [train, check_dataset])
@pytest.mark.parametrize(("task", "name", "count"), COUNTS)
def test_other_number_of_classes(files, tmp_path, capfd, task, name, count, command):
    """Before the data are loaded, which here would fail."""
    options = ("--cfg-options", f"{name}=7", "train_dataloader.dataset.data_root=/nowhere")
    error = error_of(command, capfd, files[task], tmp_path / "run", *options)
    assert error.startswith(
        f"error: {name}=7, but train_dataloader.dataset has {count} classes ["
    ) and error.endswith(f"]; set num_classes={count}, or correct metainfo.classes")


@pytest.mark.parametrize("make", [tiny.boxes_only, tiny.with_masks])
def test_other_number_of_classes_of_light_heads(tmp_path, make):
    config = make(tmp_path)
    check_model(config, ["train", "val"])
    config.model.bbox_head.num_classes += 1
    with pytest.raises(ValueError, match=r"^model.bbox_head.num_classes=\d, but train_dataloader"):
        check_model(config, ["train", "val"])


def test_which_numbers_of_classes_are_compared(files):
    config = Config.fromfile(files["segmentation"])
    dataset = config.val_dataloader.dataset
    config.val_dataloader.dataset = dict(type="ConcatDataset", datasets=[dataset, dict(dataset)])
    config.val_dataloader.dataset.datasets[1].metainfo = dict(classes=("sky", "sea"))
    check_model(config, ["train"])
    with pytest.raises(ValueError, match=r"but val_dataloader.dataset.datasets.1 has 2 classes"):
        check_model(config, ["train", "val"])
    # Who has removed the hook wants no error.
    config.custom_hooks = []
    assert "has 2 classes" in check_model(config, ["train", "val"])


@pytest.mark.parametrize(
    ("classes", "flip", "mirrors"),
    [
        (("Hand-Left", "hand-right"), dict(prob=0.5), True),
        (("left", "right"), dict(prob=[0.0, 0.1, 0.0], direction=FLIPS), True),
        (("right", "left"), dict(prob=[0.0, 0.0, 0.5], direction=FLIPS), False),
        (("right", "left"), dict(prob=0.5, direction="diagonal"), False),
        (("right", "left"), dict(prob=0.0), False),
        (("left", "bright"), dict(prob=0.5), False),
    ],
)
def test_classes_that_flips_mix_up(files, tmp_path, capfd, classes, flip, mirrors):
    config = Config.fromfile(files["detection"])
    dataset = config.train_dataloader.dataset
    nested = dict(type="RandomApply", transforms=[dict(type="mmdet.RandomFlip", **flip)])
    dataset.update(metainfo=dict(classes=classes), pipeline=[*dataset.pipeline[:2], nested])
    config.train_dataloader.dataset = dict(type="RepeatDataset", times=2, dataset=dataset)
    found = check_flips(config, "train")
    assert len(found) == mirrors and not check_flips(config, "val")
    if mirrors:
        assert str(found[0]) == (
            f"warning: train_dataloader: a mirrored {classes[0]} looks like a {classes[1]}, but "
            "RandomFlip mirrors images: leave it out, or let its direction be diagonal"
        )


def test_training_says_that_flips_mix_up_classes(tmp_path):
    config = tiny.segmentation(tmp_path)
    config.work_dir = str(tmp_path / "run")
    others = range(config.model.decode_head.num_classes - 2)
    names = ("turn_left", "turn_right", *map(str, others))
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.metainfo = dict(classes=names)
    engine.build_train_runner(config)
    (log,) = tmp_path.glob("run/*/*.log")
    assert "train_dataloader: a mirrored turn_left looks like a turn_right" in log.read_text()


def parts(config):
    return [name for name in config if name in configs.known_settings() - {"report"}]


@pytest.fixture(scope="module")
def imported(files):
    """The classes of all tasks."""
    for path in files.values():
        Runner.from_cfg(Config(dict(Config.fromfile(path), work_dir=str(path.parent / "run"))))


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_configs_have_no_unread_settings(path):
    config = configs.load_config(path)
    assert settings.check(config, parts(config)) == []


@pytest.mark.usefixtures("imported")
def test_settings_in_files(files, tmp_path):
    """Those of a config file are looked at too; what is left over is no error."""
    config = Config.fromfile(files["detection"])
    config.model.test_cfg.rcnn.pop("score_thr")
    config.model.test_cfg.rcnn.scor_thr = 0.5
    message = r"rcnn\.scor_thr=0.5 .* mean model.test_cfg.rcnn.score_thr"
    with pytest.raises(settings.SettingError, match=message):
        models.build_model(config)
    weights = models.build_model(Config.fromfile(files["detection"])).state_dict()
    torch.save(dict(meta={}, state_dict=weights), tmp_path / "weights.pth")
    with pytest.raises(settings.SettingError, match=message):
        load_predictor(config, str(tmp_path / "weights.pth"))
    config = Config.fromfile(files["detection"])
    config.model.test_cfg.rcnn.debug_level = 3
    (left,) = settings.check(config, parts(config))
    assert left.startswith("model.test_cfg.rcnn.debug_level=3 changes nothing")


@pytest.mark.usefixtures("imported")
def test_other_libraries_and_own_names_are_let_alone(files):
    config = Config.fromfile(files["detection"])
    config.visualizer.vis_backends = [
        dict(type="WandbVisBackend", init_kwargs=dict(entity_of_team=1))
    ]
    config.optim_wrapper.paramwise_cfg = dict(custom_keys=dict(my_layer=dict(lr_mult=0.1)))
    config.train_dataloader.dataset.metainfo.my_note = "of 2026"
    config.default_hooks.my_hook = dict(type="EMAHook")
    config.train_dataloader.dataset.pipeline.append(dict(type="OfAlbu", shift_limit_of_albu=1))
    config.model.backbone.arch = dict(chan_mul=1, attn_drop_of=2, res_blocks_of=3)
    assert settings.check(config, parts(config)) == []
    config.optim_wrapper.paramwise_cfg.custom_keys.my_layer = dict(lr_mul=0.1)
    with pytest.raises(settings.SettingError, match=r"my_layer\.lr_mul=0.1 .* mean .*lr_mult"):
        settings.check(config, parts(config))


@pytest.mark.usefixtures("imported")
def test_classes_without_source_are_let_alone(files):
    """Such as those of a notebook: what they read is not known."""
    config = Config.fromfile(files["segmentation"])
    config.model.test_cfg.modee = 1
    with pytest.raises(settings.SettingError):
        settings.check(config, ["model"])
    config.model.auxiliary = dict(type=type("OfANotebook", (), dict(__module__="__notebook__")))
    assert settings.check(config, ["model"]) == []


def child(tmp_path, text) -> Path:
    path = tmp_path / "child.py"
    base = config_dir() / tiny.QUICKSTARTS["segmentation"]
    path.write_text(f"_base_ = [{str(base)!r}]\n{text}")
    return path


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("param_schedulers = []", "param_scheduler"),
        ("custom_hook = []", "custom_hooks"),
        ("load_form = 'a.pth'", "load_from"),
    ],
)
def test_misspelled_name_in_a_file(tmp_path, text, near):
    with pytest.raises(ValueError, match=f"changes nothing; did you mean {near}"):
        configs.load_config(child(tmp_path, text))


def test_unused_variable_of_a_file(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(configs, "print_log", lambda text, *args: said.append(text))
    configs.load_config(child(tmp_path, "max_epochs = 3\nsize = 64\ncrop_size = (size, size)\n"))
    first, second = said
    assert "max_epochs changes nothing" in first and "crop_size changes nothing" in second
    # Without a base it may be for other programs, as in the file that a training writes.
    path = tmp_path / "whole.py"
    path.write_text("max_epochs = 3\n")
    configs.load_config(path)
    assert len(said) == 2


def test_second_hook_for_checkpoints(files, tmp_path):
    config = Config.fromfile(files["segmentation"])
    config.work_dir = str(tmp_path)
    config.default_hooks.checkpoints = dict(type="CheckpointHook", interval=2)
    with pytest.raises(settings.SettingError, match="checkpoints .* mean default_hooks.checkpoint"):
        Runner.from_cfg(config)


def test_endless_data_fill_any_batch(files, tmp_path):
    """The sampler of trainings by iteration goes on with the same images."""
    config = Config.fromfile(files["segmentation"])
    config.train_dataloader.update(batch_size=9, drop_last=True)
    assert len(tiny.train(config, tmp_path)) == 1


def test_errors_about_something_else():
    config = Config(dict(model=dict(type="MaskRCNN", scale=3)))
    for error in (
        TypeError("forward() got an unexpected keyword argument 'scale'"),
        TypeError("f() takes 1 positional argument"),
        KeyError("scale"),
        KeyError(),
        ValueError("Nope is not in the mmdet::model registry"),
    ):
        assert settings.explain(error, config) is None


def test_name_of_a_type():
    assert (
        settings.type_name(dict(type="mmdet.LoadAnnotations", with_mask=True)) == "LoadAnnotations"
    )
    assert settings.type_name(dict(type=RandomFlip)) == "RandomFlip"
    assert settings.type_name({}) == ""


def test_steps_of_annotations_are_found_by_name_and_by_class():
    image, packing = dict(type="LoadImageFromFile"), dict(type="mmdet.PackDetInputs")
    labels = [
        dict(type="mmdet.LoadAnnotations"),
        dict(type=LoadAnnotations),
        dict(type="ConvertBoxType", box_type_mapping=dict(gt_bboxes="rbox")),
    ]
    assert settings.without_annotations([image, *labels, packing]) == [image, packing]
