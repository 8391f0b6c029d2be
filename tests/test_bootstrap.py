# SPDX-License-Identifier: Apache-2.0
"""The installer: what it decides, what it leaves behind, and how it fails."""

import ast
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import load_script

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "bootstrap.py"


bootstrap = load_script(SCRIPT)


def program(folder: Path, name: str, text: str) -> Path:
    """A shell script on its own folder's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{textwrap.dedent(text)}")
    path.chmod(0o755)
    return path


@pytest.fixture
def folder(tmp_path):
    """Path of a virtual environment without pip."""
    folder = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return str(folder)


@pytest.fixture
def fake_pip(folder, monkeypatch):
    """What the environment is asked to run, in vain; ``failing[i]`` is the log of a failed call."""
    calls, failing = [], {}

    def run(place, *arguments, **options):
        assert place == folder
        calls.append(arguments)
        if len(calls) - 1 in failing:
            with open(Path(folder, "install.log"), "a") as log:
                log.write(failing[len(calls) - 1])
            return subprocess.CompletedProcess(arguments, 1, b"2 problem(s)")
        return subprocess.CompletedProcess(arguments, 0, b"")

    monkeypatch.setattr(bootstrap, "run", run)
    monkeypatch.setattr(bootstrap, "has_gpu", lambda: True)
    return SimpleNamespace(calls=calls, failing=failing)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The only folder in which programs are found."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return tmp_path / "bin"


# --- interpreters ---------------------------------------------------------------------------------


def test_old_interpreters_can_parse_the_script():
    assert ast.parse(SCRIPT.read_text(), feature_version=(3, 6)).body


def test_range_of_pythons_is_that_of_the_package():
    declared = re.search(r'python_requires="([^"]+)"', (ROOT / "setup.py").read_text()).group(1)
    oldest, newest = bootstrap.OLDEST, bootstrap.NEWEST
    assert declared == f">={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"
    versions = ([], (3, 9), (3, 10), (3, 14, 7), (3, 15))
    assert [bootstrap.in_range(v) for v in versions] == [False, False, True, True, False]
    assert {f"python3.{minor}" for minor in range(10, 15)} == set(bootstrap.INTERPRETERS)


@pytest.mark.parametrize("place", ["bin", "pyenv/versions/3.10.4/bin"])
def test_interpreter_that_only_pretends_is_passed_over(tmp_path, path, place):
    program(path, "python3.11", "echo 'command not found' >&2; exit 127\n")
    program(path, "python3.12", "echo 3 9 2\n")
    good = program(tmp_path / place, "python3.10", "echo 3 10 4\n")
    assert bootstrap.other_interpreter() == str(good)


def test_no_interpreter_in_range(path):
    with pytest.raises(
        bootstrap.Failure, match=r"needs Python 3\.10 to 3\.14.*(?s:.)*make PYTHON="
    ) as caught:
        bootstrap.other_interpreter()
    assert sys.version.split()[0] in str(caught.value)


def test_script_hands_over_to_an_interpreter_in_range(path, monkeypatch):
    other = program(path, "python3.11", "echo 3 11 0\n")
    handed = []
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 15, 0))
    monkeypatch.setattr(bootstrap.sys, "argv", [str(SCRIPT), "folder"])

    def execv(path, arguments):
        handed.append([path, *arguments])
        raise bootstrap.Failure("handed over")

    monkeypatch.setattr(bootstrap.os, "execv", execv)
    with pytest.raises(bootstrap.Failure, match="handed over"):
        bootstrap.bootstrap("folder")
    assert handed == [[str(other), str(other), str(SCRIPT), "folder"]]


# --- state of the environment ---------------------------------------------------------------------


def test_something_else_at_the_place_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(bootstrap.Failure, match="not a virtual environment"):
        bootstrap.make_environment(str(tmp_path))
    assert (tmp_path / "thesis.tex").exists()


def test_usable_environment_is_kept(folder):
    mine = Path(folder, "mine")
    mine.write_text("")
    bootstrap.make_environment(folder)
    assert mine.exists()


@pytest.fixture
def bare(monkeypatch):
    """Environments are made without pip, whose unpacking takes seconds."""
    run = subprocess.run

    def without_pip(command, **options):
        assert command[1:3] == ["-m", "venv"] or "-c" in command
        more = ["--without-pip"] if "venv" in command else []
        return run([*command[:3], *more, *command[3:]], **options)

    monkeypatch.setattr(bootstrap.subprocess, "run", without_pip)


@pytest.mark.parametrize("answer", ["exit 1", "echo 3 15 0", "echo 3 9 1"])
def test_environment_without_a_usable_python_is_made_again(folder, answer, bare):
    python = Path(bootstrap.python_of(folder))
    python.unlink()
    program(python.parent, "python", answer + "\n")
    bootstrap.make_environment(folder)
    assert bootstrap.python_version(str(python)) == list(sys.version_info[:3])


def test_environment_without_python_is_made_again_with_pip(folder):
    python = Path(bootstrap.python_of(folder))
    python.unlink()
    bootstrap.make_environment(folder)
    assert bootstrap.python_version(str(python)) == list(sys.version_info[:3])
    # pip was not there before.
    assert list(Path(folder).glob("lib/python3*/site-packages/pip/__init__.py"))


def test_copied_environment_is_made_again(tmp_path, folder, bare):
    Path(folder, bootstrap.STAMP).write_text(json.dumps(bootstrap.state(folder)))
    copy = str(tmp_path / "copy")
    shutil.copytree(folder, copy, symlinks=True)
    assert bootstrap.recorded(copy) != bootstrap.state(copy)
    bootstrap.make_environment(copy)
    assert not Path(copy, bootstrap.STAMP).exists()


def test_missing_venv_module(tmp_path, monkeypatch):
    python = program(tmp_path, "python", "echo 'ensurepip is not available'; exit 1\n")
    monkeypatch.setattr(bootstrap.sys, "executable", str(python))
    command = rf"apt install python3\.{sys.version_info[1]}-venv"
    with pytest.raises(bootstrap.Failure, match=command):
        bootstrap.make_environment(str(tmp_path / "new"))


def test_half_unpacked_packages_are_installed_again(folder):
    packages = Path(folder, f"lib/python3.{sys.version_info[1]}/site-packages")
    for name, files in {"whole-1": ["METADATA", "INSTALLER"], "half-1": ["METADATA"]}.items():
        (packages / f"{name}.dist-info").mkdir()
        for file in files:
            (packages / f"{name}.dist-info" / file).write_text("")
    bootstrap.drop_incomplete(folder)
    assert [path.name for path in packages.glob("*.dist-info")] == ["whole-1.dist-info"]


def test_callers_python_settings_do_not_lead_out(folder, monkeypatch):
    for name in ("PYTHONPATH", "PIP_TARGET", "PIP_USER"):
        monkeypatch.setenv(name, "elsewhere")
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    reply = bootstrap.run(folder, "-c", code, stdout=subprocess.PIPE)
    seen = json.loads(reply.stdout)
    assert not {"PYTHONPATH", "PIP_TARGET", "PIP_USER"} & set(seen)
    assert seen["PYTHONNOUSERSITE"] == "1"


# --- the installation -----------------------------------------------------------------------------


def test_complete_installation_is_not_repeated(folder, fake_pip):
    bootstrap.bootstrap(folder)
    assert bootstrap.recorded(folder) == bootstrap.state(folder)
    pip, torch, rest, doctor = fake_pip.calls
    assert pip[-1].startswith("pip==") and torch[-2].startswith("torch==")
    assert rest[-5:] == ("--no-deps", "-r", "constraints.txt", "-e", ".")
    assert doctor == ("-m", "mmeformer.doctor")
    bootstrap.bootstrap(folder)
    assert len(fake_pip.calls) == 4


def test_second_installation_waits_for_the_first(folder, fake_pip, capsys):
    with open(SCRIPT) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=bootstrap.bootstrap, args=[folder])
        second.start()
        while "waiting for it to end" not in capsys.readouterr().out:
            assert second.is_alive()
        # What the first one finishes, the second one finds.
        Path(folder, bootstrap.STAMP).write_text(json.dumps(bootstrap.state(folder)))
    second.join(60)
    assert not second.is_alive() and not fake_pip.calls


@pytest.mark.parametrize("failing", range(4))
def test_incomplete_installation_leaves_no_stamp(folder, fake_pip, failing):
    stamp = Path(folder, bootstrap.STAMP)
    stamp.write_text("{}")
    fake_pip.failing[failing] = "ERROR: something new\n"
    with pytest.raises(bootstrap.Failure) as caught:
        bootstrap.install(folder)
    assert len(fake_pip.calls) == failing + 1 and not stamp.exists()
    assert ("2 problem(s)" if failing == 3 else "something new") in str(caught.value)


@pytest.mark.parametrize("name", bootstrap.INPUTS)
def test_stamp_holds_until_an_input_changes(tmp_path, folder, monkeypatch, name):
    root = tmp_path / "checkout"
    (root / "tools").mkdir(parents=True)
    for file in bootstrap.INPUTS:
        shutil.copy(ROOT / file, root / file)
    monkeypatch.setattr(bootstrap, "ROOT", str(root))
    before = bootstrap.state(folder)
    assert bootstrap.state(folder) == before
    (root / name).write_text((root / name).read_text() + "# changed\n")
    assert bootstrap.state(folder) != before


def test_damaged_stamp_counts_for_nothing(folder):
    Path(folder, bootstrap.STAMP).write_text("{")
    assert bootstrap.recorded(folder) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has builds for CUDA")
def test_without_a_gpu_a_cpu_build_is_tried_first(folder, fake_pip, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap, "has_gpu", lambda: False)
    bootstrap.install_torch(folder)
    (only,) = fake_pip.calls
    builds = (bootstrap.pinned("torch"), bootstrap.pinned("torchvision"))
    assert re.fullmatch(r"torch==[\d.]+", builds[0])
    assert only[-2:] == tuple(f"{build}+cpu" for build in builds)
    assert "no CPU build was found" not in capsys.readouterr().out
    fake_pip.failing[1] = f"ERROR: No matching distribution found for {builds[0]}+cpu"
    bootstrap.install_torch(folder)
    assert len(fake_pip.calls) == 3 and fake_pip.calls[2][-2:] == builds
    assert "no CPU build was found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("driver", "found"),
    [
        ("echo 'GPU 0: NVIDIA A (UUID: GPU-1)'", True),
        ("exit 9", False),
        ("echo 'No devices were found'", False),
    ],
)
def test_gpu_is_asked_of_the_driver(path, driver, found):
    program(path, "nvidia-smi", driver + "\n")
    assert bootstrap.has_gpu() == found


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("ProxyError('Cannot connect to proxy.')", "proxy settings"),
        ("Failed to establish a new connection: [Errno -2] Name or service not known", "network"),
        ("SSLError(SSLCertVerificationError(1, 'CERTIFICATE_VERIFY_FAILED'))", "certificate"),
        ("ERROR: No matching distribution found for torch==2.12.1", "not offered"),
    ],
)
def test_known_failures_are_explained(folder, fake_pip, log, message):
    # pip's last words about a network that fails are that nothing was found.
    fake_pip.failing[0] = f"{log}\nERROR: No matching distribution found for x\n"
    with pytest.raises(bootstrap.Failure) as caught:
        bootstrap.pip_install(folder, "x", "x")
    assert message in str(caught.value) and f"{folder}/install.log" in str(caught.value)


@pytest.mark.parametrize(
    "ending", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT]
)
def test_interruption_is_said_in_one_line(tmp_path, ending):
    # A package index that takes connections and never answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        variables = dict(
            os.environ,
            PIP_INDEX_URL=f"http://127.0.0.1:{silent.getsockname()[1]}/",
            PIP_CONFIG_FILE=os.devnull,
            PIP_FIND_LINKS="",
        )
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path / ".venv")],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Where the tests run in the background, their children ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        first = process.stdout.readline()
        if first.startswith("Another installation"):
            first = process.stdout.readline()  # that of the case that runs beside this one
        if not first.startswith("[1/4]"):
            process.kill()
        assert first.startswith("[1/4]")
        with silent.accept()[0]:
            process.send_signal(ending)
            text = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "goes on where it stopped" in text
    assert "Traceback" not in text and not (tmp_path / ".venv" / bootstrap.STAMP).exists()
