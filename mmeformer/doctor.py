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

# Distributions that install the same import name. Only one of a row can be installed, except builds
# of OpenCV in one version.
RIVALS = {
    "mmengine": ("onedl-mmengine", "mmengine", "mmengine-lite"),
    "mmcv": ("onedl-mmcv", "mmcv", "mmcv-lite", "mmcv-full"),
    "mmdet": ("onedl-mmdetection", "mmdet"),
    "mmseg": ("onedl-mmsegmentation", "mmsegmentation"),
    "mmrotate": ("onedl-mmrotate", "mmrotate"),
    "mmpretrain": ("onedl-mmpretrain", "mmpretrain"),
    "cv2": tuple(
        f"opencv-{kind}python{tail}" for kind in ("", "contrib-") for tail in ("", "-headless")
    ),
}
# Task packages, and the extra of mmeformer that installs each.
OPTIONAL = {task.scope: task.name for task in TASKS.values()}
# Required by mmdet, but used by its lane detection only (mmeformer/without_imgaug.py).
NOT_NEEDED = ("imaug", "imgaug")
# The imports that are tried, in this order, and those that each needs: of failures that follow from
# each other, only the first is reported.
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
    "mmpretrain": ("operators",),
    "mmeformer": ("mmengine", "timm"),
}
# Modules that an import of the package alone leaves out, though every task needs them.
INSIDE = {"mmdet": "mmdet.datasets", "mmeformer": "mmeformer.backbones"}
TORCH_FIX = (
    "install both in one command and from one source: make repair (or: pip install "
    "--force-reinstall torch==VERSION torchvision==VERSION)"
)
# Patterns of error messages, and the fix.
KNOWN_FAILURES = {
    r"torchvision::nms|different CUDA major versions": TORCH_FIX,
    r"libGL\.so|libgthread": "install only the OpenCV that needs no graphics library: "
    "pip uninstall -y opencv-python opencv-python-headless && "
    "pip install --no-deps opencv-python-headless",
    r"_ARRAY_API|numpy\.core\.multiarray|numpy\.dtype size changed": "it was built for another "
    "numpy: make repair (or reinstall it together with numpy)",
    r"pkg_resources": "newer setuptools do not have it: pip install 'setuptools<81'",
    r"MMEFORMER_OPERATORS": "unset MMEFORMER_OPERATORS",
    r"mmcv-lite": "pip uninstall -y mmcv-lite && pip install onedl-mmcv",
    r"undefined symbol|Symbol not found|_ext|CPU only": "use the operators that need no compiling: "
    "make repair (or: pip install --force-reinstall --no-deps --no-cache-dir onedl-mmcv); or "
    "compile them for this torch and GPU: make install-compiled",
}


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
    """Everything that :func:`diagnose` looks at. Distributions have canonical names.

    Attributes:
        python: version, such as "3.11.7".
        distributions: version of every installed distribution.
        requirements: ``Requires-Dist`` lines of every installed distribution.
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

    def providers(self, module: str) -> dict[str, str]:
        """Name and version of the installed distributions that provide ``module``."""
        names = RIVALS.get(module, (module,))
        return {name: self.distributions[name] for name in names if name in self.distributions}


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


def probe_import(module: str) -> dict[str, str]:
    """Version of any other module, after importing it."""
    version = getattr(importlib.import_module(module), "__version__", "")
    importlib.import_module(INSIDE.get(module, module))
    return {"version": str(version)}


PROBES = {"torch": probe_torch, "operators": probe_operators}


def run_probe(name: str) -> Probe:
    """Run one probe in this process; any failure becomes the outcome's ``error``."""
    try:
        return Probe(PROBES[name]() if name in PROBES else probe_import(name))
    # A broken import may raise anything, SystemExit included.
    except BaseException as error:
        kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
        return Probe(error=kind + " ".join(str(error).split()))


def silence() -> None:
    """Discard what this process prints: some packages print at their import."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def run_probes(names: tuple[str, ...], run: Callable[[str], Probe] = run_probe) -> dict[str, Probe]:
    """Run probes one after the other in a child process, which is replaced if a probe kills it.

    Args:
        names: keys of :data:`NEEDS`.
        run: function for one name; must be importable by the child.
    """
    outcomes: dict[str, Probe] = {}
    context = multiprocessing.get_context("spawn")
    while len(outcomes) < len(names):
        with ProcessPoolExecutor(1, mp_context=context, initializer=silence) as pool:
            for name in names[len(outcomes) :]:
                try:
                    outcomes[name] = pool.submit(run, name).result()
                except BrokenProcessPool:
                    outcomes[name] = Probe(error="the import ended its process without a message")
                    break
    return outcomes


def driver_gpus() -> str:
    """GPUs that the NVIDIA driver lists, one per line; "" without a driver."""
    command = ["nvidia-smi", "-L"]
    try:
        reply = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "\n".join(line for line in reply.stdout.splitlines() if line.startswith("GPU "))


def gather() -> Facts:
    """Facts about the interpreter that runs this."""
    # Of two with one name the first is imported; a half removed one has metadata without a name.
    installed = {
        canonical(distribution.metadata["Name"] or ""): distribution
        for distribution in reversed([*importlib.metadata.distributions()])
    }
    installed.pop("", None)
    ours = installed.get("mmeformer")
    return Facts(
        python=platform.python_version(),
        distributions={name: found.version for name, found in installed.items()},
        requirements={name: tuple(found.requires or ()) for name, found in installed.items()},
        requires_python=(ours and ours.metadata["Requires-Python"]) or "",
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
        what = f"Python {facts.python} is outside of {facts.requires_python}."
        yield Problem(what, "make PYTHON=python3.11 repair")


def check_rivals(facts: Facts) -> Iterator[Problem]:
    """Distributions that overwrite each other's files."""
    for module in RIVALS:
        found = facts.providers(module)
        if len(found) > 1 and (module != "cv2" or len(set(found.values())) > 1):
            listed = ", ".join(f"{name} {version}" for name, version in found.items())
            yield Problem(
                f"Distributions are installed over each other: {listed} all provide {module}.",
                f"pip uninstall -y {' '.join(found)}, then make repair (or install one of them)",
            )


def check_requirements(facts: Facts) -> Iterator[Problem]:
    """Missing packages, and versions out of the range that mmeformer or the forks declare."""
    from packaging.requirements import Requirement

    # Another distribution with the same import name satisfies a requirement too.
    rivals = {name: names for names in RIVALS.values() for name in names}
    complaints: dict[str, list[tuple[str, str]]] = {}
    for owner in ("mmeformer", "torch", "torchvision", "timm", *rivals):
        for requirement in map(Requirement, facts.requirements.get(owner, ())):
            name, marker = canonical(requirement.name), requirement.marker
            if name in NOT_NEEDED or (marker and not marker.evaluate({"extra": ""})):
                continue
            installed = facts.distributions.get(name)
            if installed and not requirement.specifier.contains(installed, prereleases=True):
                what = f"{name} {installed} is out of range"
            elif not installed and facts.distributions.keys().isdisjoint(rivals.get(name, ())):
                what = f"{name} is missing"
            else:
                continue
            complaints.setdefault(what, []).append((owner, str(requirement.specifier)))
    for what, wishes in complaints.items():
        name = what.split()[0]
        listed = "; ".join(f"{owner}: {name}{wanted}" for owner, wanted in wishes)
        wanted = ",".join(wanted for _, wanted in wishes if wanted)
        pinned = name == "torch" and "torchvision" in dict(wishes)
        fix = TORCH_FIX if pinned else f'make repair (or: pip install "{name}{wanted}")'
        yield Problem(f"{what} ({listed}).", fix)


def check_gpu(facts: Facts) -> Iterator[Problem]:
    """A GPU that torch cannot use."""
    torch = facts.probes["torch"]
    if facts.driver_gpus and not torch.error and not torch.values["gpus"]:
        if cuda := torch.values["cuda"]:
            why = f"the driver may be too old for CUDA {cuda}"
            fix = "update the NVIDIA driver, or install a torch for an older CUDA"
        else:
            why, fix = "it is a CPU build", "make repair (or install a CUDA build of torch)"
        yield Problem(f"There is an NVIDIA GPU that torch cannot use: {why}.", fix, note=True)


def known_fix(error: str) -> str | None:
    """The fix for an import that failed with this message, or None."""
    found = (fix for pattern, fix in KNOWN_FAILURES.items() if re.search(pattern, error))
    return next(found, None)


def check_imports(facts: Facts, told: list[Problem]) -> Iterator[Problem]:
    """Imports and trials that fail, and task packages that are not installed.

    Args:
        facts: all facts.
        told: problems found before, which may explain a failure.
    """
    explained = {"torchvision"} if any(problem.fix == TORCH_FIX for problem in told) else set()
    for name, needs in NEEDS.items():
        error = facts.probes[name].error
        if not error:
            continue
        installed = name == "operators" or bool(facts.providers(name))
        if name in OPTIONAL and not installed:
            extra = f'for that task: pip install "mmeformer[{OPTIONAL[name]}]"'
            yield Problem(f"{name} is not installed.", extra, note=True)
        # Of what is not installed, check_requirements has told.
        elif explained.isdisjoint((name, *needs)) and (installed or not facts.requires_python):
            yield Problem(f"{name} does not work: {error}.", known_fix(error) or "make repair")
        explained.add(name)


def diagnose(facts: Facts) -> list[Problem]:
    """All problems, causes before consequences; empty if there are none."""
    if "packaging" in facts.distributions:
        problems = [*check_python(facts), *check_requirements(facts)]
    else:
        problems = [Problem("packaging is missing.", "make repair (or: pip install packaging)")]
    problems += [*check_rivals(facts), *check_gpu(facts)]
    return problems + list(check_imports(facts, problems))


# --- reporting ------------------------------------------------------------------------------------


def describe(name: str, facts: Facts) -> str:
    """The text after one name in the table of versions."""
    probe = facts.probes[name]
    provider = ", ".join(f"{key} {version}" for key, version in facts.providers(name).items())
    if not probe.error:
        return f"{probe.values['version']:<16} {probe.values.get('reason', provider)}"
    return f"{'fails':<16} {provider}" if provider or name == "operators" else "not installed"


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
