# SPDX-License-Identifier: Apache-2.0
"""What a training does beside the loop: EMA, early stopping, trackers, and where results are."""

import importlib.util
from types import SimpleNamespace

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.optim.scheduler.param_scheduler import INF

from mmeformer import work_dirs
from mmeformer.commands import train
from mmeformer.errors import CheckpointError, TrainingError, UserError
from mmeformer.settings import SettingError
from mmeformer.training import engine, trackers
from mmeformer.training.schedule import other_length, require_spans

pytestmark = pytest.mark.usefixtures("quiet_logging")

EMA = dict(type="EMAHook", momentum=0.3)


@pytest.fixture
def config(tmp_path):
    config = tiny.segmentation(tmp_path, iterations=4)
    config.default_hooks.ema = EMA
    return config


def test_the_averages_are_validated(config, tmp_path):
    """That they are resumed exactly is tested with everything else that is resumed."""
    config.train_cfg.val_interval = 4
    config.default_hooks.checkpoint.update(save_best="mIoU")
    config.work_dir = str(tmp_path / "run")
    runner = engine.build_train_runner(Config(config.to_dict()))
    seen = {}

    class Probe(tiny.Hook):
        def before_val_iter(self, runner, batch_idx, data_batch=None):
            seen.update({k: v.clone() for k, v in runner.model.state_dict().items()})

    runner.register_hook(Probe())
    runner.train()
    content = torch.load(work_dirs.best_checkpoint(tmp_path / "run"), weights_only=False)
    saved = content["state_dict"]
    assert seen and all(torch.equal(seen[name], saved[name]) for name in saved)
    # After the validation the training goes on with its own weights.
    after = runner.model.state_dict()
    assert not all(torch.equal(after[name], saved[name]) for name in saved)


def test_classes_in_another_order_are_refused(config, tmp_path):
    """Testing or resuming with them would be wrong without a word."""
    config.work_dir = str(tmp_path / "run")
    engine.build_train_runner(Config(config.to_dict())).train()
    checkpoint = str(work_dirs.last_checkpoint(tmp_path / "run"))
    engine.build_test_runner(Config(config.to_dict()), checkpoint).test()
    names = config.test_dataloader.dataset.metainfo.classes
    config.test_dataloader.dataset.metainfo.classes = names[::-1]
    with pytest.raises(CheckpointError, match=f"order {names[0]}, .*, but the config .*metainfo"):
        engine.build_test_runner(Config(config.to_dict()), checkpoint).test()
    config.train_dataloader.dataset.metainfo.classes = names[::-1]
    config.train_cfg.max_iters += 1
    with pytest.raises(CheckpointError, match="in the order"):
        engine.build_train_runner(Config(config.to_dict()), resume="auto").train()


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([(3, False), (2, True)], None),
        ([(3, False), (24, True)], "for 240 iterations, but the training has 20"),
        ([(3, False), (1, True)], "for 10 iterations, but the training has 20"),
        ([(3, False), (INF, True)], None),
        ([], None),
    ],
)
def test_schedule_of_another_length_is_said(ends, said):
    runner = SimpleNamespace(
        train_loop=SimpleNamespace(max_iters=20),
        train_dataloader=[None] * 10,
        param_schedulers=[SimpleNamespace(end=end, by_epoch=epoch) for end, epoch in ends],
    )
    found = other_length(runner)
    assert found is None if said is None else said in found


def test_a_begin_that_a_config_inherits_may_be_after_its_end(config, tmp_path):
    """As in generated configs of 2026-11-26, which set the ``end`` of the template's cosine."""
    config.work_dir = str(tmp_path / "run")
    config.param_scheduler.append(dict(type="CosineAnnealingLR", by_epoch=True, begin=16, end=12))
    with pytest.raises(SettingError, match=r"\[1\] \(Cosine.* begins at 16 and ends at 12: add"):
        engine.build_train_runner(config)
    config.merge_from_dict({"param_scheduler.1.begin": 0})
    require_spans(config)


def test_none_removes_a_hook(config, tmp_path):
    config.work_dir = str(tmp_path / "run")
    config.default_hooks.update(ema=None, visualization=None, timer=None)
    names = {type(hook).__name__ for hook in engine.build_train_runner(config).hooks}
    assert not names & {"EMAHook", "SegVisualizationHook", "IterTimerHook"}
    assert "CheckpointHook" in names


def test_early_stopping(config, tmp_path):
    config.train_cfg.update(max_iters=40, val_interval=1)
    config.default_hooks.early_stopping = dict(
        type="EarlyStoppingHook", monitor="mIoU", rule="greater", patience=2, min_delta=200
    )
    assert len(tiny.train(config, tmp_path / "run")) == 3


def monitoring(config, name):
    """Early stopping and a schedule that read a metric which is no metric."""
    config.train_cfg.update(max_iters=4, val_interval=1)
    config.custom_hooks = [
        dict(type="EarlyStoppingHook", monitor=name, rule="greater", patience=2, min_delta=200)
    ]
    config.param_scheduler = [
        dict(type="ReduceOnPlateauLR", monitor=name, rule="greater", patience=9)
    ]
    return config


def log_of(work_dir):
    return "".join(path.read_text() for path in sorted(work_dir.glob("*/*.log")))


def test_closest_metric_is_monitored(config, tmp_path):
    work_dir = tmp_path / "run"
    config = monitoring(config, "mIoUs")
    # The first and third validation; the fourth iteration is never reached.
    assert len(tiny.train(config, work_dir)) == 3
    text = log_of(work_dir)
    for setting in ("monitor of EarlyStoppingHook", "param_scheduler.0.monitor"):
        assert text.count(f"{setting}='mIoUs' is not among the metrics") == 1
    assert "mIoU takes its place" in text


def test_monitored_metric_is_kept_when_resumed(config, tmp_path):
    work_dir = tmp_path / "run"
    config = monitoring(config, "mIoUs")
    config.default_hooks.checkpoint.interval = 1
    config.train_cfg.max_iters = 2
    assert len(tiny.train(config, work_dir)) == 2
    config.train_cfg.max_iters = 9
    # One validation without progress was before, so the next one ends the run.
    assert len(tiny.train(config, work_dir, resume="auto")) == 1
    text = log_of(work_dir)
    assert text.count("takes its place") == 2 and "not applied from the config" not in text


def test_no_metric_to_monitor(config, tmp_path):
    with pytest.raises(TrainingError, match="monitor of EarlyStoppingHook='zzz' .* set it to one"):
        tiny.train(monitoring(config, "zzz"), tmp_path / "run")
    config.update(val_dataloader=None, val_evaluator=None, val_cfg=None)
    tiny.train(monitoring(config, "mIoU"), tmp_path / "other")
    assert "without validations there is no metric" in log_of(tmp_path / "other")


# --- trackers ------------------------------------------------------------------------------------


def backends(config):
    return [backend["type"] for backend in config.visualizer.vis_backends]


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these packages are installed, and no others."""
    names = set()
    monkeypatch.setattr(trackers, "find_spec", lambda name: name if name in names else None)
    return names


def settings(*types):
    listed = [dict(type=name) for name in types]
    return Config(dict(visualizer=dict(type="Visualizer", vis_backends=listed)))


def test_tensorboard_if_it_is_installed(installed):
    config = settings("LocalVisBackend")
    trackers.add_trackers(config)
    assert backends(config) == ["LocalVisBackend"]
    installed.add("tensorboard")
    trackers.add_trackers(config)
    trackers.add_trackers(config)
    assert backends(config) == ["LocalVisBackend", "TensorboardVisBackend"]
    config = settings("LocalVisBackend")
    trackers.add_trackers(config, ["none"])
    assert backends(config) == ["LocalVisBackend"]


def test_named_trackers(installed, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    installed |= {"wandb", "mlflow", "clearml"}
    config = settings("LocalVisBackend", "mmengine.WandbVisBackend")
    trackers.add_trackers(config, ["wandb", "mlflow", "clearml"])
    assert backends(config)[1:] == [
        "mmengine.WandbVisBackend",
        "MLflowVisBackend",
        "ClearMLVisBackend",
    ]
    config = Config(dict())
    trackers.add_trackers(config, ["mlflow"])
    assert backends(config) == ["LocalVisBackend", "MLflowVisBackend"]
    assert config.visualizer.vis_backends[1].tracking_uri == "sqlite:///mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    trackers.add_trackers(config := Config(dict()), ["mlflow"])
    assert config.visualizer.vis_backends[1].tracking_uri == "http://server:5000"


def test_missing_packages_are_one_line(installed, config, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="stands alone"):
        trackers.add_trackers(config, ["none", "wandb"])
    path = tmp_path / "config.py"
    config.dump(path)
    options = ["--work-dir", str(tmp_path / "run"), "--log", "wandb", "mlflow"]
    assert train.main([str(path), *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install wandb mlflow" in error
    assert not (tmp_path / "run").exists()


def test_all_trackers_are_mmengines():
    from mmengine.registry import VISBACKENDS

    assert all(VISBACKENDS.get(name) is not None for name in trackers.TRACKERS.values())


def test_curves_in_tensorboard(config, tmp_path):
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    tiny.train(config, tmp_path / "run")
    assert list((tmp_path / "run").glob("*/vis_data/events.out.tfevents.*"))


# --- where things are ----------------------------------------------------------------------------


def test_files_of_a_work_directory(tmp_path):
    with pytest.raises(UserError, match="no config"):
        work_dirs.find_config(tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        work_dirs.choose_checkpoint(tmp_path)
    vis_data = tmp_path / "20260101_100000" / "vis_data"
    vis_data.mkdir(parents=True)
    (vis_data / "config.py").write_text("")
    assert work_dirs.find_config(tmp_path) == vis_data / "config.py"
    (tmp_path / "mine.py").write_text("")
    assert work_dirs.find_config(tmp_path) == tmp_path / "mine.py"
    for name in ("epoch_1.pth", ".epoch_3.draft-01234567.pth", "epoch_2.pth"):
        (tmp_path / name).write_text("")
    # The folder was moved since.
    (tmp_path / "last_checkpoint").write_text("/elsewhere/run/epoch_1.pth")
    assert work_dirs.choose_checkpoint(tmp_path) == tmp_path / "epoch_1.pth"
    (tmp_path / "best_mIoU_epoch_1.pth").write_text("")
    assert work_dirs.last_checkpoint(tmp_path) == tmp_path / "epoch_1.pth"
    assert work_dirs.choose_checkpoint(tmp_path) == tmp_path / "best_mIoU_epoch_1.pth"
