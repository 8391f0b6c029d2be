# SPDX-License-Identifier: Apache-2.0
"""The installer: what it decides, what it leaves behind, and how it fails."""

import ast
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "bootstrap.py"


def load_bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bootstrap = load_bootstrap()


def program(folder: Path, name: str, text: str) -> Path:
    """A shell script on its own folder's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{textwrap.dedent(text)}")
    path.chmod(0o755)
    return path


@pytest.fixture
def environment(tmp_path):
    """A virtual environment without pip."""
    folder = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return bootstrap.Environment(str(folder))


@pytest.fixture
def fake_pip(environment, monkeypatch):
    """An environment whose pip installs nothing; ``failing[i]`` is the log of a call that fails."""
    calls, failing = [], {}

    def run(*arguments, **options):
        calls.append(arguments)
        if len(calls) - 1 in failing:
            with open(environment.log, "a") as log:
                log.write(failing[len(calls) - 1])
            return subprocess.CompletedProcess(arguments, 1, b"2 problem(s)")
        return subprocess.CompletedProcess(arguments, 0, b"")

    monkeypatch.setattr(environment, "run", run)
    monkeypatch.setattr(bootstrap, "has_gpu", lambda: True)
    environment.calls, environment.failing = calls, failing
    return environment


# --- interpreters ---------------------------------------------------------------------------------


def test_old_interpreters_can_parse_the_script():
    assert ast.parse(SCRIPT.read_text(), feature_version=(3, 6)).body


def test_range_of_pythons_is_that_of_the_package():
    declared = re.search(r'python_requires="([^"]+)"', (ROOT / "setup.py").read_text()).group(1)
    oldest, newest = bootstrap.OLDEST, bootstrap.NEWEST
    assert declared == f">={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"
    versions = (None, (3, 9), (3, 10), (3, 13, 7), (3, 14))
    assert [bootstrap.in_range(v) for v in versions] == [False, False, True, True, False]
    assert {f"python3.{minor}" for minor in range(10, 14)} == set(bootstrap.INTERPRETERS)


def test_interpreter_that_only_pretends_is_passed_over(tmp_path, monkeypatch):
    program(tmp_path, "python3.11", "echo 'command not found' >&2; exit 127\n")
    program(tmp_path, "python3.12", "echo 3 9 2\n")
    good = program(tmp_path, "python3.10", "echo 3 10 4\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bootstrap.other_interpreter() == str(good)


def test_no_interpreter_in_range(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        bootstrap.Failure, match=r"needs Python 3\.10 to 3\.13.*(?s:.)*make PYTHON="
    ):
        bootstrap.other_interpreter()


def test_script_hands_over_to_an_interpreter_in_range(tmp_path, monkeypatch):
    other = program(tmp_path, "python3.11", "echo 3 11 0\n")
    handed = []
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 14, 0))
    monkeypatch.setattr(bootstrap.sys, "argv", [str(SCRIPT), "folder"])

    def execv(path, arguments):
        handed.append([path, *arguments])
        raise bootstrap.Failure("handed over")

    monkeypatch.setattr(bootstrap.os, "execv", execv)
    with pytest.raises(bootstrap.Failure, match="handed over"):
        bootstrap.run("folder")
    assert handed == [[str(other), str(other), str(SCRIPT), "folder"]]


# --- state of the environment ---------------------------------------------------------------------


def test_something_else_at_the_place_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(bootstrap.Failure, match="not a virtual environment"):
        bootstrap.Environment(str(tmp_path)).make()
    assert (tmp_path / "thesis.tex").exists()


def test_usable_environment_is_kept(environment):
    mine = Path(environment.folder, "mine")
    mine.write_text("")
    environment.make()
    assert mine.exists()


@pytest.mark.parametrize("answer", [None, "exit 1", "echo 3 14 0", "echo 3 9 1"])
def test_environment_without_a_usable_python_is_made_again(environment, answer):
    python = Path(environment.python)
    python.unlink()
    if answer:
        program(python.parent, "python", answer + "\n")
    environment.make()
    assert bootstrap.python_version(str(python)) == sys.version_info[:3]
    assert environment.run("-m", "pip", "--version", stdout=subprocess.PIPE).returncode == 0


def test_copied_environment_is_made_again(tmp_path, environment):
    Path(environment.stamp).write_text(json.dumps(environment.state()))
    shutil.copytree(environment.folder, tmp_path / "copy", symlinks=True)
    copy = bootstrap.Environment(str(tmp_path / "copy"))
    assert copy.recorded() != copy.state()
    copy.make()
    assert not Path(copy.stamp).exists()


def test_missing_venv_module(tmp_path, monkeypatch):
    python = program(tmp_path, "python", "echo 'ensurepip is not available'; exit 1\n")
    monkeypatch.setattr(bootstrap.sys, "executable", str(python))
    with pytest.raises(bootstrap.Failure, match=r"(?s)ensurepip.*apt install python3\.\d+-venv"):
        bootstrap.Environment(str(tmp_path / "new")).make()


def test_half_unpacked_packages_are_installed_again(environment):
    packages = Path(environment.folder, f"lib/python3.{sys.version_info[1]}/site-packages")
    for name, files in {"whole-1": ["METADATA", "INSTALLER"], "half-1": ["METADATA"]}.items():
        (packages / f"{name}.dist-info").mkdir()
        for file in files:
            (packages / f"{name}.dist-info" / file).write_text("")
    environment.drop_incomplete()
    assert [path.name for path in packages.glob("*.dist-info")] == ["whole-1.dist-info"]


def test_callers_python_settings_do_not_lead_out(environment, monkeypatch):
    for name in ("PYTHONPATH", "PIP_TARGET", "PIP_USER"):
        monkeypatch.setenv(name, "elsewhere")
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    reply = environment.run("-c", code, stdout=subprocess.PIPE)
    seen = json.loads(reply.stdout)
    assert not {"PYTHONPATH", "PIP_TARGET", "PIP_USER"} & set(seen)
    assert seen["PYTHONNOUSERSITE"] == "1"


# --- the installation -----------------------------------------------------------------------------


def test_complete_installation_is_not_repeated(fake_pip, monkeypatch):
    fake_pip.install()
    assert fake_pip.recorded() == fake_pip.state()
    pip, torch, rest, doctor = fake_pip.calls
    assert pip[-1].startswith("pip==") and torch[-2:] == ("torch", "torchvision")
    assert rest[-5:] == ("--no-deps", "-r", "constraints.txt", "-e", ".")
    assert doctor == ("-m", "mmeformer.doctor")
    monkeypatch.setattr(bootstrap, "Environment", lambda folder: fake_pip)
    bootstrap.run(fake_pip.folder)
    assert len(fake_pip.calls) == 4


@pytest.mark.parametrize("failing", range(4))
def test_incomplete_installation_leaves_no_stamp(fake_pip, failing):
    Path(fake_pip.stamp).write_text("{}")
    fake_pip.failing[failing] = "ERROR: something new\n"
    with pytest.raises(bootstrap.Failure) as caught:
        fake_pip.install()
    assert len(fake_pip.calls) == failing + 1 and not Path(fake_pip.stamp).exists()
    assert ("2 problem(s)" if failing == 3 else "something new") in str(caught.value)


@pytest.mark.parametrize(
    "name", ["constraints.txt", "setup.py", "pyproject.toml", "tools/bootstrap.py"]
)
def test_stamp_holds_until_an_input_changes(tmp_path, environment, monkeypatch, name):
    root = tmp_path / "checkout"
    (root / "tools").mkdir(parents=True)
    for file in ("constraints.txt", "setup.py", "pyproject.toml", "tools/bootstrap.py"):
        shutil.copy(ROOT / file, root / file)
    monkeypatch.setattr(bootstrap, "ROOT", str(root))
    before = environment.state()
    assert environment.state() == before
    (root / name).write_text((root / name).read_text() + "# changed\n")
    assert environment.state() != before


def test_damaged_stamp_counts_for_nothing(environment):
    Path(environment.stamp).write_text("{")
    assert environment.recorded() == {}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has builds for CUDA")
def test_without_a_gpu_a_cpu_build_is_tried_first(fake_pip, monkeypatch):
    monkeypatch.setattr(bootstrap, "has_gpu", lambda: False)
    fake_pip.install_torch()
    (only,) = fake_pip.calls
    version = bootstrap.pinned("torch")
    assert f"torch=={version}+cpu" in only and re.fullmatch(r"[\d.]+", version)
    fake_pip.failing[1] = "ERROR: No matching distribution found for torch==2.12.1+cpu"
    fake_pip.install_torch()
    assert len(fake_pip.calls) == 3 and fake_pip.calls[2][-2:] == ("torch", "torchvision")


@pytest.mark.parametrize(
    ("driver", "found"),
    [
        ("echo 'GPU 0: NVIDIA A (UUID: GPU-1)'", True),
        ("exit 9", False),
        ("echo 'No devices were found'", False),
    ],
)
def test_gpu_is_asked_of_the_driver(tmp_path, monkeypatch, driver, found):
    program(tmp_path, "nvidia-smi", driver + "\n")
    monkeypatch.setenv("PATH", str(tmp_path))
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
def test_known_failures_are_explained(fake_pip, log, message):
    # pip's last words about a network that fails are that nothing was found.
    fake_pip.failing[0] = f"{log}\nERROR: No matching distribution found for x\n"
    with pytest.raises(bootstrap.Failure) as caught:
        fake_pip.must("x", "x")
    assert message in str(caught.value) and fake_pip.log in str(caught.value)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
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
        assert process.stdout.readline().startswith("[1/4]")
        with silent.accept()[0]:
            process.send_signal(ending)
            text = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "goes on where it stopped" in text
    assert "Traceback" not in text and not (tmp_path / ".venv" / bootstrap.STAMP).exists()
