# SPDX-License-Identifier: Apache-2.0
"""A checkpoint holds all that a run has become: resumed equals unbroken, bit for bit."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmseg.evaluation import IoUMetric

from mmeformer.training import engine
from mmeformer.training.state import hook_states, restore_hooks


def best(work_dir):
    return sorted(path.name for path in work_dir.glob("best_*"))


@pytest.mark.forks
@pytest.mark.parametrize(
    ("task", "world"),
    [
        ("segmentation", 1),
        *(
            pytest.param(*param.values, world, marks=[*param.marks, pytest.mark.slow])
            for param in tiny.all_tasks()
            for world in (1, 2)
            if (*param.values, world) != ("segmentation", 1)
        ),
    ],
)
def test_killed_run_becomes_what_it_would_have(tmp_path, task, world):
    config = tiny.everything(task, tmp_path)
    launcher = "none" if world == 1 else "pytorch"

    def run(work_dir, **kwargs):
        return tiny.fork(
            lambda rank: tiny.train(config, work_dir, launcher=launcher, **kwargs), world, 120
        )

    assert run(tmp_path / "unbroken") == [0] * world
    assert run(tmp_path / "killed", at={3: tiny.kill}) == [-signal.SIGKILL] * world
    named = Path((tmp_path / "killed/last_checkpoint").read_text())
    content = torch.load(named, weights_only=False)
    assert named.name == "iter_2.pth" and content["meta"]["validated"]
    assert content["hooks"]["EarlyStoppingHook"][0]["monitor"] == tiny.SCORES[task]
    assert content["ema_state_dict"]["steps"] == 2
    assert run(tmp_path / "killed", resume="auto") == [0] * world
    tiny.assert_same_state(tmp_path / "unbroken/iter_4.pth", tmp_path / "killed/iter_4.pth")
    assert best(tmp_path / "unbroken") == best(tmp_path / "killed") != []


@pytest.mark.forks
@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_validation_that_a_kill_cut_off_is_made_up_for(tmp_path, monkeypatch, number):
    """The first of two, or that at the end of the training."""
    config = tiny.everything("segmentation", tmp_path)
    tiny.train(config, tmp_path / "unbroken")

    def run(rank):
        plain, calls = IoUMetric.compute_metrics, []

        def compute(self, results):
            calls.append(results)
            return plain(self, results) if len(calls) < number else tiny.kill()

        monkeypatch.setattr(IoUMetric, "compute_metrics", compute)
        tiny.train(config, tmp_path / "killed")

    assert tiny.fork(run) == [-signal.SIGKILL]
    tiny.train(config, tmp_path / "killed", resume="auto")
    tiny.assert_same_state(tmp_path / "unbroken/iter_4.pth", tmp_path / "killed/iter_4.pth")
    assert best(tmp_path / "unbroken") == best(tmp_path / "killed")


@pytest.mark.slow
def test_early_stopped_run_stays_stopped(tmp_path, monkeypatch):
    config = tiny.everything("segmentation", tmp_path, 8)
    config.custom_hooks[-1].patience = 2
    monkeypatch.setattr(
        "mmseg.evaluation.IoUMetric.compute_metrics", lambda self, results: dict(mIoU=10.0)
    )
    config.custom_hooks[-1].min_delta = 1.0
    assert len(tiny.train(config, tmp_path / "run")) == 6
    assert tiny.train(config, tmp_path / "run", resume="auto") == {}
    config.custom_hooks[-1].patience = 9
    assert sorted(tiny.train(config, tmp_path / "run", resume="auto")) == [6, 7]


class CpuAmp(AmpOptimWrapper):
    """mmengine's wrapper of mixed precision with PyTorch's scaler for the CPU."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.loss_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)


@pytest.mark.slow
@pytest.mark.forks
def test_scaler_of_mixed_precision_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(amp_optimizer_wrapper, "is_cuda_available", lambda: True)
    monkeypatch.setitem(OPTIM_WRAPPERS._module_dict, "CpuAmp", CpuAmp)
    config = tiny.segmentation(tmp_path, 8)
    config.optim_wrapper.type = "CpuAmp"
    config.default_hooks.checkpoint.max_keep_ckpts = -1
    tiny.train(config, tmp_path / "unbroken")

    def scaler(name):
        return torch.load(tmp_path / name, weights_only=False)["optimizer"]["loss_scaler"]

    kept, end = scaler("unbroken/iter_4.pth"), scaler("unbroken/iter_8.pth")
    # It doubles every three steps: a new one would be at 2^11 after the last four.
    assert (kept["scale"], kept["_growth_tracker"]) == (2.0**11, 1)
    assert (end["scale"], end["_growth_tracker"]) == (2.0**12, 2)
    codes = tiny.fork(lambda rank: tiny.train(config, tmp_path / "killed", at={5: tiny.kill}))
    assert codes == [-signal.SIGKILL]
    assert scaler("killed/iter_4.pth") == kept
    assert sorted(tiny.train(config, tmp_path / "killed", resume="auto")) == [4, 5, 6, 7]
    tiny.assert_same_state(tmp_path / "unbroken/iter_8.pth", tmp_path / "killed/iter_8.pth")


class Counting(Hook):
    """A hook of a user's own."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return dict(count=self.count)

    def load_state_dict(self, state):
        self.count = state["count"]


def test_hooks_get_their_own_states_back():
    def stopping(monitor):
        return EarlyStoppingHook(monitor, rule="greater", patience=3)

    hooks = [Counting(), stopping("a"), Hook(), stopping("b")]
    hooks[0].count = 7
    hooks[1].wait_count, hooks[1].best_score = 1, 0.5
    hooks[3].wait_count, hooks[3].best_score = 3, 0.25
    states = hook_states(hooks)
    # The second now follows another score.
    new = [Counting(), stopping("a"), stopping("other")]
    warnings = []
    runner = SimpleNamespace(
        hooks=new,
        train_loop=SimpleNamespace(stop_training=False),
        logger=SimpleNamespace(warning=warnings.append),
    )
    restore_hooks(runner, states)
    assert new[0].count == 7 and (new[1].wait_count, new[1].best_score) == (1, 0.5)
    assert new[2].wait_count == 0 and not runner.train_loop.stop_training and not warnings
    runner.hooks = [stopping("a"), stopping("b")]
    restore_hooks(runner, states)
    assert (
        runner.train_loop.stop_training
        and "stopped early (b 0.25, 3 validations ago)" in warnings[0]
    )


@pytest.mark.slow
def test_without_a_checkpoint_the_run_starts_from_what_it_was_given(tmp_path):
    """It was killed before its first one: from ``load_from``, or an earlier ``--resume FILE``."""
    config = tiny.segmentation(tmp_path, 2)
    tiny.train(config, tmp_path / "before")
    before = str(tmp_path / "before/iter_2.pth")
    config.randomness.seed = 5
    config.load_from = before
    expected = tiny.train(config, tmp_path / "tuned")
    assert tiny.equal(expected, tiny.train(config, tmp_path / "again", resume="auto"))
    config.load_from = None
    assert not tiny.equal(expected, tiny.train(config, tmp_path / "plain", resume="auto"))
    config.train_cfg.max_iters = 3
    config.work_dir = str(tmp_path / "longer")
    runner = engine.build_train_runner(config, resume="auto", resume_else=before)
    runner.train()
    assert runner.iter == 3 and runner.seed == 1
