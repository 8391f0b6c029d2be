# SPDX-License-Identifier: Apache-2.0
"""Signals of a scheduler stop a run with a checkpoint, from which it goes on as if unbroken."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

from mmeformer import files
from mmeformer.paths import tools_dir
from mmeformer.training import preemption
from mmeformer.training.preemption import PREEMPTED, StopRequest

pytestmark = pytest.mark.forks


def send(number=signal.SIGTERM):
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("preemption")


@pytest.fixture(scope="module")
def unbroken(folder):
    return tiny.train(tiny.segmentation(folder), folder / "unbroken")


def named(work_dir):
    return Path((work_dir / "last_checkpoint").read_text()).name


def test_saves_after_the_iteration_and_goes_on_as_if_unbroken(folder, unbroken, tmp_path):
    config = tiny.segmentation(folder)
    code = tiny.fork(lambda rank: tiny.train(config, tmp_path, at={4: send()}))
    assert code == [PREEMPTED] and named(tmp_path) == "interim_iter_5.pth"
    assert (tmp_path / "iter_4.pth").is_file()
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert f"stopped by SIGTERM. The last good checkpoint is {tmp_path}/interim_iter_5.pth" in log
    losses = tiny.train(config, tmp_path, resume="auto")
    assert sorted(losses) == [5, 6, 7] and tiny.equal(unbroken, losses)
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["iter_8.pth"]


@pytest.mark.slow
def test_a_classifier_goes_on_as_if_unbroken(tmp_path):
    """With averaged weights and validations, which both follow the classes of whole images."""
    pytest.importorskip("mmpretrain")
    config = tiny.everything("classification", tmp_path, 8)
    tiny.train(config, tmp_path / "unbroken")
    code = tiny.fork(lambda rank: tiny.train(config, tmp_path / "run", at={4: send()}))
    assert code == [PREEMPTED] and named(tmp_path / "run") == "interim_iter_5.pth"
    assert sorted(tiny.train(config, tmp_path / "run", resume="auto")) == [5, 6, 7]
    tiny.assert_same_state(tmp_path / "unbroken/iter_8.pth", tmp_path / "run/iter_8.pth")


@pytest.mark.slow
def test_a_checkpoint_of_this_iteration_is_enough(folder, tmp_path):
    config = tiny.segmentation(folder)
    code = tiny.fork(lambda rank: tiny.train(config, tmp_path, at={3: send(signal.SIGUSR1)}))
    assert code == [PREEMPTED] and named(tmp_path) == "iter_4.pth"
    assert not list(tmp_path.glob("interim*"))


@pytest.mark.slow
def test_accumulated_gradients_are_applied_first(folder, tmp_path):
    config = tiny.segmentation(folder)
    config.optim_wrapper.accumulative_counts = 4
    config.default_hooks.checkpoint.interval = 4
    expected = tiny.train(config, tmp_path / "unbroken")
    code = tiny.fork(lambda rank: tiny.train(config, tmp_path, at={1: send()}))
    assert code == [PREEMPTED] and named(tmp_path) == "iter_4.pth"
    losses = tiny.train(config, tmp_path, resume="auto")
    assert sorted(losses) == [4, 5, 6, 7] and tiny.equal(expected, losses)


@pytest.mark.slow
@pytest.mark.parametrize("rank_of_signal", [0, 1])
def test_all_processes_stop_at_the_same_iteration(folder, tmp_path, rank_of_signal):
    config = tiny.segmentation(folder)

    def run(work_dir, at=None, **kwargs):
        def one(rank):
            mine = at if rank == rank_of_signal else None
            losses = tiny.train(config, work_dir, launcher="pytorch", at=mine, **kwargs)
            Path(work_dir, f"losses-{rank}.json").write_text(json.dumps(losses))

        return tiny.fork(one, world_size=2)

    def losses(work_dir, rank):
        content = json.loads(Path(work_dir, f"losses-{rank}.json").read_text())
        return {int(iteration): loss for iteration, loss in content.items()}

    assert run(tmp_path / "unbroken") == [0, 0]
    assert run(tmp_path / "run", at={4: send()}) == [PREEMPTED] * 2
    assert named(tmp_path / "run") == "interim_iter_5.pth"
    assert run(tmp_path / "run", resume="auto") == [0, 0]
    for rank in (0, 1):
        resumed = losses(tmp_path / "run", rank)
        assert sorted(resumed) == [5, 6, 7]
        assert tiny.equal(losses(tmp_path / "unbroken", rank), resumed)


def validated(folder, iterations=4):
    """A training with a validation and averaged weights."""
    config = tiny.segmentation(folder, iterations)
    config.train_cfg.val_interval = 2
    config.default_hooks.checkpoint.update(save_best="mIoU", rule="greater", interval=4)
    config.custom_hooks.append(dict(type="EMAHook", momentum=0.3))
    return config


def in_first_validation(monkeypatch, where):
    """Send a signal in the first validation of the process: while it predicts, or evaluates."""
    from mmseg.evaluation import IoUMetric

    original, calls = getattr(IoUMetric, where), []

    def replacement(self, *args, **kwargs):
        calls.append(where)
        if len(calls) == 1:
            send()()
            # A signal is handled before the next line.
            calls.append("survived")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(IoUMetric, where, replacement)


@pytest.mark.parametrize(
    "where", ["compute_metrics", pytest.param("process", marks=pytest.mark.slow)]
)
def test_validation_is_repeated(folder, tmp_path, monkeypatch, where):
    config = validated(folder)
    tiny.train(config, tmp_path / "unbroken")

    def run(rank):
        in_first_validation(monkeypatch, where)
        tiny.train(config, tmp_path / "run")

    assert tiny.fork(run) == [PREEMPTED]
    assert named(tmp_path / "run") == "interim_iter_2.pth"
    tiny.train(config, tmp_path / "run", resume="auto")
    tiny.assert_same_state(tmp_path / "unbroken/iter_4.pth", tmp_path / "run/iter_4.pth")
    best = [
        sorted(path.name for path in (tmp_path / name).glob("best*"))
        for name in ("unbroken", "run")
    ]
    assert best[0] == best[1] and len(best[0]) == 1


@pytest.mark.slow
def test_validation_of_two_processes_is_repeated(folder, tmp_path, monkeypatch):
    """The main process evaluates when its signal arrives; the other has none."""
    config = validated(folder)

    def run(work_dir, resume=None, stop=False):
        def one(rank):
            if stop and rank == 0:
                in_first_validation(monkeypatch, "compute_metrics")
            tiny.train(config, work_dir, launcher="pytorch", resume=resume)

        return tiny.fork(one, world_size=2)

    assert run(tmp_path / "unbroken") == [0, 0]
    assert run(tmp_path / "run", stop=True) == [PREEMPTED] * 2
    assert run(tmp_path / "run", resume="auto") == [0, 0]
    tiny.assert_same_state(tmp_path / "unbroken/iter_4.pth", tmp_path / "run/iter_4.pth")


def test_second_signal_stops_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(StopRequest, "SAME", 0)

    def twice():
        send()()
        send()()

    config = tiny.segmentation(folder, iterations=4)
    assert tiny.fork(lambda rank: tiny.train(config, tmp_path, at={3: twice})) == [-signal.SIGTERM]
    assert named(tmp_path) == "iter_2.pth"
    assert torch.load(tmp_path / "iter_2.pth", weights_only=False)["meta"]["iter"] == 2


def test_what_launchers_pass_on_is_the_same_signal(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: clock[0])
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        # Before the first iteration there is nothing to save.
        with pytest.raises(SystemExit) as leaving:
            send()()
        assert leaving.value.code == PREEMPTED
        stop.trained = True
        send(signal.SIGUSR1)()
        clock[0] += 0.9
        send()()
        assert stop.signal == "SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_workers_load_on_when_all_processes_get_the_signal(folder, tmp_path):
    """Slurm and `kill -- -GROUP` tell data workers too, whose data the last iteration needs."""
    config = tiny.segmentation(folder)
    config.train_dataloader.num_workers = 2

    def run(rank):
        os.setpgid(0, 0)
        tiny.train(config, tmp_path, at={4: lambda: os.killpg(0, signal.SIGTERM)})

    assert tiny.fork(run) == [PREEMPTED]
    assert named(tmp_path) == "interim_iter_5.pth"


def script(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


class TestScripts:
    """The scripts that start several processes; the programs that they call are doubles."""

    def run_slurm(self, tmp_path, codes, **environment):
        calls = tmp_path / "calls.txt"
        (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
        script(
            tmp_path / "srun",
            f'echo "srun $*" >> {calls}\ncd {tmp_path}\ncode=$(head -1 codes)\n'
            'sed -i 1d codes\nexit "$code"',
        )
        script(tmp_path / "scontrol", f'echo "scontrol $*" >> {calls}')
        done = subprocess.run(
            [tools_dir() / "slurm_train.sh", "part", "job", "config.py", "--work-dir", "there"],
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("SLURM")},
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                **environment,
            },
            timeout=60,
        )
        return done.returncode, calls.read_text().splitlines()

    def test_slurm_job_is_requeued(self, tmp_path):
        code, calls = self.run_slurm(tmp_path, [PREEMPTED], SLURM_JOB_ID="17")
        assert code == 0 and calls[1:] == ["scontrol requeue 17"]
        assert "--signal=USR1@" in calls[0] and calls[0].endswith("--work-dir there")

    def test_requeued_job_resumes(self, tmp_path):
        code, calls = self.run_slurm(tmp_path, [0], SLURM_JOB_ID="17", SLURM_RESTART_COUNT="1")
        assert code == 0 and len(calls) == 1 and calls[0].endswith("--work-dir there --resume")

    def test_without_a_job_srun_is_called_again(self, tmp_path):
        code, calls = self.run_slurm(tmp_path, [PREEMPTED, PREEMPTED, 0])
        assert code == 0 and [call.endswith("--resume") for call in calls] == [False, True, True]

    @pytest.mark.parametrize("code", [1, 137])
    def test_other_ends_are_final(self, tmp_path, code):
        ended, calls = self.run_slurm(tmp_path, [code], SLURM_JOB_ID="17")
        assert ended == code and len(calls) == 1

    def run_torchrun(self, tmp_path, text, number=None):
        script(tmp_path / "python", text)
        process = subprocess.Popen(
            [tools_dir() / "dist_train.sh", "config.py", "2"],
            env={**os.environ, "PYTHON": str(tmp_path / "python")},
        )
        if number is not None:
            while not (tmp_path / "ready").exists():
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(number)
        return process.wait(60)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
    def test_torchrun_gets_sigterm(self, tmp_path, number):
        text = (
            f"trap 'touch {tmp_path}/told; exit 1' TERM\n"
            f"touch {tmp_path}/ready\nwhile :; do sleep 0.05; done"
        )
        assert self.run_torchrun(tmp_path, text, number) == PREEMPTED
        assert (tmp_path / "told").exists()

    @pytest.mark.parametrize("code", [0, 1])
    def test_torchrun_ends_by_itself(self, tmp_path, code):
        assert self.run_torchrun(tmp_path, f"exit {code}") == code


def test_drafts_of_a_stopped_run_are_removed(folder, tmp_path):
    """A second signal may come while a checkpoint is written."""
    draft = tmp_path / ".iter_9.draft-0123abcd.pth"
    draft.write_bytes(b"half")
    assert files.is_draft(draft)
    tiny.train(tiny.segmentation(folder, iterations=2), tmp_path)
    assert not draft.exists() and (tmp_path / "iter_2.pth").is_file()


@pytest.mark.slow
def test_workers_end_with_their_program():
    """They ignore SIGTERM, by which multiprocessing ends those that wait for more work."""
    program = (
        "from torch.utils.data import DataLoader\n"
        "from mmeformer.training.preemption import deaf_worker\n"
        "loader = DataLoader(range(4), num_workers=2, persistent_workers=True,\n"
        "                    worker_init_fn=deaf_worker(None))\n"
        "print([int(item) for item in loader])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1, 2, 3]\n", "")
