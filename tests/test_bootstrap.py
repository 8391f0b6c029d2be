# SPDX-License-Identifier: Apache-2.0
"""The installer: what it decides, what it leaves behind, and how it fails."""

import ast
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
import zipfile
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
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mmeformer"


@pytest.fixture(scope="module")
def plain_venv(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    return path


@pytest.fixture
def checkout(tmp_path, plain_venv):
    """A folder with all files that the stamp depends on, and the path of a usable environment."""
    root = tmp_path / "checkout"
    (root / "tools").mkdir(parents=True)
    for name in ("constraints.txt", "setup.py", "pyproject.toml", "tools/bootstrap.py"):
        shutil.copy(ROOT / name, root / name)
    (plain_venv / bootstrap.STAMP).unlink(missing_ok=True)
    return root, str(plain_venv)


# --- versions and interpreters --------------------------------------------------------------------


def test_old_interpreters_can_parse_the_script():
    assert ast.parse(SCRIPT.read_text(), feature_version=(3, 6)).body


def test_range_of_pythons_is_that_of_the_package():
    declared = re.search(r'python_requires="([^"]+)"', (ROOT / "setup.py").read_text()).group(1)
    oldest, newest = bootstrap.OLDEST, bootstrap.NEWEST
    assert declared == f">={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"
    assert [bootstrap.in_range(v) for v in ((3, 9), (3, 10), (3, 12, 7), (3, 13))] == [
        False,
        True,
        True,
        False,
    ]
    assert {f"python3.{minor}" for minor in (10, 11, 12)} == set(bootstrap.INTERPRETERS)


def test_extras_are_those_of_the_package():
    source = (ROOT / "setup.py").read_text()
    extras = re.findall(r'^    "(\w+)": ', source[source.index("EXTRAS") :], re.MULTILINE)
    assert bootstrap.EXTRAS.split(",") == extras


def test_pins_hold_what_is_installed_by_name():
    pins = bootstrap.read_pins(ROOT / "constraints.txt")
    wanted = "pip setuptools wheel ninja torch torchvision onedl-mmcv opencv-python-headless"
    assert set(wanted.split()) <= set(pins)
    assert pins["opencv-python"] == pins["opencv-python-headless"]


def test_pins_leave_out_lines_with_conditions(tmp_path):
    path = tmp_path / "constraints.txt"
    path.write_text('# a==1\nb==2\nc==3; python_version < "3.11"\nd>=4\n')
    assert bootstrap.read_pins(path) == {"b": "2"}


def test_interpreter_that_only_pretends_is_passed_over(tmp_path, monkeypatch):
    program(tmp_path, "python3.11", "echo 'command not found' >&2; exit 127\n")
    program(tmp_path, "python3.12", "echo 3 9 2\n")
    good = program(tmp_path, "python3.10", "echo 3 10 4\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bootstrap.other_interpreter() == str(good)


def test_no_interpreter_in_range(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        bootstrap.Failure, match=r"needs Python 3\.10 to 3\.12.*(?s:.)*make PYTHON="
    ):
        bootstrap.other_interpreter()


def test_script_hands_over_to_an_interpreter_in_range(tmp_path, monkeypatch):
    other = program(tmp_path, "python3.11", "echo 3 11 0\n")
    handed = []
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 14, 0))

    def execv(path, arguments):
        handed.append([path, *arguments])
        raise bootstrap.Failure("handed over")

    monkeypatch.setattr(bootstrap.os, "execv", execv)
    with pytest.raises(bootstrap.Failure, match="handed over"):
        bootstrap.run()
    assert handed == [[str(other), str(other), str(SCRIPT)]]


# --- state of the environment ---------------------------------------------------------------------


def test_missing_and_usable_environments(tmp_path, plain_venv):
    assert bootstrap.venv_state(str(tmp_path / "none")) == "missing"
    (tmp_path / "empty").mkdir()
    assert bootstrap.venv_state(str(tmp_path / "empty")) == "missing"
    assert bootstrap.venv_state(str(plain_venv)) == "usable"


def test_something_else_at_the_place_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(bootstrap.Failure, match="no virtual environment"):
        bootstrap.venv_state(str(tmp_path))


def test_copied_environment_is_made_anew(tmp_path, plain_venv):
    shutil.copytree(plain_venv, tmp_path / ".venv", symlinks=True)
    assert bootstrap.venv_state(str(tmp_path / ".venv")) == "broken"


@pytest.mark.parametrize("answer", ["exit 1", "echo 3 13 0", "echo 3 9 1"])
def test_environment_with_an_unusable_python_is_made_anew(tmp_path, plain_venv, answer):
    venv = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    assert bootstrap.venv_state(str(venv)) == "usable"
    (venv / "bin" / "python").unlink()
    program(venv / "bin", "python", answer + "\n")
    assert bootstrap.venv_state(str(venv)) == "broken"


def test_environment_without_pip_is_completed(tmp_path):
    venv = str(tmp_path / ".venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = bootstrap.make_venv(sys.executable, venv)
    assert "pip" in bootstrap.output_of([python, "-m", "pip", "--version"])


def test_broken_environment_is_replaced_on_the_spot(tmp_path):
    venv = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (venv / "bin" / "python").unlink()
    python = bootstrap.make_venv(sys.executable, str(venv))
    assert bootstrap.venv_state(str(venv)) == "usable"
    assert "pip" in bootstrap.output_of([python, "-m", "pip", "--version"])


def test_missing_venv_module(tmp_path):
    python = program(tmp_path, "python", "case $2 in *ensurepip*) exit 1;; esac\necho 3 11 2\n")
    with pytest.raises(bootstrap.Failure, match=r"apt install python3\.11-venv"):
        bootstrap.check_venv_modules(str(python))
    bootstrap.check_venv_modules(sys.executable)


def test_stamp_holds_until_an_input_changes(checkout):
    root, venv = checkout
    assert not bootstrap.up_to_date(root, venv, "")
    bootstrap.write_stamp(root, venv, "")
    assert bootstrap.up_to_date(root, venv, "")
    for name in ("constraints.txt", "setup.py", "pyproject.toml", "tools/bootstrap.py"):
        before = (root / name).read_text()
        (root / name).write_text(before + "# changed\n")
        assert not bootstrap.up_to_date(root, venv, ""), name
        (root / name).write_text(before)
    assert bootstrap.up_to_date(root, venv, "")


def test_stamp_is_bound_to_place_and_interpreter(checkout, monkeypatch):
    root, venv = checkout
    here = bootstrap.fingerprint(root, venv)
    assert bootstrap.fingerprint(root, venv + "/../.venv") != here
    monkeypatch.setattr(bootstrap, "python_version", lambda python: (3, 11, 99))
    assert bootstrap.fingerprint(root, venv) != here


def test_stamp_knows_the_gpu(checkout):
    root, venv = checkout
    bootstrap.write_stamp(root, venv, "8.6 nvcc 13.0")
    assert bootstrap.up_to_date(root, venv, "8.6 nvcc 13.0")
    assert bootstrap.up_to_date(root, venv, ""), "a login node without a GPU"
    assert not bootstrap.up_to_date(root, venv, "9.0 nvcc 13.0")
    bootstrap.write_stamp(root, venv, "")
    assert not bootstrap.up_to_date(root, venv, "8.6 nvcc 13.0"), "nvcc came later"


def test_damaged_stamp_counts_for_nothing(checkout):
    root, venv = checkout
    bootstrap.write_stamp(root, venv, "")
    Path(venv, bootstrap.STAMP).write_text("{")
    assert not bootstrap.up_to_date(root, venv, "")


STEPS = ["make_venv", "pip_install", "install_operators", "check"]


@pytest.mark.parametrize("broken", [None, *STEPS])
def test_incomplete_installation_leaves_no_stamp(checkout, cache, monkeypatch, broken):
    root, venv = checkout
    bootstrap.write_stamp(root, venv, "")
    done = []

    def step(name, result=None):
        def run(*arguments):
            if name == broken:
                raise bootstrap.Failure(name)
            done.append((name, arguments))
            return result

        return run

    monkeypatch.setattr(bootstrap, "check_compiler", lambda python: None)
    for name in STEPS:
        result = bootstrap.venv_python(venv) if name == "make_venv" else None
        monkeypatch.setattr(bootstrap, name, step(name, result))
    if broken:
        with pytest.raises(bootstrap.Failure, match=broken):
            bootstrap.install(sys.executable, root, venv, (), None)
        assert not bootstrap.up_to_date(root, venv, "")
    else:
        bootstrap.install(sys.executable, root, venv, (), None)
        assert bootstrap.up_to_date(root, venv, "")
        order = [name for name, _ in done]
        # The operators compile against torch, and what requires mmcv must find it there.
        assert order[:4] == ["make_venv", "pip_install", "pip_install", "install_operators"]
        assert order[4:] == ["pip_install"] * 3 + ["check"]
        assert done[2][1][3] == ["torch", "torchvision"]


def test_pip_is_kept_inside_the_environment(monkeypatch):
    for name in ("PYTHONPATH", "PIP_TARGET", "PIP_USER"):
        monkeypatch.setenv(name, "elsewhere")
    environment = bootstrap.clean_environment("/some/.venv")
    assert not {"PYTHONPATH", "PIP_TARGET", "PIP_USER"} & set(environment)
    assert environment["PATH"].startswith("/some/.venv/bin:")


# --- the GPU --------------------------------------------------------------------------------------


def test_gpus_and_toolkit_are_found(tmp_path, monkeypatch):
    toolkit = tmp_path / "cuda-13.0"
    real = program(
        toolkit / "bin",
        "nvcc",
        f"""\
        case $1 in
        --version) echo 'Cuda compilation tools, release 13.0, V13.0.88';;
        --dryrun) echo '#$ _SPACE_= ' >&2; echo '#$ TOP={toolkit}/bin/..' >&2;;
        esac
        """,
    )
    path = tmp_path / "path"
    program(path, "nvcc", f'exec {real} "$@"\n')
    program(
        path,
        "nvidia-smi",
        """\
        case $1 in
        -L) echo 'GPU 0: NVIDIA A (UUID: GPU-1)'; echo 'GPU 1: NVIDIA B (UUID: GPU-2)';;
        *) echo 9.0; echo 12.0; echo 9.0;;
        esac
        """,
    )
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{path}:/usr/bin:/bin")
    assert bootstrap.gpu_archs() == ("9.0", "12.0")
    # The folder is the toolkit's own, not that of the wrapper on PATH.
    assert bootstrap.find_nvcc() == (str(toolkit.resolve()), "13.0")
    assert bootstrap.describe_hardware(bootstrap.gpu_archs(), bootstrap.find_nvcc()) == (
        "9.0 12.0 nvcc 13.0"
    )


@pytest.mark.parametrize(
    "driver", ["exit 9", "echo 'NVIDIA-SMI has failed'", "echo 'No devices were found'"]
)
def test_driver_without_a_gpu(tmp_path, monkeypatch, driver):
    program(tmp_path, "nvidia-smi", driver + "\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bootstrap.gpu_archs() == ()


def test_toolkit_alone_is_no_reason_to_build_for_cuda():
    assert bootstrap.describe_hardware((), ("/cuda", "13.0")) == ""
    assert bootstrap.plan_cuda((), ("/cuda", "13.0"), "13.0") == (None, None)


def test_gpu_and_fitting_toolkit():
    plan, warning = bootstrap.plan_cuda(("8.6",), ("/cuda", "13.1"), "13.0")
    assert plan == bootstrap.Cuda("/cuda", "13.1", ("8.6",))
    assert warning is None


@pytest.mark.parametrize(
    ("nvcc", "torch_cuda", "message"),
    [
        (None, "13.0", "no nvcc.*Install the CUDA toolkit 13.0"),
        (("/cuda", "12.4"), "13.0", "nvcc is of CUDA 12.4 but torch was built with CUDA 13.0"),
        (("/cuda", "13.0"), "", "torch is a CPU build"),
    ],
)
def test_gpu_that_cannot_be_served_is_said(nvcc, torch_cuda, message):
    plan, warning = bootstrap.plan_cuda(("8.6",), nvcc, torch_cuda)
    assert plan is None
    assert re.search(message, warning)


def test_build_environment(monkeypatch, tmp_path):
    headers = tmp_path / "lib/python3.11/site-packages/nvidia/cu13/include"
    headers.mkdir(parents=True)
    monkeypatch.setenv("CPATH", "/some/include")
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setenv("CPPFLAGS", "-I/some/include")
    monkeypatch.delenv("CFLAGS", raising=False)
    cpu = bootstrap.build_environment(str(tmp_path), None)
    assert (cpu["FORCE_CUDA"], cpu["CUDA_VISIBLE_DEVICES"]) == ("0", "")
    assert cpu["CPPFLAGS"] == "-I/some/include -g0" and "CFLAGS" not in cpu
    assert cpu["CPATH"] == "/some/include"
    cuda = bootstrap.Cuda("/cuda", "13.0", ("8.6", "9.0"))
    gpu = bootstrap.build_environment(str(tmp_path), cuda)
    assert gpu["CPATH"] == f"/some/include:{headers}"
    assert (gpu["FORCE_CUDA"], gpu["CUDA_HOME"]) == ("1", "/cuda")
    assert gpu["TORCH_CUDA_ARCH_LIST"] == "8.6;9.0"


def test_jobs_fit_cores_and_memory(monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(bootstrap.os, "sched_getaffinity", lambda pid: range(64), raising=False)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 12 * 2**30 // 4096}
    monkeypatch.setattr(bootstrap.os, "sysconf", pages.get)
    assert bootstrap.job_count(None) == 8
    assert bootstrap.job_count(bootstrap.Cuda("/cuda", "13.0", ("8.6",))) == 4
    monkeypatch.setattr(bootstrap.os, "sched_getaffinity", lambda pid: range(2), raising=False)
    assert bootstrap.job_count(None) == 2
    pages["SC_PHYS_PAGES"] = 2**30 // 4096
    assert bootstrap.job_count(None) == 1
    monkeypatch.setenv("MAX_JOBS", "3")
    assert bootstrap.job_count(None) == 3


# --- the cache of wheels --------------------------------------------------------------------------


def test_key_depends_on_everything_that_a_build_depends_on(monkeypatch):
    cuda = bootstrap.Cuda("/cuda", "13.0", ("8.6", "9.0"))
    base = ("2.3.6", "2.12.1+cu130", (3, 11, 7), cuda)
    others = [
        ("2.3.7", *base[1:]),
        (base[0], "2.12.1+cpu", *base[2:]),
        (*base[:2], (3, 12, 1), cuda),
        (*base[:3], None),
        (*base[:3], cuda._replace(version="12.8")),
        (*base[:3], cuda._replace(archs=("8.6",))),
    ]
    keys = [bootstrap.wheel_key(*arguments) for arguments in [base, *others]]
    monkeypatch.setattr(bootstrap.platform, "machine", lambda: "aarch64")
    keys.append(bootstrap.wheel_key(*base))
    monkeypatch.undo()
    monkeypatch.setattr(bootstrap.platform, "libc_ver", lambda: ("glibc", "2.17"))
    keys.append(bootstrap.wheel_key(*base))
    assert len(set(keys)) == len(keys)
    assert all("/" not in key for key in keys)
    # The toolkit's folder and Python's patch level do not matter.
    monkeypatch.undo()
    moved = cuda._replace(home="/other/cuda")
    assert bootstrap.wheel_key(*base[:2], (3, 11, 2), moved) == keys[0]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bootstrap.cache_root() == str(tmp_path / "mmeformer")
    monkeypatch.setenv("HOME", str(tmp_path))
    for unusable in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert bootstrap.cache_root() == str(tmp_path / ".cache" / "mmeformer")


def make_wheel(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            archive.writestr(name, "content " * 100)
    return path


OPERATORS = "mmcv/_ext.cpython-311-x86_64-linux-gnu.so"


def test_sound_cache_entry(tmp_path):
    assert bootstrap.cached_wheel(str(tmp_path / "none")) is None
    wheel = make_wheel(tmp_path / "key" / "onedl_mmcv.whl", "mmcv/__init__.py", OPERATORS)
    assert bootstrap.cached_wheel(str(wheel.parent)) == str(wheel)


@pytest.mark.parametrize("harm", ["no operators", "empty folder", "cut short", "bits flipped"])
def test_damaged_cache_entry_is_removed(tmp_path, harm):
    names = ["mmcv/__init__.py"] + ([] if harm == "no operators" else [OPERATORS])
    wheel = make_wheel(tmp_path / "key" / "onedl_mmcv.whl", *names)
    content = wheel.read_bytes()
    if harm == "empty folder":
        wheel.unlink()
    elif harm == "cut short":
        wheel.write_bytes(content[: len(content) // 2])
    elif harm == "bits flipped":
        wheel.write_bytes(content.replace(b"content content", b"content c0ntent", 1))
    assert bootstrap.cached_wheel(str(wheel.parent)) is None
    assert not wheel.parent.exists()


def test_knows_whether_anything_was_compiled_before(tmp_path):
    asked = (str(tmp_path), "2.3.6", "2.12.1", (3, 11, 7))
    assert not bootstrap.ever_compiled(str(tmp_path / "none"), *asked[1:])
    (tmp_path / bootstrap.wheel_key("2.3.6", "2.12.1+cu130", (3, 12), None)).mkdir()
    assert not bootstrap.ever_compiled(*asked)
    (tmp_path / bootstrap.wheel_key("2.3.6", "2.12.1+cu130", (3, 11), None)).mkdir()
    assert bootstrap.ever_compiled(*asked)


def source_package(folder: Path, body: str) -> str:
    """A stand-in for mmcv's source package, whose setup.py runs ``body`` before ``setup()``."""
    (folder / "mmcv").mkdir(parents=True)
    (folder / "mmcv" / "__init__.py").write_text("")
    (folder / "setup.py").write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        "from setuptools import Extension, setup\nextensions = []\n"
        "if 'bdist_wheel' in sys.argv:\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
        + "\nsetup(name='onedl-mmcv', version='2.3.6', packages=['mmcv'],\n"
        "      package_data={'mmcv': ['*.so']}, ext_modules=extensions)\n"
    )
    return str(folder)


COMPILES = f"""
print('built for cuda:', os.environ['FORCE_CUDA'], flush=True)
for number in range(1, 4):
    print(f'[{{number}}/3] c++ -c file{{number}}.cpp', flush=True)
Path('{OPERATORS}').write_bytes(b'operators')
"""


@pytest.fixture
def build(tmp_path):
    """Build a stand-in through the real pip; returns (folder, log) and a function that does it."""
    folder, log = tmp_path / "wheels" / "key", tmp_path / "build.log"

    def run(body):
        requirement = source_package(tmp_path / "source", body)
        return bootstrap.build_wheel(
            sys.executable, sys.prefix, requirement, str(folder), None, str(log)
        )

    return folder, log, run


def test_build_fills_the_cache_and_shows_progress(build, capsys):
    folder, log, run = build
    folder.parent.mkdir()
    (folder.parent / ".building-killed").mkdir()
    wheel = run(COMPILES)
    assert bootstrap.cached_wheel(str(folder)) == wheel
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert os.listdir(folder.parent) == ["key"], "temporary folders must go, older ones too"
    text = log.read_text()
    assert "[3/3] c++ -c file3.cpp" in text
    assert "built for cuda: 0" in text
    assert "preparing" in capsys.readouterr().out


def test_no_wheel_is_taken_from_the_cache_of_pip(tmp_path, monkeypatch):
    # pip would hand out a wheel that was compiled for another torch.
    commands = []
    monkeypatch.setattr(
        bootstrap, "run_with_progress", lambda command, *rest: commands.append(command) or 1
    )
    arguments = ("onedl-mmcv==2.3.6", str(tmp_path / "wheels" / "key"), None, str(tmp_path / "log"))
    with pytest.raises(bootstrap.Failure, match="Compiling the mmcv operators failed"):
        bootstrap.build_wheel(sys.executable, sys.prefix, *arguments)
    assert {"--no-cache-dir", "--no-build-isolation", "--no-deps"} <= set(commands[0])


def test_compiled_code_is_optimised_and_without_debug_symbols(build, monkeypatch):
    monkeypatch.delenv("CFLAGS", raising=False)
    _, log, run = build
    code = "#include <Python.h>\\nPyMODINIT_FUNC PyInit__ext(void) { return NULL; }\\n"
    wheel = run(
        f"Path('ext.c').write_text('{code}')\nextensions = [Extension('mmcv._ext', ['ext.c'])]"
    )
    (compiled,) = re.findall(r"^.* -c ext\.c .*$", log.read_text(), re.MULTILINE)
    assert re.findall(r" -O(\w)", compiled)[-1] in "23"
    assert re.findall(r" -g\d?(?= )", compiled)[-1] == " -g0"
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.startswith("mmcv/_ext")]
        assert b".debug_info" not in archive.read(name)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('mmcv/ops.cpp:1:10: fatal error: Python.h: No such file')\nsys.exit(1)", "-dev"),
        ("print('c++: fatal error: Killed signal terminated program cc1plus')\n1/0", "MAX_JOBS=1"),
        ("print('error: No space left on device')\nsys.exit(1)", "disk is full"),
        ("raise SystemExit('an unheard-of reason')", "an unheard-of reason"),
        ("pass", "holds no compiled operators"),
    ],
)
def test_failed_build_says_why_and_leaves_nothing(build, body, message):
    folder, log, run = build
    with pytest.raises(bootstrap.Failure, match=message) as caught:
        run(body)
    assert str(log) in str(caught.value)
    assert log.read_text()
    assert os.listdir(folder.parent) == []


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


CHILD = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("bootstrap", {str(SCRIPT)!r})
bootstrap = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bootstrap)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_interrupted_build_leaves_neither_wheel_nor_compilers(tmp_path, number):
    told = tmp_path / "compiler.pid"
    source = source_package(
        tmp_path / "source",
        f"Path({str(tmp_path / 'pid.part')!r}).write_text(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'pid.part')!r}, {str(told)!r})\ntime.sleep(600)",
    )
    folder = tmp_path / "wheels" / "key"
    # Under nohup, or in the background of a script, the tests inherit ignored signals.
    code = CHILD + (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        f"bootstrap.run = lambda: bootstrap.build_wheel(sys.executable, sys.prefix, {source!r}, "
        f"{str(folder)!r}, None, {str(tmp_path / 'log')!r})\nsys.exit(bootstrap.main())"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    wait_for(told.exists)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted" in output
    assert os.listdir(folder.parent) == []
    wait_for(lambda: not running(int(told.read_text())))


def test_two_builds_at_once_leave_one_sound_wheel(tmp_path, cache):
    source = source_package(tmp_path / "source", COMPILES)
    code = CHILD + (
        "import shutil\n"
        f"with bootstrap.one_at_a_time({str(cache)!r}):\n"
        f"    folder = {str(cache / 'wheels' / 'key')!r}\n"
        "    wheel = bootstrap.cached_wheel(folder)\n"
        "    print('found' if wheel else 'built')\n"
        "    if not wheel:\n"
        f"        shutil.copytree({source!r}, sys.argv[1])\n"
        "        bootstrap.build_wheel(\n"
        "            sys.executable, sys.prefix, sys.argv[1], folder, None, sys.argv[1] + '.log')\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / f"copy{index}")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(("built" in text, "found" in text) for text in outputs) == [
        (False, True),
        (True, False),
    ]
    assert bootstrap.cached_wheel(str(cache / "wheels" / "key"))


def test_second_installation_waits_and_says_so(tmp_path, cache):
    code = CHILD + (
        f"with bootstrap.one_at_a_time({str(cache)!r}):\n    print('mine', flush=True)\n"
        "    input()\n"
    )

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    first = start()
    assert first.stdout.readline() == "mine\n"
    second = start()
    assert "waiting" in second.stdout.readline()
    # Killed, so that nothing of its own frees the lock.
    first.kill()
    first.communicate()
    assert second.stdout.readline() == "mine\n"
    second.communicate("\n", timeout=30)
    assert second.returncode == 0


def test_wheel_of_another_run_is_taken_where_locks_do_not_work(build, monkeypatch):
    folder, _, run = build
    rename = os.rename

    def too_late(source, target):
        make_wheel(folder / "theirs.whl", OPERATORS)
        rename(source, target)

    monkeypatch.setattr(bootstrap.os, "rename", too_late)
    run(COMPILES)
    assert bootstrap.cached_wheel(str(folder)) == str(folder / "theirs.whl")


# --- progress -------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_estimates_the_rest():
    clock = Clock()
    progress = bootstrap.Progress(io.StringIO(), clock)
    assert progress.text() == "preparing, elapsed 0:00"
    clock.now = 20
    progress.feed("  [2/78] c++ -MMD -MF a.o\n")
    assert progress.text() == "2/78 files, 3%, elapsed 0:20"
    clock.now = 60
    progress.feed("  [10/78] c++ -MMD -MF b.o\n")
    # 8 files took 40 seconds, 68 files are left.
    assert progress.text() == "10/78 files, 13%, elapsed 1:00, about 5:40 left"
    progress.feed("mmcv/ops/a.cpp:3: warning: [1/2] looks alike but is not\n")
    assert progress.done == 10
    progress.feed("  [78/78] c++ -MMD -MF z.o\n")
    assert progress.text() == "78/78 files, linking, elapsed 1:00"


def test_progress_is_sparse_in_a_log_and_lively_on_a_terminal():
    shown = {}
    for stream in (io.StringIO(), Terminal()):
        clock = Clock()
        progress = bootstrap.Progress(stream, clock)
        for second in range(91):
            clock.now = float(second)
            progress.feed(f"[{second + 1}/100] c++\n")
        progress.close()
        shown[stream.isatty()] = stream.getvalue()
    assert shown[False].count("\n") == 4 and "\r" not in shown[False]
    assert shown[True].count("\r") == 92 and "\n" not in shown[True]


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "disk is full"),
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError("
            "[Errno -3] Temporary failure in name resolution)': /simple/torch/\n"
            "ERROR: No matching distribution found for torch",
            "index cannot be reached",
        ),
        ("ERROR: No matching distribution found for torch==2.12.1", "not offered"),
        ("fatal error: 'Python.h' file not found", "python3.11-dev"),
        ("fatal error: Python.h: No such file or directory", "python3.11-dev"),
        ("error: command '/usr/bin/g++' failed: No such file or directory", "no C++ compiler"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]", "certificate"),
        ("g++: fatal error: Killed signal terminated program cc1plus", "MAX_JOBS=1"),
        ("RuntimeError: The detected CUDA version (12.4) mismatches the version", "toolkit"),
    ],
)
def test_known_failures_are_explained(log, message):
    assert message in bootstrap.explain(log, "/here/.venv", (3, 11, 2))


def test_unknown_failure_shows_the_end_of_the_log(tmp_path):
    log = tmp_path / "install.log"
    log.write_text("\n".join(f"line {number}" for number in range(100)))
    text = bootstrap.failure_text("Installing torch failed", str(log), "/v", sys.executable)
    assert text.startswith("Installing torch failed.\n")
    assert "line 99" in text and "line 80" not in text and str(log) in text
    assert bootstrap.explain(log.read_text(), "/v", None) is None


def test_compiler_is_tried_with_the_headers(tmp_path, monkeypatch):
    bootstrap.check_compiler(sys.executable)
    bare = program(
        tmp_path / "bare",
        "python",
        f"case $2 in *sysconfig*) echo {tmp_path};; *) echo 3 11 2;; esac\n",
    )
    with pytest.raises(bootstrap.Failure, match=r"apt install python3\.11-dev"):
        bootstrap.check_compiler(str(bare))
    monkeypatch.setenv("CXX", str(program(tmp_path, "old-c++", "echo unknown standard; exit 1\n")))
    with pytest.raises(bootstrap.Failure, match="cannot compile C(?s:.)*unknown standard"):
        bootstrap.check_compiler(sys.executable)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(bootstrap.Failure, match="apt install g"):
        bootstrap.check_compiler(sys.executable)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(13, "Permission denied", "/read/only"),
            "No permission to write /read/only",
        ),
        (OSError(28, "No space left on device"), "disk is full"),
        (bootstrap.Failure("the way out"), "the way out"),
    ],
)
def test_failures_end_in_a_message_and_status_1(monkeypatch, capsys, error, message):
    def run():
        raise error

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(bootstrap, "run", run)
    try:
        assert bootstrap.main() == 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert message in capsys.readouterr().out


def test_stamp_is_plain_json(checkout):
    root, venv = checkout
    bootstrap.write_stamp(root, venv, "8.6 nvcc 13.0")
    stamp = json.loads(Path(venv, bootstrap.STAMP).read_text())
    assert stamp["hardware"] == "8.6 nvcc 13.0" and len(stamp["fingerprint"]) == 64
    assert not Path(venv, bootstrap.STAMP + ".part").exists()
