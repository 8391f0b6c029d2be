# SPDX-License-Identifier: Apache-2.0
"""Signals of a scheduler stop a run with a checkpoint, from which it goes on as if unbroken."""

import ctypes
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from mmengine.hooks import RuntimeInfoHook
from mmseg.models import EncoderDecoder
from yapf.yapflib import yapf_api

from mmeformer import configs, files, signals
from mmeformer.commands import train
from mmeformer.paths import tools_dir
from mmeformer.report import build
from mmeformer.signals import PREEMPTED
from mmeformer.training import engine, preemption, runner, saving
from mmeformer.training.data import GuardedDataset
from mmeformer.training.preemption import StopRequest

pytestmark = pytest.mark.forks
ROOT = Path(__file__).parents[2]


def send(number=signal.SIGTERM):
    return lambda: os.kill(os.getpid(), number)


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
    run = partial(tiny.train_two, tiny.segmentation(folder))
    assert run(tmp_path / "unbroken") == [0, 0]
    stopped = run(tmp_path / "run", at={4: send()}, rank_of_at=rank_of_signal)
    assert stopped == [PREEMPTED] * 2
    assert named(tmp_path / "run") == "interim_iter_5.pth"
    assert run(tmp_path / "run", resume="auto") == [0, 0]
    for rank in (0, 1):
        resumed = tiny.losses_of(tmp_path / "run", rank)
        assert sorted(resumed) == [5, 6, 7]
        assert tiny.equal(tiny.losses_of(tmp_path / "unbroken", rank), resumed)


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
        # Else the first checkpoint may still be in the making, and end with the process.
        while not (tmp_path / "last_checkpoint").exists():
            time.sleep(0.01)
        send()()
        send()()

    config = tiny.segmentation(folder, iterations=4)
    assert tiny.fork(lambda rank: tiny.train(config, tmp_path, at={3: twice})) == [-signal.SIGTERM]
    assert named(tmp_path) == "iter_2.pth"
    assert torch.load(tmp_path / "iter_2.pth", weights_only=False)["meta"]["iter"] == 2


def test_what_launchers_pass_on_is_the_same_signal(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: clock[0])
    arrived = []
    monkeypatch.setattr(preemption.os, "kill", lambda process, number: arrived.append(number))
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        stop.trained = True
        signal.raise_signal(signal.SIGUSR1)
        clock[0] += 0.9
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == "SIGUSR1" and not arrived
    assert signal.getsignal(signal.SIGTERM) is before
    # Nobody has asked for it: it comes again, to those who handle it after the training.
    assert arrived == [signal.SIGUSR1]


def at_first_call(owner, name, action):
    """Perform ``action`` before the first call of a function."""
    original, calls = getattr(owner, name), []

    def replacement(*args, **kwargs):
        calls.append(name)
        if len(calls) == 1:
            action()
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def format_config(action):
    """While mmengine formats the config for its log, where it catches everything."""
    at_first_call(
        RuntimeInfoHook, "before_run", lambda: at_first_call(yapf_api, "FormatCode", action)
    )


def drop_object(action):
    """In ``__del__``, where Python drops exceptions, at the first batch."""

    class Dropped:
        def __del__(self):
            action()

    at_first_call(GuardedDataset, "__getitem__", lambda: Dropped() and None)


BEFORE = {
    "config is read": lambda action: at_first_call(configs, "load_config", action),
    "runner is built": lambda action: at_first_call(engine.Runner, "from_cfg", action),
    "config is formatted": format_config,
    "data are loaded": drop_object,
    "first iteration": lambda action: at_first_call(EncoderDecoder, "loss", action),
    "report is written": lambda action: at_first_call(build, "write", action),
}
"""Moments at which nothing is trained."""


def signal_in_first_iteration(number):
    """Send a signal when an iteration has been trained, which is not yet saved."""
    after = saving.CheckpointHook.after_train_iter

    def replacement(self, runner, *args, **kwargs):
        if runner.iter == 0:
            runner.stop.trained = True
            send(number)()
        after(self, runner, *args, **kwargs)

    saving.CheckpointHook.after_train_iter = replacement


def command(config, work_dir, prepare, *options):
    """Exit codes of the command for a config, and what it writes to standard error."""
    config.dump(work_dir.with_suffix(".py"))

    def run(rank):
        errors = os.open(work_dir.with_suffix(f".{rank}.txt"), os.O_WRONLY | os.O_CREAT)
        os.dup2(errors, 2)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w")
        signals.leave_on_signals()
        prepare(rank)
        sys.exit(
            train.main(
                [str(work_dir.with_suffix(".py")), "--work-dir", str(work_dir), *map(str, options)]
            )
        )

    world = 2 if "pytorch" in options else 1
    codes = tiny.fork(run, world)
    texts = [work_dir.with_suffix(f".{rank}.txt").read_text() for rank in range(world)]
    return codes, texts


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(name, marks=[] if name == "config is formatted" else pytest.mark.slow)
        for name in BEFORE
    ],
)
def test_nothing_is_lost_while_nothing_is_trained(folder, tmp_path, moment):
    config = tiny.segmentation(folder, iterations=2)
    if moment != "report is written":
        config.report = None
    codes, (text,) = command(config, tmp_path / "run", lambda rank: BEFORE[moment](send()))
    assert codes == [PREEMPTED] and "Traceback" not in text
    assert "stopped by SIGTERM while nothing was trained: nothing is lost" in text
    trained = moment == "report is written"
    assert (tmp_path / "run/iter_2.pth").is_file() == trained
    if trained:
        codes, _ = command(config, tmp_path / "run", lambda rank: None, "--resume")
        assert codes == [0] and (tmp_path / "run/report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["gloo starts", *BEFORE])
def test_two_processes_leave_while_nothing_is_trained(folder, tmp_path, moment):
    """Each at its own time; who waits for one that has left gets an error, and then its signal."""
    config = tiny.segmentation(folder, iterations=2)

    def later():
        threading.Timer(1, send()).start()

    def prepare(rank):
        if rank == 0 and moment in ("config is read", "runner is built"):
            # It waits for the other one in a call of C++, for up to half an hour.
            at_first_call(torch.distributed, "init_process_group", later)
        elif rank == 1 and moment == "gloo starts":
            at_first_call(torch.distributed, "init_process_group", send())
        elif rank == 1 and moment != "report is written":
            BEFORE[moment](send())
        else:
            signals.time = SimpleNamespace(sleep=lambda seconds: send()())
            if moment == "gloo starts":
                at_first_call(torch.distributed, "init_process_group", send())
            elif moment == "report is written":
                BEFORE[moment](send())

    codes, texts = command(config, tmp_path / "run", prepare, "--launcher", "pytorch")
    assert codes == [PREEMPTED, 0 if moment == "report is written" else PREEMPTED]
    assert "nothing is lost" in texts[0] and "Traceback" not in texts[1]


@pytest.mark.slow
def test_process_whose_peer_has_left_stops_too(folder, tmp_path):
    """One has trained and waits; the other got the signal before its first iteration ended."""
    config = tiny.segmentation(folder, iterations=4)

    def prepare(rank):
        name = "after_train_iter"
        if rank == 1:
            at_first_call(saving.CheckpointHook, name, lambda: os._exit(PREEMPTED))
        else:
            signal_in_first_iteration(signal.SIGTERM)

    codes, texts = command(config, tmp_path / "run", prepare, "--launcher", "pytorch")
    assert codes == [PREEMPTED] * 2 and "Traceback" not in texts[0]
    log = next((tmp_path / "run").glob("*/*.log")).read_text()
    assert "stopped by SIGTERM, while another process had ended" in log


def test_process_that_waits_in_c_leaves_too():
    """Python's handlers do not run there."""

    def run(rank):
        signals.leave_on_signals()
        library = ctypes.CDLL(None)
        mutex = ctypes.create_string_buffer(64)
        threading.Timer(0.2, send()).start()
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)

    assert tiny.fork(run, timeout=30) == [PREEMPTED]


@pytest.mark.parametrize("again", [False, True])
def test_process_that_has_stopped_may_take_time_to_end(folder, tmp_path, again):
    """Trackers upload what is left, say. Another signal ends it at once, with the same status."""
    config = tiny.segmentation(folder, iterations=4)

    def prepare(rank):
        signals.DELAY = 0.2
        before = runner.Runner.train

        def train_and_linger(self):
            try:
                before(self)
            finally:
                send(signal.SIGUSR1)() if again else time.sleep(1)
                (tmp_path / "end").touch()

        runner.Runner.train = train_and_linger
        signal_in_first_iteration(signal.SIGUSR1)

    codes, (text,) = command(config, tmp_path / "run", prepare)
    assert codes == [PREEMPTED] and text.count("stopped by") == 0
    assert (tmp_path / "end").exists() != again
    log = next((tmp_path / "run").glob("*/*.log")).read_text()
    assert log.count("stopped by SIGUSR1. The last good checkpoint is") == 1


def test_evaluation_may_wrap_what_interrupts_it():
    def evaluate(results):
        try:
            send()()
            raise AssertionError("not interrupted")
        except BaseException as error:
            raise SyntaxError("while it was formatted") from error

    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        stop.trained = True
        assert stop.interruptible(evaluate)([]) == {} and stop.interrupted
        raise KeyboardInterrupt  # else the signal would be sent again


@pytest.mark.parametrize("entry", [["tools/train.py"], ["-m", "mmeformer.commands", "train"]])
def test_handlers_come_before_the_imports(tmp_path, entry):
    """The signal arrives when torch is imported."""
    (tmp_path / "usercustomize.py").write_text("")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            os.kill(os.getpid(), signal.SIGUSR1)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    entry = [str(tools_dir() / "train.py")] if entry[0].endswith(".py") else entry
    done = subprocess.run(
        [sys.executable, *entry, "config.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == PREEMPTED and done.stderr.startswith("stopped by SIGUSR1")


@pytest.mark.slow
def test_signals_at_any_call(folder, tmp_path):
    """At calls of Python functions drawn at random from a whole run: nothing differs in the end."""
    config = tiny.everything("segmentation", folder)
    counted = tmp_path / "calls.txt"

    def run(work_dir, at=None, **kwargs):
        def one(rank):
            calls = 0

            def count(frame, event, argument):
                nonlocal calls
                calls += event == "call"
                if calls == at and event == "call":
                    sys.setprofile(None)
                    send()()

            signals.leave_on_signals()
            sys.setprofile(count)
            tiny.train(config, work_dir, **kwargs)
            sys.setprofile(None)
            counted.write_text(str(calls))

        return tiny.fork(one, timeout=120)

    assert run(tmp_path / "unbroken") == [0]
    total = int(counted.read_text())
    draw = random.Random(total)
    for number in range(10):
        work_dir = tmp_path / str(number)
        at = draw.randrange(1, total)
        assert run(work_dir, at=at) == [PREEMPTED], f"call {at} of {total}"
        assert run(work_dir, resume="auto") == [0]
        tiny.assert_same_state(tmp_path / "unbroken/iter_4.pth", work_dir / "iter_4.pth")


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

    @pytest.mark.parametrize("ended", [PREEMPTED, 128 + signal.SIGUSR1, 128 + signal.SIGTERM])
    def test_slurm_job_is_requeued(self, tmp_path, ended):
        code, calls = self.run_slurm(tmp_path, [ended], SLURM_JOB_ID="17")
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

    @pytest.mark.slow
    def test_processes_of_dist_train_get_the_signal(self, folder, tmp_path):
        config = tiny.segmentation(folder, iterations=1000)
        config.dump(tmp_path / "config.py")
        process, text = self.run_dist_train(tmp_path), ""
        for line in process.stdout:
            text += line
            if "Iter(train) [   3/" in line:
                process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == PREEMPTED and "stopped by SIGUSR1. The last good" in text
        stopped = int(re.search(r"iter_(\d+)\.pth", named(tmp_path / "run"))[1])
        process = self.run_dist_train(
            tmp_path, "--resume", "--cfg-options", f"train_cfg.max_iters={stopped + 1}"
        )
        text = process.communicate(timeout=120)[0]
        assert process.returncode == 0 and f"Iter(train) [{stopped + 1}/{stopped + 1}]" in text
        assert named(tmp_path / "run") == f"iter_{stopped + 1}.pth"

    def run_dist_train(self, tmp_path, *arguments):
        return subprocess.Popen(
            [
                *(tools_dir() / "dist_train.sh", tmp_path / "config.py", "2"),
                *("--work-dir", tmp_path / "run", *arguments),
            ],
            env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


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
        "from mmeformer.training.preemption import ignoring_signals\n"
        "loader = DataLoader(range(4), num_workers=2, persistent_workers=True,\n"
        "                    worker_init_fn=ignoring_signals(None))\n"
        "print([int(item) for item in loader])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1, 2, 3]\n", "")
