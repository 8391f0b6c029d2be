# SPDX-License-Identifier: Apache-2.0
"""``python -m mmeformer.doctor``: installed versions, operators and GPUs, and every problem's fix.

:func:`gather` collects :class:`Facts`, :func:`diagnose` finds problems in them without touching the
system, :func:`report` prints both. This module imports only the standard library. Every other
import is tried in a child process, as a library built for another torch may crash its process.
"""

import contextlib
import importlib
import importlib.metadata
import multiprocessing
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

from mmeformer.tasks import TASKS

# Distributions that install the same import name; only one of each row can be installed.
RIVALS = {
    "mmengine": ("onedl-mmengine", "mmengine", "mmengine-lite"),
    "mmcv": ("onedl-mmcv", "mmcv", "mmcv-lite", "mmcv-full"),
    "mmdet": ("onedl-mmdetection", "mmdet"),
    "mmseg": ("onedl-mmsegmentation", "mmsegmentation"),
    "mmrotate": ("onedl-mmrotate", "mmrotate"),
}
OPENCV = tuple(
    f"opencv-{kind}python{tail}" for kind in ("", "contrib-") for tail in ("", "-headless")
)
# Task packages, and the extra of mmeformer that installs each.
OPTIONAL = {task.scope: task.name for task in TASKS.values()}
# Required by mmdet, but used by its lane detection only (mmeformer/without_imgaug.py).
NOT_NEEDED = ("imaug", "imgaug")
# The imports that are tried, in this order, and those that each needs: only the first failure of a
# chain is reported.
NEEDS = {
    "numpy": (),
    "cv2": ("numpy",),
    "torch": (),
    "torchvision": ("torch",),
    "timm": ("torchvision",),
    "mmengine": ("cv2", "torch"),
    "mmcv": ("mmengine",),
    "operators": ("mmcv", "torchvision"),
    "mmdet": ("operators",),
    "mmseg": ("operators",),
    "mmrotate": ("mmdet",),
    "mmeformer": ("mmengine", "timm"),
}
TORCH_FIX = (
    "install both in one command and from one source: make repair (or: pip install "
    "--force-reinstall torch==VERSION torchvision==VERSION)"
)
# Patterns of error messages, and the fix.
KNOWN_FAILURES = (
    (r"torchvision::nms|different CUDA major versions", TORCH_FIX),
    (
        r"libGL\.so|libgthread",
        "pip install --force-reinstall --no-deps opencv-python-headless, which needs no graphics "
        "library",
    ),
    (
        r"_ARRAY_API|numpy\.core\.multiarray|numpy\.dtype size changed",
        "it was built for another numpy: make repair (or reinstall it together with numpy)",
    ),
    (r"pkg_resources", "newer setuptools do not have it: pip install 'setuptools<81'"),
    (r"MMEFORMER_OPERATORS", "unset MMEFORMER_OPERATORS"),
    (r"mmcv-lite", "pip uninstall -y mmcv-lite && pip install onedl-mmcv"),
    (
        r"undefined symbol|Symbol not found|_ext|CPU only",
        "use the operators that need no compiling: make repair (or: pip install --force-reinstall "
        "--no-deps --no-cache-dir onedl-mmcv); or compile them for this torch and GPU: make "
        "install-compiled",
    ),
)


@dataclass(frozen=True)
class Probe:
    """Outcome of importing one entry of :data:`NEEDS`.

    Attributes:
        values: what was found, for example ``{"version": "2.12.1+cu130", "cuda": "13.0"}``.
        error: one line, or "" if the import and its test worked.
    """

    values: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Facts:
    """Everything that :func:`diagnose` looks at.

    Attributes:
        python: version, such as "3.11.7".
        distributions: canonical distribution name to version, for everything installed.
        requirements: canonical distribution name to its ``Requires-Dist`` lines.
        requires_python: mmeformer's ``Requires-Python``, "" if mmeformer is not installed.
        probes: import outcome per entry of :data:`NEEDS`.
        driver_gpus: GPUs that the NVIDIA driver lists, one per line.
    """

    python: str
    distributions: Mapping[str, str]
    requirements: Mapping[str, tuple[str, ...]]
    requires_python: str
    probes: Mapping[str, Probe]
    driver_gpus: str = ""

    def provider(self, module: str) -> str:
        """Distributions that install ``module``, as "name version, ..."; "" if there is none."""
        names = RIVALS.get(module, OPENCV if module == "cv2" else (module,))
        return ", ".join(f"{n} {self.distributions[n]}" for n in names if n in self.distributions)


@dataclass(frozen=True)
class Problem:
    """A problem of the environment.

    Attributes:
        what: one sentence.
        fix: how to fix it, a command if there is one.
        note: True if things work anyway; the exit status is then 0.
    """

    what: str
    fix: str
    note: bool = False


# --- gathering ------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    """Normalized distribution name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def probe_torch() -> dict[str, str]:
    """Version, CUDA version ("" for a CPU build) and GPUs, one per line."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            gpus.append(f"{torch.cuda.get_device_name(index)} (capability {major}.{minor})")
    cuda = torch.version.cuda or ""
    return {"version": torch.__version__, "cuda": cuda, "gpus": "\n".join(gpus)}


def probe_torchvision() -> dict[str, str]:
    """Version, after running its non-maximum suppression."""
    import torch
    import torchvision

    torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    return {"version": torchvision.__version__}


def probe_operators() -> dict[str, str]:
    """Which operators mmcv uses and why, after running NMS on the CPU and on a GPU."""
    import torch

    from mmeformer import ops

    status = ops.status()
    if status.operators not in ("compiled", "torch"):
        raise RuntimeError(status.reason)
    from mmcv.ops import get_compiling_cuda_version, nms

    compiled = status.operators == "compiled"
    if compiled and torch.cuda.is_available() and get_compiling_cuda_version() == "not available":
        raise RuntimeError("mmcv's operators are compiled for the CPU only, but there is a GPU")
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [1.0, 0.0, 9.0, 9.0]], device=device)
        kept = nms(boxes, torch.tensor([0.9, 0.8], device=device), 0.5)[1].tolist()
        if kept != [0]:
            raise RuntimeError(f"nms on {device} kept boxes {kept} instead of [0]")
    return {"version": status.operators, "reason": status.reason}


def probe_mmeformer() -> dict[str, str]:
    """Version, after importing the backbones."""
    importlib.import_module("mmeformer.backbones")
    return {"version": importlib.import_module("mmeformer.version").__version__}


def probe_version(module: str) -> dict[str, str]:
    """Version of any other module, after importing it."""
    version = getattr(importlib.import_module(module), "__version__", "")
    if module == "mmdet":
        # Importing the package alone does not import what its data sets need.
        importlib.import_module("mmdet.datasets")
    return {"version": str(version)}


PROBES: dict[str, Callable[[], dict[str, str]]] = {
    "torch": probe_torch,
    "torchvision": probe_torchvision,
    "operators": probe_operators,
    "mmeformer": probe_mmeformer,
}


def run_probe(name: str) -> Probe:
    """Run one probe in this process; any failure becomes the outcome's ``error``."""
    try:
        return Probe(PROBES[name]() if name in PROBES else probe_version(name))
    # A broken import may raise anything, SystemExit included.
    except BaseException as error:
        text = " ".join(str(error).split())
        return Probe(
            error=text if type(error) is RuntimeError else f"{type(error).__name__}: {text}"
        )


def _silence() -> None:
    # Some packages print on import.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)


def run_probes(names: tuple[str, ...], run: Callable[[str], Probe] = run_probe) -> dict[str, Probe]:
    """Run probes one after the other in a child process, which is replaced if a probe kills it.

    Args:
        names: keys of :data:`NEEDS`.
        run: function for one name; must be importable by the child.
    """
    outcomes: dict[str, Probe] = {}
    context = multiprocessing.get_context("spawn")
    while len(outcomes) < len(names):
        with ProcessPoolExecutor(1, mp_context=context, initializer=_silence) as pool:
            for name in names[len(outcomes) :]:
                try:
                    outcomes[name] = pool.submit(run, name).result()
                except BrokenProcessPool:
                    outcomes[name] = Probe(error="the import ended its process without a message")
                    break
    return outcomes


def driver_gpus() -> str:
    """GPUs that the NVIDIA driver lists, one per line; "" without a driver."""
    try:
        command = ["nvidia-smi", "-L"]
        reply = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "\n".join(line for line in reply.stdout.splitlines() if line.startswith("GPU "))


def gather() -> Facts:
    """Facts about the interpreter that runs this."""
    distributions, requirements, requires_python = {}, {}, ""
    for distribution in importlib.metadata.distributions():
        # A half-removed distribution leaves metadata without a name.
        name = canonical(distribution.metadata["Name"] or "")
        if not name or name in distributions:
            continue
        distributions[name] = distribution.version
        requirements[name] = tuple(distribution.requires or ())
        if name == "mmeformer":
            requires_python = distribution.metadata["Requires-Python"] or ""
    return Facts(
        python=platform.python_version(),
        distributions=distributions,
        requirements=requirements,
        requires_python=requires_python,
        probes=run_probes(tuple(NEEDS)),
        driver_gpus=driver_gpus(),
    )


# --- finding problems -----------------------------------------------------------------------------


def check_python(facts: Facts) -> Iterator[Problem]:
    """Python outside the range that mmeformer declares, or mmeformer not installed at all."""
    if not facts.requires_python:
        yield Problem(
            "mmeformer is not installed into this environment, only found on the path.",
            "in a checkout: make repair (or: pip install --no-deps -e .)",
        )
        return
    from packaging.specifiers import SpecifierSet

    if facts.python not in SpecifierSet(facts.requires_python):
        yield Problem(
            f"Python {facts.python} is outside of {facts.requires_python}.",
            "make PYTHON=python3.11 repair",
        )


def check_rivals(facts: Facts) -> Iterator[Problem]:
    """Distributions that overwrite each other's files."""
    for module, names in RIVALS.items():
        present = [name for name in names if name in facts.distributions]
        if len(present) > 1:
            yield Problem(
                f"{' and '.join(present)} are installed over each other: both provide {module}.",
                f"pip uninstall -y {' '.join(present)}, then make repair (or install one of them)",
            )
    builds = {name: facts.distributions[name] for name in OPENCV if name in facts.distributions}
    if len(set(builds.values())) > 1:
        listed = ", ".join(f"{name} {version}" for name, version in builds.items())
        yield Problem(
            f"OpenCV is installed in different versions over each other: {listed}.",
            f"pip uninstall -y {' '.join(builds)}, then make repair (or install one of them)",
        )


def check_requirements(facts: Facts) -> Iterator[Problem]:
    """Missing packages, and versions out of the range that mmeformer or the forks declare."""
    from packaging.requirements import Requirement

    # Another distribution with the same import name satisfies a requirement too.
    rivals = {name: names for names in (*RIVALS.values(), OPENCV) for name in names}
    owners = ["mmeformer", "torch", "torchvision", "timm", *rivals]
    complaints: dict[str, list[str]] = {}
    for owner in owners:
        for line in facts.requirements.get(owner, ()):
            requirement = Requirement(line)
            name = canonical(requirement.name)
            applies = not requirement.marker or requirement.marker.evaluate({"extra": ""})
            if not applies or name in NOT_NEEDED or (owner, name) == ("torchvision", "torch"):
                continue
            installed = facts.distributions.get(name)
            wish = f"{name}{requirement.specifier}"
            if installed is None:
                if not any(rival in facts.distributions for rival in rivals.get(name, ())):
                    complaints.setdefault(f"{name} is missing", []).append(f"{owner}: {wish}")
            elif not requirement.specifier.contains(installed, prereleases=True):
                what = f"{name} {installed} is out of range"
                complaints.setdefault(what, []).append(f"{owner}: {wish}")
    for what, wishes in complaints.items():
        wanted = ",".join(wish.split(": ")[1].removeprefix(what.split()[0]) for wish in wishes)
        yield Problem(
            f"{what} ({'; '.join(wishes)}).",
            f'make repair (or: pip install "{what.split()[0]}{wanted.strip(",")}")',
        )


def check_torch(facts: Facts) -> Iterator[Problem]:
    """torchvision made for another torch, and a GPU that torch cannot use."""
    torch = facts.probes["torch"]
    installed = facts.distributions.get("torch", "")
    for line in facts.requirements.get("torchvision", ()):
        pin = re.match(r"torch\s*\(?==([\w.]+)", line)
        if pin and installed and installed.split("+")[0] != pin[1]:
            what = f"torchvision was built for torch {pin[1]}, but torch {installed} is installed."
            yield Problem(what, TORCH_FIX)
    if facts.driver_gpus and not torch.error and not torch.values["gpus"]:
        if cuda := torch.values["cuda"]:
            why = f"the driver may be too old for CUDA {cuda}"
            fix = "update the NVIDIA driver, or install a torch for an older CUDA"
        else:
            why, fix = "it is a CPU build", "make repair (or install a CUDA build of torch)"
        yield Problem(f"There is an NVIDIA GPU that torch cannot use: {why}.", fix, note=True)


def failed_need(name: str, facts: Facts) -> str:
    """The entry whose failure already explains that ``name`` fails, or ""."""
    for need in NEEDS[name]:
        if facts.probes[need].error:
            return need
        if deeper := failed_need(need, facts):
            return deeper
    return ""


def check_imports(facts: Facts) -> Iterator[Problem]:
    """Imports and trials that fail, and task packages that are not installed."""
    told_torchvision = any(check_torch(facts))
    for name, probe in facts.probes.items():
        installed = name == "operators" or bool(facts.provider(name))
        if name in OPTIONAL and not installed:
            extra = f'for that task: pip install "mmeformer[{OPTIONAL[name]}]"'
            yield Problem(f"{name} is not installed.", extra, note=True)
        elif not probe.error or failed_need(name, facts):
            continue
        elif facts.requires_python and not installed:
            continue  # check_requirements names it.
        elif name == "torchvision" and told_torchvision:
            continue
        else:
            known = (fix for pattern, fix in KNOWN_FAILURES if re.search(pattern, probe.error))
            yield Problem(f"{name} does not work: {probe.error}.", next(known, "make repair"))


def diagnose(facts: Facts) -> list[Problem]:
    """All problems, causes before consequences; empty if there are none."""
    checks = [check_rivals, check_torch, check_imports]
    problems = []
    if "packaging" in facts.distributions:
        checks = [check_python, check_requirements, *checks]
    else:
        problems.append(Problem("packaging is missing.", "make repair, or: pip install packaging"))
    return problems + [problem for check in checks for problem in check(facts)]


# --- reporting ------------------------------------------------------------------------------------


def describe(name: str, facts: Facts) -> str:
    """The text after one name in the table of versions."""
    probe, provider = facts.probes[name], facts.provider(name)
    if name == "operators":
        return (
            f"{probe.values['version']:<16} {probe.values['reason']}" if not probe.error else "fail"
        )
    if probe.error:
        return f"fails to import   {provider}" if provider else "not installed"
    return f"{probe.values['version']:<16} {provider}"


def report(facts: Facts, problems: list[Problem]) -> str:
    """The text for the terminal: versions, operators, GPUs, problems with their fixes, notes."""
    lines = [f"{'python':<12} {facts.python:<16} {sys.executable}"]
    lines += [f"{name:<12} {describe(name, facts)}" for name in NEEDS]
    lines += [f"{'platform':<12} {platform.platform()}"]
    gpus = facts.probes["torch"].values.get("gpus", "")
    lines += [f"{'GPU':<12} {gpu}" for gpu in gpus.splitlines() or ["none that torch can use"]]
    severe = [problem for problem in problems if not problem.note]
    lines += ["", f"{len(severe)} problem(s):" if severe else "No problems found."]
    for number, problem in enumerate(severe, 1):
        lines += [f"{number}. {problem.what}", f"   Fix: {problem.fix}"]
    for problem in problems:
        if problem.note:
            lines += [f"Note: {problem.what}", f"   {problem.fix}"]
    return "\n".join(lines)


def main() -> int:
    """Entry point; returns 1 if there are problems, else 0."""
    facts = gather()
    problems = diagnose(facts)
    with contextlib.suppress(BrokenPipeError):
        print(report(facts, problems))
    return int(any(not problem.note for problem in problems))


if __name__ == "__main__":
    sys.exit(main())
