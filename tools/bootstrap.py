# SPDX-License-Identifier: Apache-2.0
"""Make ``.venv`` ready for work: ``python3 tools/bootstrap.py`` (what ``make install`` runs).

It needs Python's standard library alone, compiles nothing, and does nothing when ``.venv`` is up to
date. An interrupted run goes on where it stopped. The syntax is that of Python 3.6, so that an old
``python3`` finds a newer interpreter, or says that there is none, instead of a SyntaxError.
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
INPUTS = ("constraints.txt", "setup.py", "pyproject.toml", "tools/bootstrap.py")
OLDEST, NEWEST = (3, 10), (3, 14)
# The one that most tests run on comes first.
INTERPRETERS = ("python3.11", "python3.12", "python3.13", "python3.14", "python3.10")
STAMP = "mmeformer-stamp.json"

# Known ways to fail, as patterns of what pip or venv prints, and the way out.
EXPLANATIONS = {
    r"No space left on device|OSError: \[Errno 28\]|Disk quota exceeded": "The disk is full. The "
    "environment, pip's cache and the temporary folder need about 9 GB with a CUDA build of torch; "
    "free some space, or set TMPDIR to a folder on a larger disk.",
    r"SSLError|CERTIFICATE_VERIFY_FAILED": "The connection to the package index is not trusted "
    "(TLS certificate). Behind a company proxy, name its certificate: "
    "pip config set global.cert /path/to/ca.pem",
    r"NewConnectionError|ConnectTimeoutError|ReadTimeoutError|NameResolutionError|ProxyError"
    r"|Temporary failure in name resolution|Name or service not known|Network is unreachable"
    r"|ConnectionResetError|Connection refused": "The package index cannot be reached. Check the "
    "network and the proxy settings, then run the same command again: it goes on where it stopped.",
    r"No matching distribution found|Could not find a version that satisfies": "A pinned version "
    "is not offered for this platform and Python, or the package index could not be read; the log "
    "names the package.",
    r"ensurepip is not available|No module named '?(venv|ensurepip)": "This Python cannot make "
    "virtual environments. Debian, Ubuntu: sudo apt install python{}.{}-venv",
}


class Failure(Exception):
    """An installation that the user can fix; the text says how."""


def explained(text):
    """The way out for a known failure in ``text``, else its last lines."""
    for pattern, way_out in EXPLANATIONS.items():
        if re.search(pattern, text):
            return way_out.format(*sys.version_info)
    return "\n".join(text.rstrip().splitlines()[-15:])


def say(text):
    """Print one line at once, also into a pipe."""
    print(text, flush=True)


def output_of(*command):
    """What a command prints; "" if it cannot be run or fails."""
    try:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        reply = subprocess.run(command, timeout=60, **streams)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if reply.returncode else reply.stdout.decode("utf-8", "replace")


def python_version(python):
    """``[major, minor, micro]`` of the interpreter at a path; [] if it does not run."""
    code = "import sys; print(*sys.version_info[:3])"
    return [int(number) for number in output_of(python, "-c", code).split()]


def in_range(version):
    """Whether the project supports a Python version."""
    return OLDEST <= tuple(version[:2]) <= NEWEST


def other_interpreter():
    """Path of a supported interpreter on PATH or of pyenv. Each is run: a shim proves nothing."""
    pyenv = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    for name in INTERPRETERS:
        for path in [shutil.which(name), *glob.glob(f"{pyenv}/versions/*/bin/{name}")]:
            if path and in_range(python_version(path)):
                return path
    names = ", ".join(INTERPRETERS)
    raise Failure(
        f"mmeformer needs Python 3.10 to 3.14; this one is {sys.version.split()[0]}, and none of "
        f"{names} on PATH or of pyenv runs.\nInstall one (Debian, Ubuntu: sudo apt install "
        "python3.11 python3.11-venv) or name one: make PYTHON=/path/to/python3.11 install"
    )


def has_gpu():
    """Whether the NVIDIA driver lists a GPU."""
    return "GPU " in output_of("nvidia-smi", "-L")


def pinned(name):
    """``name==version``, as constraints.txt has it."""
    with open(os.path.join(ROOT, "constraints.txt"), encoding="utf-8") as file:
        return re.search(rf"^{re.escape(name)}==[^\s;]+", file.read(), re.MULTILINE).group()


def python_of(folder):
    """The interpreter of the environment in ``folder``."""
    return os.path.join(folder, "bin", "python")


def state(folder):
    """What decides an environment's contents: place, Python, and the files it is made from."""
    digest = hashlib.sha256()
    for name in INPUTS:
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    python = python_version(python_of(folder))
    return {"folder": folder, "python": python, "files": digest.hexdigest()}


def recorded(folder):
    """The state after the last complete installation; {} if there was none."""
    try:
        with open(os.path.join(folder, STAMP), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def make_environment(folder):
    """Make a virtual environment, unless ``folder`` holds one that can be completed."""
    if os.path.isdir(folder) and os.listdir(folder):
        if not os.path.isfile(os.path.join(folder, "pyvenv.cfg")):
            raise Failure(
                f"{folder} exists and is not a virtual environment. Move it away, then run this "
                "again."
            )
        moved = recorded(folder).get("folder", folder) != folder
        if in_range(python_version(python_of(folder))) and not moved:
            return
        say(f"{folder} was moved or lost its Python: making it again.")
    command = [sys.executable, "-m", "venv", "--clear", "--prompt", "mmeformer", folder]
    reply = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if reply.returncode:
        text = reply.stdout.decode("utf-8", "replace")
        raise Failure(f"Making {folder} failed.\n{explained(text)}")


def drop_incomplete(folder):
    """Remove the metadata of half unpacked packages, which pip takes for installed.

    pip writes the file INSTALLER after all files of a package.
    """
    for info in glob.glob(os.path.join(folder, "lib/python3*/site-packages/*.dist-info")):
        if not os.path.exists(os.path.join(info, "INSTALLER")):
            shutil.rmtree(info)


def run(folder, *arguments, **options):
    """Run the environment's Python, apart from the caller's Python settings."""
    leads_out = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
    variables = {key: value for key, value in os.environ.items() if key not in leads_out}
    variables.update(PYTHONNOUSERSITE="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    command = [python_of(folder), *arguments]
    return subprocess.run(command, env=variables, cwd=ROOT, stdin=subprocess.DEVNULL, **options)


def pip_install(folder, what, *arguments, **options):
    """``pip install``; :class:`Failure` gives the reason, from a log of this call alone."""
    log = os.path.join(folder, "install.log")
    open(log, "w").close()
    # Modules are compiled to bytecode at their first import, for most are never imported.
    command = ["-m", "pip", "install", "--no-compile", "--log", log, *arguments]
    if run(folder, *command, **options).returncode:
        with open(log, encoding="utf-8", errors="replace") as file:
            reason = explained(file.read())
        raise Failure(f"Installing {what} failed.\n{reason}\nFull log: {log}")


def install_torch(folder):
    """Without a GPU a CPU build, if an index that pip is set up for has one.

    On Linux the default index has CUDA builds, which run on a CPU as well; on macOS it has builds
    without CUDA. torch brings its own requirements, for they depend on the build.
    """
    builds = [pinned("torch"), pinned("torchvision")]
    if sys.platform == "linux" and not has_gpu():
        small = ["--quiet", "-c", "constraints.txt", *(f"{build}+cpu" for build in builds)]
        try:
            return pip_install(folder, "torch", *small, stderr=subprocess.DEVNULL)
        except Failure:
            say("      no CPU build was found; the larger CUDA build runs without a GPU too")
    pip_install(folder, "torch", "-c", "constraints.txt", *builds)


def install(folder):
    """Bring the environment up to date; only a complete run leaves a stamp."""
    start = time.monotonic()
    stamp = os.path.join(folder, STAMP)
    say(f"[1/4] Virtual environment {folder}")
    make_environment(folder)
    if os.path.exists(stamp):
        os.remove(stamp)
    drop_incomplete(folder)
    pip_install(folder, "pip", "--quiet", "--upgrade", pinned("pip"))
    say("[2/4] torch and torchvision (a large download)")
    install_torch(folder)
    say("[3/4] mmeformer and everything else")
    # The file lists all packages, so that nothing has to be resolved.
    pip_install(folder, "mmeformer", "--no-deps", "-r", "constraints.txt", "-e", ".")
    say("[4/4] Check")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    reply = run(folder, "-m", "mmeformer.doctor", **streams)
    if reply.returncode:
        text = reply.stdout.decode("utf-8", "replace")
        raise Failure(f"The installed packages do not work together.\n{text}")
    with open(stamp, "w", encoding="utf-8") as file:
        json.dump(state(folder), file)
    say(f"Ready after {time.monotonic() - start:.0f} s. To use it: . {folder}/bin/activate")


def bootstrap(folder):
    """Install what is missing; :class:`Failure` says what the user can do."""
    if os.name != "posix":
        raise Failure("Linux and macOS are supported; on Windows use WSL.")
    if not in_range(sys.version_info):
        other = other_interpreter()
        os.execv(other, [other, *sys.argv])
    import fcntl  # Windows has none.

    # The system frees this lock with its process, so that a killed installation blocks nobody.
    with open(__file__) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another installation is running here; waiting for it to end ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # A file system without locks.
        if recorded(folder) != state(folder):
            install(folder)


def main():
    """Entry point; takes the environment's folder (default: .venv); returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        bootstrap(os.path.abspath((sys.argv[1:] or [os.path.join(ROOT, ".venv")])[0]))
    except KeyboardInterrupt:
        say("\nInterrupted. Run the same command again: it goes on where it stopped.")
        return 130
    except (Failure, OSError) as error:
        say("\n" + (str(error) if isinstance(error, Failure) else explained(f"OSError: {error}")))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
