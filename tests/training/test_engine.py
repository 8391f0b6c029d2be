# SPDX-License-Identifier: Apache-2.0
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from mmengine.config import Config, ConfigDict

from mmeformer import configs
from mmeformer.commands.test import main as evaluate_main
from mmeformer.commands.train import main as train_main
from mmeformer.paths import config_dir, tools_dir
from mmeformer.synthetic.shapes import write_coco_dataset
from mmeformer.training import device, engine
from mmeformer.work_dirs import find_config

V2_S0 = "detection/mask-rcnn_efficientformerv2-s0_fpn"


class TestConfigs:
    def test_shipped_config_by_its_short_name(self):
        name = f"{V2_S0}_1x_coco.py"
        short, long = configs.load_config(name), configs.load_config(config_dir() / name)
        assert short.model == long.model
        assert configs.load_config(f"configs/{name}").model == long.model

    def test_options_are_laid_over(self):
        config = configs.load_config(f"{V2_S0}_1x_coco.py", {"train_dataloader.batch_size": 7})
        assert config.train_dataloader.batch_size == 7

    @pytest.mark.parametrize(
        "option, message",
        [
            ("epochs", "epochs is a variable of .*_custom.py.*such as train_cfg.max_epochs"),
            ("train_pipeline", "train_pipeline is a variable of"),
            ("trian_cfg.max_epochs", "no setting trian_cfg; did you mean train_cfg.max_epochs"),
            ("nonsense", "configs have no setting nonsense$"),
        ],
    )
    def test_options_that_change_nothing_are_refused(self, option, message):
        with pytest.raises(ValueError, match=f"{option} would change nothing: .*{message}"):
            configs.load_config(f"{V2_S0}_custom.py", {option: 1})

    def test_settings_of_the_report_are_no_variables(self):
        config = configs.load_config(f"{V2_S0}_custom.py", {"report.images": 5})
        assert config.report.images == 5

    def test_missing_config_names_near_ones(self):
        with pytest.raises(FileNotFoundError, match="mean .*v2-s0_fpn_1x_coco.py"):
            configs.load_config("configs/detection/mask-rcnn_efficientformerv2-s0_1x_coco.py")

    def test_work_dir(self):
        config = Config(dict(work_dir="mine"))
        configs.choose_work_dir(config, "a/b.py", None)
        assert config.work_dir == "mine"
        configs.choose_work_dir(config, "a/b.py", "yours")
        assert config.work_dir == "yours"
        config = Config(dict())
        configs.choose_work_dir(config, "a/b.py", None)
        assert config.work_dir == str(Path("work_dirs/b"))

    def test_drop_pretrained(self):
        model = ConfigDict(
            backbone=dict(init_cfg=dict(type="Pretrained", checkpoint="x")),
            heads=[dict(init_cfg=dict(type="Normal")), dict(layers=1)],
        )
        configs.drop_pretrained(model)
        assert model == dict(backbone=dict(), heads=[dict(), dict(layers=1)])

    def test_auto_scale_lr_needs_a_base(self, tmp_path):
        config = Config(dict(work_dir=str(tmp_path)))
        with pytest.raises(ValueError, match="base_batch_size"):
            engine.build_train_runner(config, auto_scale_lr=True)

    @pytest.mark.parametrize("build", [engine.build_train_runner, engine.build_test_runner])
    def test_missing_checkpoint(self, tmp_path, build):
        config = Config(dict(work_dir=str(tmp_path)))
        with pytest.raises(FileNotFoundError, match="gone.pth does not exist"):
            if build is engine.build_train_runner:
                build(config, resume="gone.pth")
            else:
                build(config, "gone.pth")

    def test_bad_test_arguments(self, tmp_path):
        checkpoint = tmp_path / "x.pth"
        checkpoint.touch()
        config = Config(dict(work_dir=str(tmp_path), default_hooks=dict(), model=dict()))
        for kwargs, message in (
            (dict(out="results.txt"), "results.txt"),
            (dict(show_dir="pictures"), "pictures of predictions need default_hooks"),
            (dict(tta=True), "needs tta_model"),
        ):
            with pytest.raises(ValueError, match=message):
                engine.build_test_runner(config.copy(), str(checkpoint), **kwargs)

    @pytest.mark.parametrize(
        ("trained", "views"),
        [
            ([0.5, 0.0, 0.0], [0.0, 1.0]),
            # A mirrored turn_left would be a turn_right.
            ([0.0, 0.0, 0.0], [0.0]),
            ([0.0, 0.5, 0.0], [0.0]),
        ],
    )
    def test_test_time_augmentation_flips_as_training(self, monkeypatch, trained, views):
        lines: list[str] = []
        monkeypatch.setattr(engine, "print_log", lambda text, *args: lines.append(text))
        config = configs.load_config(f"{V2_S0}_custom.py")
        (flip,) = [s for s in config.train_dataloader.dataset.pipeline if s.type == "RandomFlip"]
        flip.update(prob=trained, direction=["horizontal", "vertical", "diagonal"])
        scales, flips, *others = config.tta_pipeline[1].transforms
        engine._leave_out_flips(config)
        assert config.tta_pipeline[1].transforms[0] == scales
        assert [step.prob for step in config.tta_pipeline[1].transforms[1]] == views
        assert config.tta_pipeline[1].transforms[2:] == others
        assert len(lines) == (len(views) == 1)
        assert all("flips images (horizontal) as training never does" in line for line in lines)


def shipped(pattern, setting=""):
    """Configs of all tasks with a setting; those of a task without its libraries are skipped."""
    marks = {param.values[0]: param.marks for param in tiny.all_tasks()}
    return [
        pytest.param(path, marks=marks[path.parent.name], id=path.parent.name)
        for path in sorted(config_dir().glob(pattern))
        if re.search(rf"(?m)^{setting}", path.read_text())
    ]


TEMPLATES = shipped("*/*_custom.py")
# Classifiers have a crop instead; see tests/classification/test_configs.py.
WITH_SCALE = shipped("*/*_custom.py", "(scale|size) = ")
QUICKSTARTS = shipped("*/*_quickstart.py")


def edited(template, folder, **settings):
    """A copy of a template beside its base, with other values of its settings."""
    text = template.read_text().replace('_base_ = "', f'_base_ = "{template.parent}/')
    for name, value in settings.items():
        text, count = re.subn(rf"^{name} = .*", f"{name} = {value!r}", text, flags=re.M)
        assert count == 1
    path = folder / "edited.py"
    path.write_text(text)
    return configs.load_config(path)


class TestTemplates:
    @pytest.mark.parametrize("template", TEMPLATES)
    def test_learning_rate_is_for_the_batch_size_of_the_template(self, template, tmp_path):
        config = edited(template, tmp_path, batch_size=6)
        assert config.train_dataloader.batch_size == config.auto_scale_lr.base_batch_size == 6

    @pytest.mark.parametrize("template", WITH_SCALE)
    def test_augmentation_in_testing_follows_the_scale(self, template, tmp_path):
        scale = (896, 512)
        name = "size" if template.parent.name == "rotated" else "scale"
        config = edited(template, tmp_path, **{name: scale})
        steps = config.test_dataloader.dataset.pipeline
        (tested,) = [step.scale for step in steps if step.type.endswith("Resize")]
        assert tuple(tested) == scale
        if "tta_pipeline" in config:
            scales = [tuple(step.scale) for step in config.tta_pipeline[1].transforms[0]]
            assert scale in scales
            assert config.tta_pipeline[0] == steps[0]
            assert {round(a / b, 1) for a, b in scales} == {round(scale[0] / scale[1], 1)}


@pytest.mark.parametrize("scale", [(1333, 800), (640, 640)])
def test_augmentation_at_other_scales_than_testing_is_said(scale, monkeypatch):
    config = configs.load_config(f"{V2_S0}_1x_coco.py")
    config.test_dataloader.dataset.pipeline[1].scale = scale
    lines: list[str] = []
    monkeypatch.setattr(engine, "print_log", lambda text, *args: lines.append(text))
    engine._warn_if_scales_differ(config)
    assert len(lines) == (scale != (1333, 800))
    assert all("to [(1333, 800), (1600, 960)], but" in line for line in lines)


@pytest.mark.parametrize("quickstart", QUICKSTARTS)
def test_settings_of_a_quickstart_are_its_own(quickstart):
    config = configs.load_config(quickstart)
    assert config.auto_scale_lr.base_batch_size == config.train_dataloader.batch_size
    if "tta_pipeline" in config:
        assert max(max(step.scale) for step in config.tta_pipeline[1].transforms[0]) < 200


class TestGpuSettings:
    def test_what_the_config_leaves_open_is_set(self):
        config = configs.load_config(f"{V2_S0.replace('s0', 's2')}_amp-1x_coco.py")
        device.use_gpu(config, bf16=True)
        wrapper = config.optim_wrapper
        assert wrapper.dtype == "bfloat16" and wrapper.loss_scale == 1.0
        assert config.train_dataloader.pin_memory and config.val_dataloader.pin_memory

    def test_float16_keeps_its_loss_scaling(self):
        config = configs.load_config(f"{V2_S0.replace('s0', 's2')}_amp-1x_coco.py")
        device.use_gpu(config, bf16=False)
        assert "dtype" not in config.optim_wrapper and config.optim_wrapper.loss_scale == "dynamic"

    def test_what_the_config_says_stays(self):
        options = {
            "optim_wrapper.dtype": "float16",
            "train_dataloader.pin_memory": False,
        }
        config = configs.load_config(f"{V2_S0.replace('s0', 's2')}_amp-1x_coco.py", options)
        device.use_gpu(config, bf16=True)
        wrapper = config.optim_wrapper
        assert wrapper.dtype == "float16" and wrapper.loss_scale == "dynamic"
        assert not config.train_dataloader.pin_memory


@pytest.mark.parametrize("options, fused", [({}, True), ({"foreach": True}, None)])
def test_optimizers_are_fused_unless_the_config_chooses(options, fused):
    config = configs.load_config(f"{V2_S0}_1x_coco.py")
    config.optim_wrapper.optimizer.update(options)
    device.fuse_optimizer(config)
    assert config.optim_wrapper.optimizer.get("fused") is fused
    config.optim_wrapper.optimizer = dict(type="Adadelta")
    device.fuse_optimizer(config)
    assert "fused" not in config.optim_wrapper.optimizer


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is tested is the way without a GPU")
class TestWithoutGpu:
    def test_amp_becomes_full_precision(self):
        config = configs.load_config(f"{V2_S0.replace('s0', 's2')}_amp-1x_coco.py")
        device.prepare_device(config, "none")
        assert config.optim_wrapper.type == "OptimWrapper"
        assert "loss_scale" not in config.optim_wrapper

    def test_slurm_ranks(self, monkeypatch):
        given = dict(SLURM_PROCID="0", SLURM_NTASKS="1", SLURM_LOCALID="0", MASTER_ADDR="127.0.0.1")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.distributed, "init_process_group", started := [].append)
        norm = dict(type="SyncBN")
        config = Config(
            dict(env_cfg=dict(dist_cfg=dict(backend="nccl")), model=dict(neck=[dict(norm=norm)]))
        )
        before = dict(os.environ)
        try:
            device.prepare_device(config, "slurm")
            assert started.__self__ == ["gloo"]
            assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
        finally:
            os.environ.clear()
            os.environ.update(before)
        assert config.env_cfg.dist_cfg.backend == "gloo"
        assert config.model_wrapper_cfg.device_ids is None
        assert config.model.neck[0].norm.type == "BN"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_coco_dataset(tmp_path_factory.mktemp("data") / "shapes", train=8, val=4, size=64)


@pytest.fixture(scope="module")
def small_config(shapes, tmp_path_factory):
    """The quickstart's detector, smaller, for two iterations of two images."""
    config = tiny.network("detection")
    # Hardly trained, it must still report something to evaluate.
    config.model.test_cfg.rcnn.score_thr = 0.0
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.data_root = str(shapes)
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    for evaluator in (config.val_evaluator, config.test_evaluator):
        evaluator.ann_file = str(shapes / "annotations/instances_val2017.json")
    # Of the size of the images, in place of two larger ones.
    config.tta_pipeline[1].transforms[0] = [
        dict(type="Resize", scale=(side, side), keep_ratio=True) for side in (64, 96)
    ]
    config.train_cfg.update(max_iters=2, val_interval=2)
    config.default_hooks.logger.interval = 1
    config.default_hooks.checkpoint.interval = 2
    path = tmp_path_factory.mktemp("config") / "small.py"
    config.dump(str(path))
    return path


def run(*command, **environment):
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
            **{name: str(value) for name, value in environment.items()},
        },
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-4000:]
    return output


def scalars(work_dir):
    (file,) = Path(work_dir).glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(small_config, tmp_path_factory):
    """The work directory of a training by the command line."""
    work_dir = tmp_path_factory.mktemp("trained")
    assert train_main([str(small_config), "--work-dir", str(work_dir), "--auto-scale-lr"]) == 0
    return work_dir


def test_train_by_command_line(trained):
    rows = scalars(trained)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    # --auto-scale-lr: 2 images instead of 8; the first step of the warm-up has a hundredth.
    assert rows[0]["lr"] == rows[0]["base_lr"] == pytest.approx(2e-3 * 2 / 8 / 100)
    assert any("coco/segm_mAP_50" in row for row in rows)


def test_resume_by_command_line(small_config, trained, tmp_path):
    work_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    longer = ["--cfg-options", "train_cfg.max_iters=3", "--resume"]
    assert train_main([str(small_config), "--work-dir", str(work_dir), *longer]) == 0
    log = max(work_dir.glob("*/*.log")).read_text()
    assert "resumed epoch: 0, iter: 2" in log
    assert "Iter(train) [3/3]" in log.replace(" [ ", " [")


def test_test_by_command_line(small_config, trained, tmp_path):
    work_dir = tmp_path / "test"
    work_dir.mkdir()
    of_training = work_dir / small_config.name
    shutil.copy(trained / small_config.name, of_training)
    before = of_training.read_bytes()
    arguments = [
        *(small_config, trained / "iter_2.pth", "--work-dir", work_dir, "--tta"),
        *("--out", tmp_path / "out/results.pkl", "--show-dir", tmp_path / "pictures"),
        *("--cfg-options", "test_evaluator.metric=bbox"),
    ]
    assert evaluate_main(list(map(str, arguments))) == 0
    # The config of the test, which has other metrics and a wrapped model, lies beside its log.
    assert of_training.read_bytes() == before and find_config(work_dir) == of_training
    assert len(list(work_dir.glob(f"*/{small_config.name}"))) == 1
    (log,) = (path.read_text() for path in tmp_path.glob("test/*/*.log"))
    assert "coco/bbox_mAP_50" in log and "coco/segm_mAP_50" not in log
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4
    results = pickle.loads((tmp_path / "out/results.pkl").read_bytes())
    assert len(results) == 4 and "masks" in results[0]["pred_instances"]


# The whole command; what two processes compute is tested in test_distributed.py.
@pytest.mark.slow
def test_two_processes_over_gloo(small_config, tmp_path):
    command = [tools_dir() / "dist_train.sh", small_config, 2, "--work-dir", tmp_path]
    assert run(*command).startswith("no GPU: 2 processes on the CPU, over gloo\n")
    rows = scalars(tmp_path)
    assert sum("loss" in row for row in rows) == 2
    assert (tmp_path / "iter_2.pth").is_file()


@pytest.mark.slow
def test_two_processes_test_over_gloo(small_config, trained, tmp_path):
    command = [tools_dir() / "dist_test.sh", small_config, trained / "iter_2.pth", 2]
    output = run(*command, "--work-dir", tmp_path)
    assert "coco/segm_mAP_50" in output


@pytest.mark.parametrize("script", ["dist_train.sh", "dist_test.sh"])
def test_scripts_of_several_processes_hand_all_on(script, tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    inputs = ["config.py", *(["model.pth"] if "test" in script else [])]
    command = [tools_dir() / script, *inputs, 2, "--work-dir", "somewhere"]
    tool = script.removeprefix("dist_").replace(".sh", ".py")
    assert run(*command, PYTHON=fake).splitlines() == [
        *(str(tools_dir() / tool), *inputs, "--gpus", "2", "--work-dir", "somewhere")
    ]


@pytest.mark.parametrize("script", ["slurm_train.sh", "slurm_test.sh"])
def test_slurm_scripts_hand_all_on(script, tmp_path):
    fake = tmp_path / "srun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    arguments = ["part", "job", "config.py", *(["model.pth"] if "test" in script else [])]
    output = run(
        *(tools_dir() / script, *arguments, "--work-dir", "somewhere"),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        GPUS="2",
    ).splitlines()
    assert {"--partition=part", "--job-name=job", "--ntasks=2", "--gres=gpu:2"} <= set(output)
    assert output[-4:] == ["--launcher", "slurm", "--work-dir", "somewhere"]
    assert "config.py" in output


def test_wrong_class_list_stops_the_command(small_config, tmp_path, capfd, quiet_logging):
    classes = "train_dataloader.dataset.metainfo.classes=('circle','rectangle','triangle','stra')"
    argv = [str(small_config), "--work-dir", str(tmp_path), "--cfg-options", classes]
    assert train_main(argv) == 1
    error = capfd.readouterr().err
    assert "classes ['stra'] of the config are not among the 4 categories" in error


def test_inference_apis_need_only_config_and_checkpoint(small_config, shapes, trained, tmp_path):
    from mmdet.apis import DetInferencer, inference_detector, init_detector

    checkpoint = str(trained / "iter_2.pth")
    model = init_detector(str(small_config), checkpoint, device="cpu")
    assert model.dataset_meta["classes"] == ("circle", "rectangle", "triangle", "star")
    picture = str(shapes / "val2017/000000.png")
    found = inference_detector(model, picture).pred_instances
    assert found.masks.shape[1:] == (64, 64)
    inferencer = DetInferencer(str(small_config), checkpoint, device="cpu", show_progress=False)
    result = inferencer(picture, out_dir=str(tmp_path / "out"))["predictions"][0]
    assert len(result["labels"]) == len(result["bboxes"])
    assert (tmp_path / "out/vis/000000.png").is_file()
