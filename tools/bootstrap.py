# SPDX-License-Identifier: Apache-2.0
"""Make ``.venv`` ready for work: ``python3 tools/bootstrap.py`` (what ``make install`` runs).

It needs a C++ compiler and the standard library alone, and does nothing when ``.venv`` is already
up to date. The mmcv operators have to be compiled on the user's machine, because they fit one pair
of torch and Python only; the wheel is kept in the user's cache, so that another checkout need not
compile again.

The syntax stays that of Python 3.6, so that a machine with an old ``python3`` gets a message (or
its newer interpreter found) instead of a SyntaxError.
"""

import contextlib
import glob
import hashlib
import json
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import namedtuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
OLDEST, NEWEST = (3, 10), (3, 12)
# The one that the constraints were tested with comes first.
INTERPRETERS = ("python3.11", "python3.12", "python3.10")
EXTRAS = "detection,segmentation,rotated,deploy,dev"
STAMP = "mmeformer-stamp.json"
# What a fresh environment with a CUDA build of torch and pip's downloads took on Linux, rounded up.
NEEDED_GB = 9

Cuda = namedtuple("Cuda", "home version archs")
Cuda.__doc__ = """What operators are compiled for: the toolkit's folder, its version ("13.0") and
the compute capabilities of the GPUs ("8.6", "9.0"), sorted."""

# Known ways to fail, as they read in the logs of pip and the compilers, and the way out.
EXPLANATIONS = (
    (
        r"No space left on device|OSError: \[Errno 28\]|Disk quota exceeded",
        "The disk is full. The environment needs about {gb} GB in {venv}, in pip's cache and in "
        "the temporary folder together; free some space, or set TMPDIR to a folder on a larger "
        "disk.",
    ),
    (
        r"fatal error: '?Python\.h'?",
        "Python's C headers are missing. Debian, Ubuntu: sudo apt install python{python}-dev; "
        "Fedora: sudo dnf install python{python}-devel.",
    ),
    (
        r"Killed signal terminated program|internal compiler error: Killed|cc1plus.*[Kk]illed",
        "The compiler ran out of memory. Close other programs, or compile one file at a time: "
        "MAX_JOBS=1 make install",
    ),
    (
        r"command '?[^' ]*(c\+\+|g\+\+|clang\+\+)[^' ]*'? failed: No such file"
        r"|unable to execute '?[^' ]*(cc|\+\+|clang)",
        "There is no C++ compiler. Debian, Ubuntu: sudo apt install g++; Fedora: sudo dnf install "
        "gcc-c++; macOS: xcode-select --install.",
    ),
    (
        r"detected CUDA version .* mismatches",
        "The CUDA toolkit does not fit the installed torch; see the log for both versions. Put the "
        "matching toolkit's nvcc first on PATH.",
    ),
    (
        r"NewConnectionError|ConnectTimeoutError|ReadTimeoutError|NameResolutionError"
        r"|Temporary failure in name resolution|Name or service not known|Network is unreachable"
        r"|ConnectionResetError|ProxyError|Connection refused",
        "The package index cannot be reached. Check the network and the proxy settings, then run "
        "the same command again: it goes on where it stopped.",
    ),
    (
        r"SSLError|CERTIFICATE_VERIFY_FAILED",
        "The connection to the package index is not trusted (TLS certificate). Behind a company "
        "proxy, name its certificate: pip config set global.cert /path/to/ca.pem",
    ),
    (
        r"No matching distribution found|Could not find a version that satisfies",
        "A pinned version is not offered for this platform and Python, or the package index could "
        "not be read; the log names the package.",
    ),
)


class Failure(Exception):
    """An end of the installation that the user can mend; the text says how."""


def say(text):
    """Print one line at once, also into a pipe."""
    print(text, flush=True)


def in_range(version):
    """Whether a ``(major, minor)`` pair is a Python that the project supports."""
    return OLDEST <= tuple(version[:2]) <= NEWEST


def python_version(python):
    """``(major, minor, micro)`` that the interpreter at a path reports; None if it does not run."""
    try:
        reply = subprocess.run(
            [python, "-c", "import sys; print(*sys.version_info[:3])"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
    except OSError:
        return None
    numbers = reply.stdout.split()
    return tuple(int(number) for number in numbers) if len(numbers) == 3 else None


def other_interpreter():
    """Path of a supported interpreter on PATH.

    A name on PATH proves nothing (version managers put stand-ins there), so each one is run.

    Raises:
        Failure: there is none.
    """
    for name in INTERPRETERS:
        path = shutil.which(name)
        version = python_version(path) if path else None
        if version and in_range(version):
            return path
    raise Failure(
        "mmeformer needs Python {}.{} to {}.{}; {} is {}, and none of {} on PATH runs.\n"
        "Install one of them (Debian, Ubuntu: sudo apt install python3.11 python3.11-venv "
        "python3.11-dev) or name one: make PYTHON=/path/to/python3.11 install".format(
            *OLDEST,
            *NEWEST,
            sys.executable,
            platform.python_version(),
            ", ".join(INTERPRETERS),
        )
    )


def read_pins(path):
    """Map of name to version of the unconditional ``name==version`` lines of a constraints file."""
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()
    matches = (re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)$", line.strip()) for line in lines)
    return {match.group(1): match.group(2) for match in matches if match}


# --- the state of .venv ---------------------------------------------------------------------------


def venv_python(venv):
    """Path of the interpreter inside a virtual environment."""
    return os.path.join(venv, "bin", "python")


def venv_state(venv):
    """One of "missing", "usable" or "broken" (its Python is gone or unsupported, or it was moved).

    Raises:
        Failure: something else lies there, which must not be overwritten.
    """
    if not os.path.lexists(venv) or (os.path.isdir(venv) and not os.listdir(venv)):
        return "missing"
    if not os.path.isfile(os.path.join(venv, "pyvenv.cfg")):
        raise Failure(
            f"{venv} exists and is no virtual environment. Move it away, then run this again."
        )
    version = python_version(venv_python(venv))
    if not version or not in_range(version):
        return "broken"
    try:
        with open(os.path.join(venv, "bin", "activate"), encoding="utf-8") as file:
            homes = re.findall(r"VIRTUAL_ENV=[\"']?(/[^\"'\n]+)", file.read())
    except OSError:
        return "broken"
    # A copied folder still activates the environment that it was copied from.
    moved = os.path.realpath(venv) not in [os.path.realpath(home) for home in homes]
    return "broken" if moved else "usable"


def fingerprint(root, venv):
    """Hash of everything that decides what belongs into an environment, its own place included."""
    digest = hashlib.sha256()
    for name in ("constraints.txt", "setup.py", "pyproject.toml", "tools/bootstrap.py"):
        with open(os.path.join(root, name), "rb") as file:
            digest.update(hashlib.sha256(file.read()).digest())
    python = venv_python(venv)
    digest.update(repr((os.path.realpath(python), python_version(python), venv)).encode("utf-8"))
    return digest.hexdigest()


def up_to_date(root, venv, hardware):
    """Whether the last complete installation still holds.

    Operators that were compiled for a GPU also serve where no GPU is seen (the login node of a
    cluster, say), so only another GPU or toolkit makes the environment stale.
    """
    try:
        with open(os.path.join(venv, STAMP), encoding="utf-8") as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return False
    if hardware and hardware != stamp.get("hardware"):
        return False
    return stamp.get("fingerprint") == fingerprint(root, venv)


def write_stamp(root, venv, hardware):
    """Record a complete installation; written last and under a temporary name first."""
    path = os.path.join(venv, STAMP)
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump({"fingerprint": fingerprint(root, venv), "hardware": hardware}, file)
    os.replace(path + ".part", path)


def clean_environment(venv):
    """This process's environment without what would lead pip or Python out of ``venv``."""
    strangers = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
    environment = {key: value for key, value in os.environ.items() if key not in strangers}
    environment["VIRTUAL_ENV"] = venv
    environment["PATH"] = os.path.join(venv, "bin") + os.pathsep + environment.get("PATH", "")
    environment["PYTHONNOUSERSITE"] = "1"
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    return environment


# --- the GPU --------------------------------------------------------------------------------------


def output_of(command):
    """Standard output of a command, or "" when it is missing, fails or hangs."""
    try:
        reply = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return reply.stdout if reply.returncode == 0 else ""


def gpu_archs():
    """Sorted compute capabilities ("8.6") of the NVIDIA GPUs that the driver lists."""
    if "GPU " not in output_of(["nvidia-smi", "-L"]):
        return ()
    text = output_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    found = set(re.findall(r"^\s*(\d+\.\d+)\s*$", text, re.MULTILINE))
    return tuple(sorted(found, key=lambda arch: tuple(map(int, arch.split(".")))))


def find_nvcc():
    """``(toolkit folder, version)`` of the CUDA compiler that runs here, or None.

    The folder is asked of nvcc itself, since what lies on PATH may be a link or a wrapper.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for nvcc in (shutil.which("nvcc"), os.path.join(home, "bin", "nvcc")):
        version = re.search(r"release (\d+\.\d+)", output_of([nvcc, "--version"]) if nvcc else "")
        if not version:
            continue
        top = re.search(r"^#\$ TOP=(.+)$", output_of([nvcc, "--dryrun", "x.cu"]), re.MULTILINE)
        folder = top.group(1).strip() if top else os.path.dirname(os.path.dirname(nvcc))
        return os.path.realpath(folder), version.group(1)
    return None


def describe_hardware(archs, nvcc):
    """What the stamp records: "" unless operators could be compiled for a GPU here."""
    return "{} nvcc {}".format(" ".join(archs), nvcc[1]) if archs and nvcc else ""


def plan_cuda(archs, nvcc, torch_cuda):
    """Decide what the operators are compiled for.

    Args:
        archs: compute capabilities of the GPUs, as from :func:`gpu_archs`.
        nvcc: result of :func:`find_nvcc`.
        torch_cuda: CUDA version of the installed torch, "" for a CPU build.

    Returns:
        ``(Cuda or None, warning or None)``; None stands for operators of the CPU only. The warning
        is given when there is a GPU that they will not serve.
    """
    if not archs:
        return None, None
    if not torch_cuda:
        return None, "the installed torch is a CPU build, so the NVIDIA GPU will not be used."
    lost = "the mmcv operators serve the CPU only and training on the GPU will fail."
    if not nvcc:
        return None, (
            f"there is an NVIDIA GPU but no nvcc, so {lost} Install the CUDA toolkit {torch_cuda} "
            "and run make install again."
        )
    home, version = nvcc
    if version.split(".")[0] != torch_cuda.split(".")[0]:
        return None, (
            f"nvcc is of CUDA {version} but torch was built with CUDA {torch_cuda}, so {lost} Put "
            f"nvcc of CUDA {torch_cuda} first on PATH and run make install again."
        )
    return Cuda(home, version, tuple(archs)), None


# --- the mmcv operators ---------------------------------------------------------------------------


def cache_root():
    """The project's folder in ``$XDG_CACHE_HOME``, which is ``~/.cache`` unless set."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "mmeformer")


def wheel_key(mmcv, torch, python, cuda):
    """Name of the cache folder for one build: all that a compiled wheel depends on.

    Args:
        mmcv, torch: full versions, torch's with its build tag ("2.12.1+cu130").
        python: ``(major, minor, ...)`` of the interpreter.
        cuda: a :class:`Cuda`, or None for the CPU.
    """
    # A home folder may be shared by machines whose C libraries differ.
    libc = "".join(platform.libc_ver()) or platform.release()
    device = "cpu"
    if cuda:
        archs = "-".join(arch.replace(".", "") for arch in cuda.archs)
        device = f"cuda{cuda.version}-sm{archs}"
    tag = "cp{}{}".format(*python[:2])
    system = f"{sys.platform}-{platform.machine()}-{libc}"
    return f"mmcv{mmcv}-torch{torch}-{tag}-{system}-{device}"


def ever_compiled(wheels, mmcv, torch, python):
    """Whether the cache folder ``wheels`` holds a build for these versions, whatever its device."""
    names = os.listdir(wheels) if os.path.isdir(wheels) else []
    tag = "-cp{}{}-".format(*python[:2])
    return any(name.startswith(f"mmcv{mmcv}-torch{torch}") and tag in name for name in names)


def cached_wheel(folder):
    """Path of the sound wheel in a cache folder, or None; a damaged entry is removed."""
    if not os.path.isdir(folder):
        return None
    wheels = [name for name in os.listdir(folder) if name.endswith(".whl")]
    if len(wheels) == 1:
        path = os.path.join(folder, wheels[0])
        if wheel_fault(path) is None:
            return path
    shutil.rmtree(folder)
    return None


def wheel_fault(path):
    """What is wrong with a wheel of mmcv (damaged, no operators inside), or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return "is damaged"
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return "is damaged"
    if not any(re.match(r"mmcv/_ext\b.*\.(so|pyd)$", name) for name in names):
        return "holds no compiled operators"
    return None


def job_count(cuda):
    """How many files to compile at once: one per core, as far as the memory goes."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    per_job = (3 if cuda else 1.5) * 2**30
    return max(1, min(cores or 1, int(memory / per_job)))


def build_environment(venv, cuda):
    """Environment for compiling: who it is for, and without debug symbols.

    The symbols double the time and make the library forty times as large.
    """
    environment = clean_environment(venv)
    # Not CFLAGS: it would replace Python's own flags, and the optimisation with them.
    environment["CPPFLAGS"] = (environment.get("CPPFLAGS", "") + " -g0").strip()
    environment["LDFLAGS"] = (environment.get("LDFLAGS", "") + " -Wl,-S").strip()
    environment["MAX_JOBS"] = str(job_count(cuda))
    if cuda:
        environment["FORCE_CUDA"] = "1"
        environment["CUDA_HOME"] = cuda.home
        environment["TORCH_CUDA_ARCH_LIST"] = ";".join(cuda.archs)
        # A toolkit may consist of little more than nvcc; torch's own requirements carry the headers
        # of the CUDA libraries that it includes. CPATH comes after the toolkit's folders.
        headers = glob.glob(os.path.join(venv, "lib/python3*/site-packages/nvidia/*/include"))
        paths = [environment.get("CPATH", "")] + sorted(headers)
        environment["CPATH"] = os.pathsep.join(path for path in paths if path)
    else:
        environment["FORCE_CUDA"] = "0"
        # mmcv's setup also looks whether torch sees a GPU, and would then call a missing nvcc.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def minutes(seconds):
    """Seconds as "m:ss"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """A progress line out of ninja's ``[done/total]`` lines.

    On a terminal one line is rewritten every second; elsewhere one is added every half minute.

    Args:
        stream: text stream to write to.
        clock: function that returns seconds, as ``time.monotonic``.
    """

    def __init__(self, stream, clock=time.monotonic):
        self.stream = stream
        self.clock = clock
        self.start = clock()
        self.first = None
        self.done = self.total = 0
        self.shown = None

    def feed(self, line):
        """Take one line of the build's output."""
        match = re.match(r"\s*\[(\d+)/(\d+)\]\s", line)
        if match:
            self.done, self.total = int(match.group(1)), int(match.group(2))
            if self.first is None:
                self.first = (self.done, self.clock())
        self.show()

    def text(self):
        """The progress as one line: files, percent, elapsed and remaining time."""
        now = self.clock()
        elapsed = "elapsed " + minutes(now - self.start)
        if not self.total:
            return "preparing, " + elapsed
        if self.done >= self.total:
            return f"{self.total}/{self.total} files, linking, {elapsed}"
        text = f"{self.done}/{self.total} files, {100 * self.done / self.total:.0f}%, {elapsed}"
        files = self.done - self.first[0]
        if files:
            rest = (now - self.first[1]) / files * (self.total - self.done)
            text += f", about {minutes(rest)} left"
        return text

    def show(self):
        """Write the line if it is time for it."""
        now = self.clock()
        terminal = self.stream.isatty()
        if self.shown is not None and now - self.shown < (1 if terminal else 30):
            return
        self.shown = now
        self.stream.write(("\r\033[K    " if terminal else "    ") + self.text())
        self.stream.write("" if terminal else "\n")
        self.stream.flush()

    def close(self):
        """Leave the terminal's cursor on a fresh line."""
        if self.stream.isatty():
            self.stream.write("\r\033[K")
            self.stream.flush()


def run_with_progress(command, environment, log, progress):
    """Run a build, copying its output to ``log`` and feeding it to ``progress``.

    The build gets a process group of its own, which ends with this process: an interrupted
    installation must not leave compilers running.

    Returns:
        Its exit status.
    """
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        with open(log, "w", encoding="utf-8") as file:
            while True:
                try:
                    line = lines.get(timeout=1)
                except queue.Empty:
                    progress.show()
                    continue
                if line is None:
                    break
                file.write(line)
                file.flush()
                progress.feed(line)
        return process.wait()
    finally:
        progress.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def build_wheel(python, venv, requirement, folder, cuda, log):
    """Compile mmcv into a wheel and put it into the cache, whole or not at all.

    Args:
        python: interpreter whose environment holds torch, setuptools, wheel and ninja.
        venv: that environment's folder.
        requirement: what pip is asked to build ("onedl-mmcv==2.3.6", or a path).
        folder: cache folder to create, named by :func:`wheel_key`.
        cuda: a :class:`Cuda`, or None for the CPU.
        log: path for the full output.

    Returns:
        Path of the wheel inside ``folder``.

    Raises:
        Failure: the build failed; the text names the log.
    """
    wheels = os.path.dirname(folder)
    os.makedirs(wheels, exist_ok=True)
    for name in os.listdir(wheels):
        # Left by a run that was killed: no run is under way, since this one holds the lock.
        if name.startswith(".building-"):
            shutil.rmtree(os.path.join(wheels, name), ignore_errors=True)
    part = tempfile.mkdtemp(prefix=".building-", dir=wheels)
    # pip's own cache knows nothing of torch's version and would hand out a wheel for another one.
    command = [python, "-m", "pip", "wheel", "--verbose", "--no-cache-dir", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", part, requirement]
    try:
        status = run_with_progress(
            command, build_environment(venv, cuda), log, Progress(sys.stdout)
        )
        if status:
            raise Failure(failure_text("Compiling the mmcv operators failed", log, venv, python))
        built = [os.path.join(part, name) for name in os.listdir(part) if name.endswith(".whl")]
        fault = wheel_fault(built[0]) if len(built) == 1 else "is missing"
        if fault:
            raise Failure(f"The wheel of the mmcv operators {fault}. Full log: {log}")
        # mkdtemp makes the folder private; the cache may be shared by a group.
        os.chmod(part, 0o755)
        try:
            os.rename(part, folder)
        except OSError:
            # Where locks do not work, another run may have come first; its wheel is as good.
            if cached_wheel(folder) is None:
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return os.path.join(folder, os.path.basename(built[0]))


# --- the installation -----------------------------------------------------------------------------


def explain(text, venv, python):
    """The way out for a known failure in a log, or None.

    Args:
        text: the log.
        venv: environment's folder, named in the message.
        python: ``(major, minor, ...)`` of its interpreter, likewise.
    """
    for pattern, message in EXPLANATIONS:
        if re.search(pattern, text):
            return message.format(
                gb=NEEDED_GB, venv=venv, python="{}.{}".format(*(python or OLDEST))
            )
    return None


def failure_text(what, log, venv, python):
    """Message of a failed step: what failed, the reason (or the log's end), and the log's path."""
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        text = ""
    reason = explain(text, venv, python_version(python))
    tail = [] if reason else ["Last lines:"] + text.rstrip().splitlines()[-15:]
    return "\n".join([f"{what}."] + ([reason] if reason else tail) + ["Full log: " + log])


def pip_install(python, venv, what, arguments):
    """``pip install`` with the constraints; its own progress bars stay visible.

    Raises:
        Failure: pip failed; the text gives the reason and names the log.
    """
    log = os.path.join(venv, "install.log")
    # pip appends; an older run's failure must not explain this one.
    with open(log, "w", encoding="utf-8"):
        pass
    command = [python, "-m", "pip", "install", "--log", log, "-c", "constraints.txt"]
    status = subprocess.run(
        command + arguments, cwd=ROOT, env=clean_environment(venv), stdin=subprocess.DEVNULL
    ).returncode
    if status:
        raise Failure(failure_text(f"Installing {what} failed", log, venv, python))


def check_venv_modules(python):
    """Raise :class:`Failure` if an interpreter cannot make virtual environments with pip."""
    status = subprocess.run(
        [python, "-c", "import ensurepip, venv"], stderr=subprocess.DEVNULL
    ).returncode
    if status:
        raise Failure(
            "{} cannot make virtual environments: its venv or ensurepip module is missing.\n"
            "Debian, Ubuntu: sudo apt install python{}.{}-venv".format(
                python, *python_version(python)
            )
        )


def check_compiler(python):
    """Raise :class:`Failure` unless C++17 code that includes Python.h passes the compiler."""
    compiler = os.environ.get("CXX") or "c++"
    if not shutil.which(compiler.split()[0]):
        raise Failure(
            f"There is no C++ compiler ({compiler} is not on PATH), and the mmcv operators have to "
            "be compiled.\nDebian, Ubuntu: sudo apt install g++; Fedora: sudo dnf install gcc-c++; "
            "macOS: xcode-select --install."
        )
    include = output_of([python, "-c", "import sysconfig; print(sysconfig.get_path('include'))"])
    reply = subprocess.run(
        compiler.split() + ["-std=c++17", "-fsyntax-only", "-x", "c++", "-I", include.strip(), "-"],
        input="#include <Python.h>\n#include <optional>\n",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    if reply.returncode:
        reason = explain(reply.stdout, VENV, python_version(python))
        raise Failure(
            reason or f"{compiler} cannot compile C++17 for Python:\n{reply.stdout.strip()}"
        )


@contextlib.contextmanager
def one_at_a_time(folder):
    """Hold the lock that keeps two installations of one user apart; waits for it.

    The system frees the lock with its process, so that a killed installation blocks nobody.
    """
    import fcntl

    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "install.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another installation is running; waiting for it to end ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            say(f"Warning: no lock in {folder} ({error}); run one installation at a time.")
        yield


def make_venv(interpreter, venv):
    """Make ``venv``, or repair it; returns the path of its interpreter."""
    state = venv_state(venv)
    if state != "usable":
        check_venv_modules(interpreter)
        if state == "broken":
            say(f"{venv} was moved or lost its Python: making it anew.")
        command = [interpreter, "-m", "venv", "--clear", "--prompt", "mmeformer", venv]
        reply = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
        )
        if reply.returncode:
            reason = explain(reply.stdout, venv, sys.version_info)
            raise Failure(f"Making {venv} failed.\n{reason or reply.stdout.strip()}")
    python = venv_python(venv)
    if not output_of([python, "-m", "pip", "--version"]):
        check_venv_modules(python)
        subprocess.run([python, "-m", "ensurepip", "--upgrade"], check=True)
    return python


def install_operators(python, venv, version, archs, nvcc):
    """Install compiled mmcv from the cache, compiling it first if it is not there."""
    reply = output_of(
        [python, "-c", "import torch; print('torch', torch.__version__, torch.version.cuda or '')"]
    )
    found = re.search(r"^torch (\S+) (\S*)$", reply, re.MULTILINE)
    if not found:
        raise Failure(f"torch cannot be imported; the reason: {python} -c 'import torch'")
    torch, torch_cuda = found.groups()
    cuda, warning = plan_cuda(archs, nvcc, torch_cuda)
    if warning:
        say(f"Warning: {warning}")
    key = wheel_key(version, torch, python_version(python), cuda)
    folder = os.path.join(cache_root(), "wheels", key)
    wheel = cached_wheel(folder)
    if wheel:
        say(f"    compiled before: {wheel}")
    else:
        check_compiler(python)
        log = os.path.join(venv, "mmcv-build.log")
        target = f"CUDA {cuda.version}, GPUs {', '.join(cuda.archs)}" if cuda else "the CPU"
        say(f"    for {target}; full output in {log}")
        wheel = build_wheel(python, venv, f"onedl-mmcv=={version}", folder, cuda, log)
    options = ["--quiet", "--no-deps", "--no-index", "--force-reinstall"]
    pip_install(python, venv, "the mmcv operators", options + [wheel])


SMOKE_TEST = """
import cv2, torch, torchvision, timm, mmdet, mmseg, mmrotate, mmeformer
from mmcv.ops import nms
boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)[1].tolist()
assert kept == [0, 2], kept
"""


def check(python, venv):
    """Import all that was installed and run one compiled operator; :class:`Failure` if it fails."""
    log = os.path.join(venv, "check.log")
    with open(log, "w", encoding="utf-8") as file:
        status = subprocess.run(
            [python, "-c", SMOKE_TEST],
            cwd=venv,
            env=clean_environment(venv),
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    if status:
        text = failure_text("The installed packages do not work together", log, venv, python)
        raise Failure(f"{text}\nFor a diagnosis run: {python} -m mmeformer.doctor")


def install(interpreter, root, venv, archs, nvcc):
    """Bring ``venv`` up to date, step by step; a stamp is left only by a complete run."""
    start = time.monotonic()
    pins = read_pins(os.path.join(root, "constraints.txt"))
    mmcv = pins["onedl-mmcv"]
    wheels = os.path.join(cache_root(), "wheels")
    if not ever_compiled(wheels, mmcv, pins["torch"], sys.version_info):
        # Said now, not after a download of gigabytes.
        check_compiler(interpreter)
    free = shutil.disk_usage(root).free / 1e9
    if venv_state(venv) != "usable" and free < NEEDED_GB:
        say(f"Warning: {free:.1f} GB are free here; the environment may need {NEEDED_GB} GB.")

    say(f"[1/6] Virtual environment {venv}")
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(venv, STAMP))
    python = make_venv(interpreter, venv)
    say("[2/6] Build tools")
    tools = ["pip", "setuptools", "wheel", "ninja"]
    pip_install(python, venv, "the build tools", ["--quiet", "--upgrade"] + tools)
    say("[3/6] torch and torchvision (a large download the first time)")
    pip_install(python, venv, "torch", ["torch", "torchvision"])
    say("[4/6] mmcv and its compiled operators (5 to 15 minutes the first time)")
    install_operators(python, venv, mmcv, archs, nvcc)
    say("[5/6] mmeformer and everything else")
    # Isolated builds would fetch the newest setuptools for each fork, pinned or not.
    editable = ["--quiet", "--no-build-isolation", "--no-deps", "--editable", "."]
    pip_install(python, venv, "mmeformer", editable)
    # mmeformer itself is there by now, so this brings in what it requires.
    rest = ["--no-build-isolation", f"mmeformer[{EXTRAS}]"]
    pip_install(python, venv, "what mmeformer requires", rest)
    # imaug brings this second build of OpenCV anyway. It must lie on top: the other one needs
    # libGL, which servers and containers lack.
    opencv = ["--quiet", "--no-deps", "--force-reinstall", "opencv-python-headless"]
    pip_install(python, venv, "OpenCV", opencv)
    say("[6/6] Check")
    check(python, venv)
    write_stamp(root, venv, describe_hardware(archs, nvcc))
    taken = minutes(time.monotonic() - start)
    say(f"Ready after {taken}. To use it by hand: . .venv/bin/activate")


def stop(signum, frame):
    """Turn a request to end into an exception, so that every clean-up runs."""
    raise KeyboardInterrupt


def run():
    """Install what is missing; raises :class:`Failure` with the way out."""
    if os.name != "posix":
        raise Failure("Linux and macOS are supported; on Windows use WSL.")
    if not in_range(sys.version_info):
        # The same script, run by an interpreter that can make the environment.
        other = other_interpreter()
        os.execv(other, [other, os.path.abspath(__file__)])
    archs = gpu_archs()
    nvcc = find_nvcc() if archs else None
    hardware = describe_hardware(archs, nvcc)
    if up_to_date(ROOT, VENV, hardware):
        return
    with one_at_a_time(cache_root()):
        # Whoever held the lock may have been at work on this very environment.
        if not up_to_date(ROOT, VENV, hardware):
            install(sys.executable, ROOT, VENV, archs, nvcc)


def main():
    """Entry point; returns the exit status."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # nohup has the latter ignored, and that must stay so.
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        run()
    except KeyboardInterrupt:
        say("\nInterrupted. Run the same command again: it goes on where it stopped.")
        return 130
    except PermissionError as error:
        say(
            f"\nNo permission to write {error.filename}. The environment goes into {VENV}, compiled"
        )
        say(f"wheels into {cache_root()} (elsewhere if XDG_CACHE_HOME is set).")
        return 1
    except (Failure, OSError) as error:
        reason = error if isinstance(error, Failure) else explain(str(error), VENV, None)
        if not reason:
            raise
        say(f"\n{reason}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
