# SPDX-License-Identifier: Apache-2.0
"""--gpus: what is started, how it ends, and what signals do. The programs started are doubles."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mmeformer import signals
from mmeformer.commands import cli, test, train
from mmeformer.errors import UserError
from mmeformer.signals import PREEMPTED
from mmeformer.training import launch

NODES = ("WORLD_SIZE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One node, no launcher, no GPU."""
    for name in NODES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(signals, "trained", False)


class TestNeeded:
    @pytest.mark.parametrize(
        ("gpus", "there", "nodes", "expected"),
        [
            (None, 4, "1", False),
            (1, 4, "1", False),
            (1, 0, "1", False),
            (1, 4, "2", True),
            (4, 4, "1", True),
            (2, 4, "1", True),
            (3, 0, "1", True),
        ],
    )
    def test_several_processes(self, monkeypatch, gpus, there, nodes, expected):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
        monkeypatch.setenv("NNODES", nodes)
        assert launch.needed(gpus, "none") is expected

    def test_more_than_there_are(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(UserError, match="--gpus 4, but this machine has 2: use --gpus 2"):
            launch.needed(4, "none")

    @pytest.mark.parametrize("gpus", [1, 2])
    def test_launcher_has_started_this(self, monkeypatch, gpus):
        with pytest.raises(UserError, match=f"--gpus {gpus} starts .* leave out --launcher slurm"):
            launch.needed(gpus, "slurm")
        monkeypatch.setenv("WORLD_SIZE", "8")
        with pytest.raises(UserError, match="one of 8 .* give --launcher pytorch in place"):
            launch.needed(gpus, "none")


class TestStart:
    @pytest.fixture
    def started(self, monkeypatch):
        calls = []
        monkeypatch.setattr(launch, "run", lambda *args: calls.append(args) or 7)
        return calls

    def test_ranks_of_one_node(self, started, capsys):
        assert launch.start(["train", "a.py"], 2) == 7
        assert capsys.readouterr().out == "no GPU: 2 processes on the CPU, over gloo\n"
        ((command, ranks),) = started
        assert command[0] == sys.executable and command[-2:] == ["train", "a.py"]
        assert [(rank["RANK"], rank["LOCAL_RANK"]) for rank in ranks] == [("0", "0"), ("1", "1")]
        assert {rank["WORLD_SIZE"] for rank in ranks} == {"2"}
        assert {rank["MASTER_ADDR"] for rank in ranks} == {"127.0.0.1"}
        assert 1 <= int(ranks[0]["OMP_NUM_THREADS"]) <= max(1, os.cpu_count() // 2)
        launch.start(["train", "a.py"], 2)
        ports = [rank["MASTER_PORT"] for _, ranks in started for rank in ranks]
        assert ports[0] == ports[1] != ports[2] == ports[3]

    def test_ranks_of_the_second_node(self, monkeypatch, started):
        for name, value in dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="first").items():
            monkeypatch.setenv(name, value)
        launch.start(["train"], 4)
        ((_, ranks),) = started
        assert [rank["RANK"] for rank in ranks] == ["4", "5", "6", "7"]
        assert [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1", "2", "3"]
        assert (ranks[0]["WORLD_SIZE"], ranks[0]["MASTER_PORT"]) == ("8", "29500")
        assert ranks[0]["MASTER_ADDR"] == "first"

    @pytest.mark.parametrize(
        ("environment", "message"),
        [
            (dict(NNODES="2"), "NNODES=2 needs MASTER_ADDR"),
            (dict(NNODES="two"), "NNODES=two in the environment must be a whole number"),
            (dict(NNODES="0"), "NNODES=0 must be at least 1"),
            (dict(NNODES="2", NODE_RANK="2", MASTER_ADDR="a"), "NODE_RANK=2 must be below"),
        ],
    )
    def test_nodes_that_are_unclear(self, monkeypatch, started, environment, message):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=message):
            launch.start(["train"], 2)
        assert not started

    @pytest.mark.parametrize(
        ("main", "line", "handed_on"),
        [
            (train.main, "a.py --gpus 2 --amp", "train --launcher pytorch a.py --amp"),
            (train.main, "--gpus=2 a.py --resume", "train --launcher pytorch a.py --resume"),
            (
                train.main,
                "a.py --cfg-options x=1 y=2 --gpu 2",
                "train --launcher pytorch a.py --cfg-options x=1 y=2",
            ),
            (test.main, "a.py b.pth --gpus 2", "test --launcher pytorch a.py b.pth"),
        ],
    )
    def test_command_line_is_handed_on(self, started, main, line, handed_on):
        assert main(line.split()) == 7
        ((command, _),) = started
        assert " ".join(command).endswith(f"main()) {handed_on}")

    def test_imports_are_those_of_this_process(self, started, tmp_path, monkeypatch):
        """A file of the current folder does not take the place of an installed package."""
        (tmp_path / "torch.py").write_text("raise SystemExit(9)")
        monkeypatch.chdir(tmp_path)
        launch.start(["--version"], 1)
        ((command, ranks),) = started
        monkeypatch.undo()
        assert launch.run(command, ranks) == 0

    @pytest.mark.parametrize("number", ["0", "-1", "two", "1.5"])
    def test_number_of_gpus(self, number, capsys):
        with pytest.raises(SystemExit):
            train.main(["a.py", f"--gpus={number}"])
        error = capsys.readouterr().err
        assert f"argument --gpus: {number} must be a whole number from 1 on" in error


def program(tmp_path, text):
    """A program that waits, and writes its rank to `told` when a signal reaches it."""
    path = tmp_path / "program.py"
    path.write_text(
        "import os, signal, sys, time\n"
        "rank = int(os.environ['RANK'])\n"
        "def told(number, frame):\n"
        f"    open(f'{tmp_path}/told-{{rank}}-{{number}}', 'x').close()\n"
        "def ready():\n"
        f"    open(f'{tmp_path}/ready-{{rank}}', 'x').close()\n" + text
    )
    return [sys.executable, "-S", str(path)]


def ranks(count):
    return [dict(RANK=str(rank)) for rank in range(count)]


def wait_for(folder, pattern, count):
    """Wait for files."""
    end = time.monotonic() + 20
    while (found := len(list(folder.glob(pattern)))) < count:
        assert time.monotonic() < end, f"{found} of {count} files {pattern}"
        time.sleep(0.02)


def when_ready(tmp_path, count, *numbers, pause=0.0):
    """Send signals to this process when all programs wait."""

    def send():
        while len(list(tmp_path.glob("ready-*"))) < count:
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause)

    threading.Thread(target=send, daemon=True).start()


class TestRun:
    @pytest.fixture(autouse=True)
    def heeded_signals(self):
        """All of them, also where the tests themselves run under nohup or in the background."""
        before = {number: signal.signal(number, signal.SIG_DFL) for number in launch.FORWARDED}
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    @pytest.mark.parametrize(
        ("codes", "expected"),
        [((0, 0), 0), ((0, 3), 3), ((PREEMPTED, 0), PREEMPTED), ((0, -9), 137), ((0, -15), 143)],
    )
    def test_exit_status(self, tmp_path, codes, expected, capfd):
        command = program(
            tmp_path,
            f"code = {codes}[rank]\nos.kill(os.getpid(), -code) if code < 0 else sys.exit(code)\n",
        )
        assert launch.run(command, ranks(2)) == expected
        killed = "error: process 2 of 2 was ended by SIGKILL; was the memory full?\n"
        assert (capfd.readouterr().err == killed) == (expected == 137)

    @pytest.mark.parametrize("number", launch.FORWARDED)
    def test_signals_reach_all(self, tmp_path, number):
        command = program(
            tmp_path,
            f"signal.signal({int(number)}, lambda *_: (told(*_), sys.exit(175)))\n"
            "ready()\ntime.sleep(60)\n",
        )
        when_ready(tmp_path, 2, number)
        assert launch.run(command, ranks(2)) == PREEMPTED
        assert {path.name for path in tmp_path.glob("told*")} == {
            f"told-{rank}-{int(number)}" for rank in (0, 1)
        }
        assert signal.getsignal(number) is signal.SIG_DFL

    def test_time_to_save(self, tmp_path, monkeypatch):
        """One has left by the signal; the other one saves for longer than after a fault."""
        monkeypatch.setattr(launch, "GRACE", 0.2)
        command = program(
            tmp_path,
            "stop = []\nsignal.signal(signal.SIGTERM, lambda *_: stop.append(1))\nready()\n"
            "while not stop:\n    time.sleep(0.02)\n"
            "time.sleep(1 - rank)\ntold(15, None)\nsys.exit(175)\n",
        )
        when_ready(tmp_path, 2, signal.SIGTERM)
        assert launch.run(command, ranks(2)) == PREEMPTED
        assert len(list(tmp_path.glob("told*"))) == 2

    def test_signal_of_the_system_and_the_launcher_is_one(self, tmp_path):
        command = program(
            tmp_path,
            "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit(175)))\n"
            "ready()\ntime.sleep(60)\n",
        )
        when_ready(tmp_path, 2, signal.SIGTERM, signal.SIGTERM)
        assert launch.run(command, ranks(2)) == PREEMPTED

    def test_second_signal_kills(self, tmp_path, monkeypatch):
        monkeypatch.setattr(signals, "DELAY", 0.2)
        command = program(
            tmp_path,
            "signal.signal(signal.SIGINT, told)\nready()\nwhile True:\n    time.sleep(60)\n",
        )
        when_ready(tmp_path, 2, signal.SIGINT, signal.SIGINT, pause=0.4)
        assert launch.run(command, ranks(2)) == 128 + signal.SIGKILL
        assert len(list(tmp_path.glob("told*"))) == 2

    def test_others_end_after_a_fault(self, tmp_path, monkeypatch):
        """Those that cannot see it are killed, with what they have started."""
        monkeypatch.setattr(launch, "GRACE", 0.2)
        command = program(
            tmp_path,
            "import subprocess\n"
            "if rank == 0:\n    child = subprocess.Popen(['sleep', '60'])\n"
            f"    open('{tmp_path}/child', 'w').write(str(child.pid))\n"
            "    ready()\n    time.sleep(60)\n"
            f"while not os.path.exists('{tmp_path}/ready-0'):\n    time.sleep(0.02)\n"
            "sys.exit(3)\n",
        )
        assert launch.run(command, ranks(2)) == 3
        child = int((tmp_path / "child").read_text())
        end = time.monotonic() + 10
        while is_alive(child) and time.monotonic() < end:
            time.sleep(0.02)
        assert not is_alive(child)

    def test_signal_to_one_process_stops_all(self, tmp_path):
        command = program(
            tmp_path,
            "signal.signal(signal.SIGTERM, lambda *_: (told(*_), sys.exit(175)))\nready()\n"
            f"while len(os.listdir('{tmp_path}')) < 3:\n    time.sleep(0.02)\n"
            "sys.exit(175) if rank == 0 else time.sleep(60)\n",
        )
        assert launch.run(command, ranks(2)) == PREEMPTED
        assert [path.name for path in tmp_path.glob("told*")] == ["told-1-15"]

    @pytest.mark.skipif(sys.platform != "linux", reason="needs prctl(2)")
    def test_processes_of_a_killed_launcher_stop(self, tmp_path):
        entry = launch._ENTRY.format(path=sys.path).split("from mmeformer.commands")[0]
        command = program(
            tmp_path,
            f"{entry}\nsignal.signal(signal.SIGTERM, lambda *_: (told(*_), sys.exit(175)))\n"
            "ready()\ntime.sleep(60)\n",
        )
        code = f"from mmeformer.training import launch; launch.run({command!r}, {ranks(2)!r})"
        launcher = subprocess.Popen([sys.executable, "-c", code])
        wait_for(tmp_path, "ready-*", 2)
        launcher.kill()
        assert launcher.wait() == -signal.SIGKILL
        wait_for(tmp_path, "told-*", 2)
        told = sorted(path.name for path in tmp_path.glob("told-*"))
        assert told == [f"told-{rank}-{int(signal.SIGTERM)}" for rank in range(2)]

    def test_ignored_signals_stay_ignored(self, tmp_path):
        """Under nohup."""
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            command = program(
                tmp_path,
                "ready()\ntime.sleep(1)\n"
                "sys.exit(0 if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else 1)\n",
            )
            when_ready(tmp_path, 1, signal.SIGHUP)
            assert launch.run(command, ranks(1)) == 0
        finally:
            signal.signal(signal.SIGHUP, before)


def is_alive(pid):
    if Path("/proc/self/stat").is_file():
        # Containers often lack ps.
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return done.stdout.strip()[:1] not in ("", "Z")


def test_one_process_tells_its_error(tmp_path, monkeypatch, capsys):
    class Arguments:
        debug = False

    def fail(args):
        raise UserError("no such data")

    monkeypatch.setenv(launch._ERROR_SHOWN, str(tmp_path / "told"))
    assert [cli.run(fail, Arguments) for _ in range(3)] == [1, 1, 1]
    assert capsys.readouterr().err == "error: no such data\n"
    # The launcher is gone, and its folder too.
    monkeypatch.setenv(launch._ERROR_SHOWN, str(tmp_path / "gone/told"))
    assert cli.run(fail, Arguments) == 1
    assert capsys.readouterr().err == "error: no such data\n"
