# SPDX-License-Identifier: Apache-2.0
"""Make ``.venv`` ready for work: ``python3 tools/bootstrap.py`` (what ``make install`` runs).

It needs Python's standard library alone, compiles nothing, and does nothing when ``.venv`` is up to
date. An interrupted run goes on where it stopped. ``constraints.txt`` lists the whole environment,
so nothing has to be resolved; torch alone brings its own requirements, which depend on the machine.

The syntax is that of Python 3.6, so that an old ``python3`` gets a message (or a newer interpreter
found) instead of a SyntaxError.
"""

import glob
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST, NEWEST = (3, 10), (3, 13)
# The one that most tests run on comes first.
INTERPRETERS = ("python3.11", "python3.12", "python3.13", "python3.10")
STAMP = "mmeformer-stamp.json"
# A fresh environment with a CUDA build of torch, with pip's downloads beside it on Linux.
NEEDED_GB = 9

# Known ways to fail, as they read in pip's log, and the way out.
EXPLANATIONS = (
    (
        r"No space left on device|OSError: \[Errno 28\]|Disk quota exceeded",
        "The disk is full. The environment, pip's cache and the temporary folder need about {gb} "
        "GB together; free some space, or set TMPDIR to a folder on a larger disk.",
    ),
    (
        r"SSLError|CERTIFICATE_VERIFY_FAILED",
        "The connection to the package index is not trusted (TLS certificate). Behind a company "
        "proxy, name its certificate: pip config set global.cert /path/to/ca.pem",
    ),
    (
        r"NewConnectionError|ConnectTimeoutError|ReadTimeoutError|NameResolutionError"
        r"|Temporary failure in name resolution|Name or service not known|Network is unreachable"
        r"|ConnectionResetError|ProxyError|Connection refused",
        "The package index cannot be reached. Check the network and the proxy settings, then run "
        "the same command again: it goes on where it stopped.",
    ),
    (
        r"No matching distribution found|Could not find a version that satisfies",
        "A pinned version is not offered for this platform and Python, or the package index could "
        "not be read; the log names the package.",
    ),
)


class Failure(Exception):
    """An installation that the user can fix; the text says how."""


def say(text):
    """Print one line at once, also into a pipe."""
    print(text, flush=True)


def python_version(python):
    """``(major, minor, micro)`` that the interpreter at a path reports; None if it does not run."""
    try:
        reply = subprocess.run(
            [python, "-c", "import sys; print(*sys.version_info[:3])"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        ).stdout.split()
    except OSError:
        return None
    return tuple(map(int, reply)) if len(reply) == 3 else None


def in_range(version):
    """Whether the project supports a Python version (None: not a Python that runs)."""
    return version is not None and OLDEST <= tuple(version[:2]) <= NEWEST


def other_interpreter():
    """Path of a supported interpreter on PATH, or :class:`Failure`.

    A name on PATH proves nothing (version managers put shims there), so each one is run.
    """
    for name in INTERPRETERS:
        path = shutil.which(name)
        if path and in_range(python_version(path)):
            return path
    raise Failure(
        "mmeformer needs Python {}.{} to {}.{}; {} is {}.{}, and none of {} on PATH runs.\n"
        "Install one (Debian, Ubuntu: sudo apt install python3.11 python3.11-venv) or name one: "
        "make PYTHON=/path/to/python3.11 install".format(
            *OLDEST, *NEWEST, sys.executable, *sys.version_info[:2], ", ".join(INTERPRETERS)
        )
    )


def pinned(name):
    """The version of ``name`` in constraints.txt."""
    with open(os.path.join(ROOT, "constraints.txt"), encoding="utf-8") as file:
        return re.search(rf"^{re.escape(name)}==([^\s;]+)", file.read(), re.MULTILINE).group(1)


def has_gpu():
    """Whether the NVIDIA driver lists a GPU."""
    try:
        reply = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return reply.returncode == 0 and b"GPU " in reply.stdout


class Environment:
    """The virtual environment of one checkout.

    Args:
        folder: its path.
    """

    def __init__(self, folder):
        self.folder = folder
        self.python = os.path.join(folder, "bin", "python")
        self.stamp = os.path.join(folder, STAMP)
        self.log = os.path.join(folder, "install.log")

    def state(self):
        """What decides the contents: its place, its Python and the files that it is made from."""
        digest = hashlib.sha256()
        for name in ("constraints.txt", "setup.py", "pyproject.toml", "tools/bootstrap.py"):
            with open(os.path.join(ROOT, name), "rb") as file:
                digest.update(hashlib.sha256(file.read()).digest())
        return {
            "folder": self.folder,
            "python": list(python_version(self.python) or ()),
            "files": digest.hexdigest(),
        }

    def recorded(self):
        """The state after the last complete installation; {} if there was none."""
        try:
            with open(self.stamp, encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError):
            return {}

    def make(self):
        """Make the folder unless it holds an environment that can be completed."""
        if os.path.isdir(self.folder) and os.listdir(self.folder):
            if not os.path.isfile(os.path.join(self.folder, "pyvenv.cfg")):
                raise Failure(
                    f"{self.folder} exists and is not a virtual environment. Move it away, then "
                    "run this again."
                )
            moved = self.recorded().get("folder", self.folder) != self.folder
            if in_range(python_version(self.python)) and not moved:
                return
            say(f"{self.folder} was moved or lost its Python: making it again.")
        command = [sys.executable, "-m", "venv", "--clear", "--prompt", "mmeformer", self.folder]
        reply = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
        )
        if reply.returncode:
            hint = "Debian, Ubuntu: sudo apt install python{}.{}-venv".format(*sys.version_info)
            reason = explanation(reply.stdout) or f"{reply.stdout.strip()}\n{hint}"
            raise Failure(f"Making {self.folder} failed.\n{reason}")

    def run(self, *arguments, **options):
        """Run this environment's Python, apart from the caller's Python settings."""
        leads_out = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
        variables = {key: value for key, value in os.environ.items() if key not in leads_out}
        variables.update(PYTHONNOUSERSITE="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
        command = [self.python, *arguments]
        return subprocess.run(command, env=variables, cwd=ROOT, stdin=subprocess.DEVNULL, **options)

    def pip(self, *arguments, **options):
        """``pip install`` with a log of this call alone; returns the exit status.

        Modules are compiled to bytecode at their first import, for most are never imported.
        """
        with open(self.log, "w", encoding="utf-8"):
            pass
        command = ["-m", "pip", "install", "--no-compile", "--log", self.log, *arguments]
        return self.run(*command, **options).returncode

    def must(self, what, *arguments):
        """:meth:`pip`, with :class:`Failure` if it fails: the reason, or the log's last lines."""
        if self.pip(*arguments):
            with open(self.log, encoding="utf-8", errors="replace") as file:
                text = file.read()
            reason = explanation(text) or "\n".join(text.rstrip().splitlines()[-15:])
            raise Failure(f"Installing {what} failed.\n{reason}\nFull log: {self.log}")

    def drop_incomplete(self):
        """Let pip install again what a killed run left half unpacked: pip counts it as installed.

        pip writes the file INSTALLER after all files of a package.
        """
        for info in glob.glob(os.path.join(self.folder, "lib/python3*/site-packages/*.dist-info")):
            if not os.path.exists(os.path.join(info, "INSTALLER")):
                shutil.rmtree(info)

    def install(self):
        """Bring the environment up to date; only a complete run leaves a stamp."""
        start = time.monotonic()
        free = shutil.disk_usage(ROOT).free / 1e9
        if not self.recorded() and free < NEEDED_GB:
            say(f"Warning: {free:.1f} GB are free here; the environment may need {NEEDED_GB} GB.")
        say(f"[1/4] Virtual environment {self.folder}")
        self.make()
        if os.path.exists(self.stamp):
            os.remove(self.stamp)
        self.drop_incomplete()
        self.must("pip", "--quiet", "--upgrade", "pip=={}".format(pinned("pip")))
        say("[2/4] torch and torchvision (a large download)")
        self.install_torch()
        say("[3/4] mmeformer and everything else")
        self.must("mmeformer", "--no-deps", "-r", "constraints.txt", "-e", ".")
        say("[4/4] Check")
        reply = self.run("-m", "mmeformer.doctor", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if reply.returncode:
            text = reply.stdout.decode("utf-8", "replace")
            raise Failure(f"The installed packages do not work together.\n{text}")
        with open(self.stamp + ".part", "w", encoding="utf-8") as file:
            json.dump(self.state(), file)
        os.replace(self.stamp + ".part", self.stamp)
        say(
            f"Ready after {time.monotonic() - start:.0f} s. To use it: . {self.folder}/bin/activate"
        )

    def install_torch(self):
        """Without a GPU a CPU build, if an index that pip is set up for has one.

        On Linux the default index has CUDA builds, which run on a CPU as well; on macOS it has
        builds without CUDA.
        """
        names = ("torch", "torchvision")
        if sys.platform == "linux" and not has_gpu():
            small = [f"{name}=={pinned(name)}+cpu" for name in names]
            if not self.pip("--quiet", "-c", "constraints.txt", *small, stderr=subprocess.DEVNULL):
                return
        self.must("torch", "-c", "constraints.txt", *names)


def explanation(text):
    """The way out for a known failure in pip's output, or None."""
    for pattern, message in EXPLANATIONS:
        if re.search(pattern, text):
            return message.format(gb=NEEDED_GB)
    return None


def stop(signum, frame):
    """Turn a request to end into the exception that Ctrl-C raises."""
    raise KeyboardInterrupt


def run(folder):
    """Install what is missing; :class:`Failure` says what the user can do."""
    if os.name != "posix":
        raise Failure("Linux and macOS are supported; on Windows use WSL.")
    if not in_range(sys.version_info):
        other = other_interpreter()
        os.execv(other, [other, *sys.argv])
    import fcntl

    environment = Environment(folder)
    if environment.recorded() == environment.state():
        return
    # The system frees this lock with its process, so that a killed installation blocks nobody.
    lock = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("Another installation is running here; waiting for it to end ...")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        pass  # A file system without locks.
    if environment.recorded() != environment.state():
        environment.install()


def main():
    """Entry point; takes the environment's folder (default: .venv); returns the exit status."""
    signal.signal(signal.SIGTERM, stop)
    folder = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, ".venv"))
    try:
        run(folder)
    except KeyboardInterrupt:
        say("\nInterrupted. Run the same command again: it goes on where it stopped.")
        return 130
    except (Failure, OSError) as error:
        reason = error if isinstance(error, Failure) else explanation(str(error)) or error
        say(f"\n{reason}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
