# SPDX-License-Identifier: Apache-2.0
"""``python -m mmeformer.doctor``: what is installed, what is wrong with it, and how to mend that.

:func:`gather` collects :class:`Facts` from the running interpreter, :func:`diagnose` turns facts
into findings without touching the system, and :func:`report` words both. Every import is tried in a
process apart, since a library built for another torch may end its process instead of raising.
"""

import contextlib
import importlib
import importlib.metadata
import multiprocessing
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

# Distributions that install the same import name; at most one of each row can work.
RIVALS = {
    "mmengine": ("onedl-mmengine", "mmengine", "mmengine-lite"),
    "mmcv": ("onedl-mmcv", "mmcv", "mmcv-lite", "mmcv-full"),
    "mmdet": ("onedl-mmdetection", "mmdet"),
    "mmseg": ("onedl-mmsegmentation", "mmsegmentation"),
    "mmrotate": ("onedl-mmrotate", "mmrotate"),
}
OPENCV = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)
# Task packages, and the extra of mmeformer that installs each.
OPTIONAL = {"mmdet": "detection", "mmseg": "segmentation", "mmrotate": "rotated"}
# What is imported, in this order, and what each one needs: a failure is reported where it begins.
NEEDS = {
    "numpy": (),
    "cv2": ("numpy",),
    "torch": (),
    "torchvision": ("torch",),
    "timm": ("torchvision",),
    "mmengine": ("cv2", "torch"),
    "mmcv": ("mmengine",),
    "operators": ("mmcv",),
    "mmdet": ("torchvision", "operators"),
    "mmseg": ("operators",),
    "mmrotate": ("mmdet",),
    "mmeformer": ("mmengine", "timm"),
}


@dataclass(frozen=True)
class Probe:
    """Outcome of importing one entry of :data:`NEEDS`.

    Attributes:
        values: what was learnt, for example ``{"version": "2.12.1+cu130", "cuda": "13.0"}``.
        error: one line, or "" when the import and the trial behind it worked.
    """

    values: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Facts:
    """All that :func:`diagnose` looks at.

    Attributes:
        python: ``(major, minor, micro)``.
        executable: path of the interpreter.
        distributions: canonical distribution name to version, for everything installed.
        requirements: canonical distribution name to its ``Requires-Dist`` lines.
        requires_python: mmeformer's ``Requires-Python``, "" if mmeformer is not installed.
        probes: import outcome per entry of :data:`NEEDS`.
    """

    python: tuple[int, int, int]
    executable: str
    distributions: Mapping[str, str]
    requirements: Mapping[str, tuple[str, ...]]
    requires_python: str
    probes: Mapping[str, Probe]

    def provider(self, module: str) -> str:
        """Distributions that install ``module``, as "name version, ..."; "" if there is none."""
        names = RIVALS.get(module, OPENCV if module == "cv2" else (module,))
        return ", ".join(f"{n} {self.distributions[n]}" for n in names if n in self.distributions)


@dataclass(frozen=True)
class Finding:
    """Something to tell the user.

    Attributes:
        what: the problem in one sentence.
        mend: the way out, a command where there is one.
        problem: False for a note, which leaves the exit status at 0.
    """

    what: str
    mend: str
    problem: bool = True


# --- gathering ------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    """Distribution name in the spelling that package indexes compare by (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def probe_torch() -> dict[str, str]:
    """Version, CUDA version ("" for a CPU build) and GPUs, one per line."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            gpus.append(f"{torch.cuda.get_device_name(index)} (capability {major}.{minor})")
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda or "",
        "gpus": "\n".join(gpus),
    }


def probe_torchvision() -> dict[str, str]:
    """Version and CUDA version, after running its own non-maximum suppression."""
    import torch
    import torchvision

    torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    # torchvision gives the number of cuda.h: 13000 for 13.0; a CPU build has none.
    number = int(getattr(torchvision.version, "cuda", 0))
    cuda = f"{number // 1000}.{number % 1000 // 10}" if number else ""
    return {"version": torchvision.__version__, "cuda": cuda}


def probe_operators() -> dict[str, str]:
    """Compiler and CUDA version ("" without CUDA), after running NMS on the CPU and on a GPU."""
    import torch
    from mmcv.ops import get_compiler_version, get_compiling_cuda_version, nms

    cuda = get_compiling_cuda_version()
    cuda = "" if cuda == "not available" else cuda
    devices = ["cpu", "cuda"] if cuda and torch.cuda.is_available() else ["cpu"]
    for device in devices:
        boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [1.0, 0.0, 9.0, 9.0]], device=device)
        kept = nms(boxes, torch.tensor([0.9, 0.8], device=device), 0.5)[1].tolist()
        if kept != [0]:
            raise RuntimeError(f"nms on {device} kept boxes {kept} instead of [0]")
    return {"compiler": get_compiler_version(), "cuda": cuda}


def probe_mmeformer() -> dict[str, str]:
    """Version, after importing the backbones."""
    importlib.import_module("mmeformer.backbones")
    return {"version": importlib.import_module("mmeformer.version").__version__}


def probe_version(module: str) -> dict[str, str]:
    """Version of any other module, after importing it."""
    return {"version": str(getattr(importlib.import_module(module), "__version__", ""))}


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
    # A broken import may raise anything, SystemExit included, and each is a finding.
    except BaseException as error:
        text = " ".join(str(error).split())
        return Probe(error=f"{type(error).__name__}: {text}")


def _hush() -> None:
    # Some packages greet on import; the report says all that matters.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)


def run_probes(names: tuple[str, ...], run: Callable[[str], Probe] = run_probe) -> dict[str, Probe]:
    """Run probes one after the other in a child process, a fresh one after each that kills it.

    Args:
        names: what to probe.
        run: function for one name; must be importable by the child.
    """
    outcomes: dict[str, Probe] = {}
    context = multiprocessing.get_context("spawn")
    while len(outcomes) < len(names):
        with ProcessPoolExecutor(1, mp_context=context, initializer=_hush) as pool:
            for name in names[len(outcomes) :]:
                try:
                    outcomes[name] = pool.submit(run, name).result()
                except BrokenProcessPool:
                    outcomes[name] = Probe(error="the import ended its process without a message")
                    break
    return outcomes


def gather() -> Facts:
    """Facts about the interpreter that runs this."""
    distributions, requirements, requires_python = {}, {}, ""
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        # A half-removed distribution leaves metadata without a name.
        if not name or canonical(name) in distributions:
            continue
        distributions[canonical(name)] = distribution.version
        requirements[canonical(name)] = tuple(distribution.requires or ())
        if canonical(name) == "mmeformer":
            requires_python = distribution.metadata["Requires-Python"] or ""
    return Facts(
        python=tuple(sys.version_info[:3]),
        executable=sys.executable,
        distributions=distributions,
        requirements=requirements,
        requires_python=requires_python,
        probes=run_probes(tuple(NEEDS)),
    )


# --- judging --------------------------------------------------------------------------------------


def check_python(facts: Facts) -> Iterator[Finding]:
    """Python outside the range that mmeformer declares, or mmeformer not installed at all."""
    if not facts.requires_python:
        yield Finding(
            "mmeformer is not installed into this environment, only found on the path.",
            "in a checkout: make repair (or: pip install --no-deps -e .)",
        )
        return
    from packaging.specifiers import SpecifierSet

    version = ".".join(map(str, facts.python))
    if version not in SpecifierSet(facts.requires_python):
        yield Finding(
            f"Python {version} is outside of {facts.requires_python}.",
            "make the environment with another interpreter: rm -r .venv && "
            "make PYTHON=python3.11 install",
        )


def check_rivals(facts: Facts) -> Iterator[Finding]:
    """OpenMMLab's distributions and the forks (or lite and full ones) over each other."""
    for module, names in RIVALS.items():
        present = [name for name in names if name in facts.distributions]
        if len(present) > 1:
            yield Finding(
                f"{' and '.join(present)} are installed over each other: both provide {module}.",
                f"pip uninstall -y {' '.join(present)}, then make repair (or install one of them)",
            )
    families = {
        name.startswith("onedl-")
        for names in RIVALS.values()
        for name in names
        if name in facts.distributions
    }
    if len(families) == 2:
        yield Finding(
            "OpenMMLab's distributions and the onedl forks are mixed.",
            "keep to one family; the onedl forks are the tested one (see CONTRIBUTING.md)",
            problem=False,
        )


def check_opencv(facts: Facts) -> Iterator[Finding]:
    """Several builds of OpenCV of different versions, which overwrite each other's files."""
    present = {n: facts.distributions[n] for n in OPENCV if n in facts.distributions}
    if len(set(present.values())) > 1:
        listed = ", ".join(f"{name} {version}" for name, version in present.items())
        yield Finding(
            f"OpenCV is installed in different versions over each other: {listed}.",
            f"pip uninstall -y {' '.join(present)}, then make repair (or install one of them)",
        )


def check_requirements(facts: Facts) -> Iterator[Finding]:
    """Versions out of the range that mmeformer or a package beneath it declares."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    watched = ["mmeformer", "torch", "torchvision", "timm", *OPENCV]
    watched += [name for names in RIVALS.values() for name in names]
    # The name alone decides for OpenMMLab's family, which is installed without the forks.
    rival_of = {name: names for names in (*RIVALS.values(), OPENCV) for name in names}
    # What is wrong -> for whom, and what would be right for all of them.
    complaints: dict[str, dict[str, Requirement]] = {}
    for owner in watched:
        for line in facts.requirements.get(owner, ()):
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            name = canonical(requirement.name)
            installed = facts.distributions.get(name)
            if installed is None:
                if not any(rival in facts.distributions for rival in rival_of.get(name, ())):
                    complaints.setdefault(f"{name} is missing", {})[owner] = requirement
            elif not requirement.specifier.contains(installed, prereleases=True):
                what = f"{name} {installed} is out of range"
                complaints.setdefault(what, {})[owner] = requirement
    for what, wanted in complaints.items():
        if what.startswith("torch ") and "torchvision" in wanted:
            # check_torchvision tells it better.
            continue
        reasons = "; ".join(
            f"{owner}: {canonical(r.name)}{r.specifier}" for owner, r in wanted.items()
        )
        specifiers = SpecifierSet()
        for requirement in wanted.values():
            specifiers &= requirement.specifier
        yield Finding(
            f"{what} ({reasons}).",
            f'make repair (or: pip install "{what.split()[0]}{specifiers}")',
        )


def check_torchvision(facts: Facts) -> Iterator[Finding]:
    """torch and torchvision of different releases, or of different kinds of build."""
    torch, vision = facts.probes["torch"], facts.probes["torchvision"]
    installed = facts.distributions.get("torch", "")
    wanted = [
        match.group(1)
        for line in facts.requirements.get("torchvision", ())
        if (match := re.match(r"torch\s*\(?==([0-9.]+)\)?", line))
    ]
    reason = ""
    if wanted and installed and installed.split("+")[0] != wanted[0]:
        reason = f"torchvision was built for torch {wanted[0]}, but torch {installed} is installed"
    elif re.search(r"torchvision::nms|different CUDA major versions", vision.error):
        reason = f"torchvision does not fit torch {installed} ({vision.error})"
    elif not torch.error and not vision.error:
        kinds = [probe.values["cuda"] for probe in (torch, vision)]
        if kinds[0].split(".")[0] != kinds[1].split(".")[0]:
            kinds = [f"for CUDA {kind}" if kind else "without CUDA" for kind in kinds]
            reason = f"torch is built {kinds[0]}, but torchvision {kinds[1]}"
    if reason:
        yield Finding(
            f"{reason}.",
            "install both in one command and from one place: make repair (or: pip install "
            "--force-reinstall torch==VERSION torchvision==VERSION)",
        )


def check_operators(facts: Facts) -> Iterator[Finding]:
    """mmcv without compiled operators, with such for another torch, or without CUDA on a GPU."""
    operators = facts.probes["operators"]
    compile_again = (
        "make repair; outside a checkout, with torch installed: pip install --force-reinstall "
        "--no-deps --no-cache-dir --no-build-isolation onedl-mmcv"
    )
    if not operators.error:
        if facts.probes["torch"].values.get("gpus") and not operators.values["cuda"]:
            yield Finding(
                "There is a GPU, but the mmcv operators are compiled for the CPU only: training on "
                "the GPU will fail.",
                f"install the CUDA toolkit {facts.probes['torch'].values['cuda']} (nvcc), then "
                "make repair",
            )
    elif failed_need("operators", facts):
        return
    elif "mmcv-lite" in facts.distributions:
        yield Finding(
            "mmcv-lite has no operators.", f"pip uninstall -y mmcv-lite, then {compile_again}"
        )
    elif "mmcv._ext" in operators.error:
        yield Finding(
            "mmcv is installed without compiled operators: torch was not there while it was built.",
            compile_again,
        )
    elif "undefined symbol" in operators.error or "Symbol not found" in operators.error:
        yield Finding(
            f"The mmcv operators were compiled for another torch ({operators.error}).",
            compile_again,
        )
    else:
        yield Finding(f"The mmcv operators do not work: {operators.error}.", compile_again)


def failed_need(name: str, facts: Facts) -> str:
    """The entry whose failure already explains that ``name`` fails, or ""."""
    for need in NEEDS[name]:
        if facts.probes[need].error:
            return need
        if deeper := failed_need(need, facts):
            return deeper
    return ""


def check_imports(facts: Facts) -> Iterator[Finding]:
    """Imports that fail for any other reason, and task packages that are not installed."""
    for name, probe in facts.probes.items():
        installed = bool(facts.provider(name))
        if name in OPTIONAL and not installed:
            yield Finding(
                f"{name} is not installed.",
                f'for that task: pip install "mmeformer[{OPTIONAL[name]}]"',
                problem=False,
            )
        elif not probe.error or name == "operators" or failed_need(name, facts):
            continue
        elif facts.requires_python and not installed:
            # check_requirements names what is missing.
            continue
        elif name == "torchvision" and next(check_torchvision(facts), None):
            continue
        elif "libGL.so" in probe.error or "libgthread" in probe.error:
            yield Finding(
                f"OpenCV needs a graphics library that this machine lacks ({probe.error}).",
                "make repair (or: pip install --force-reinstall --no-deps opencv-python-headless)",
            )
        elif re.search(
            r"_ARRAY_API|numpy\.core\.multiarray|numpy\.dtype size changed", probe.error
        ):
            yield Finding(
                f"{name} was built for another numpy ({probe.error}).",
                'make repair (or: pip install "numpy<2.3")',
            )
        else:
            yield Finding(f"Importing {name} fails: {probe.error}.", "make repair")


def diagnose(facts: Facts) -> list[Finding]:
    """All findings, from what lies deepest to what rests on it; empty if all is well."""
    checks = [check_rivals, check_opencv, check_torchvision, check_operators, check_imports]
    if "packaging" in facts.distributions:
        checks = [check_python, check_requirements, *checks]
        missing = []
    else:
        missing = [Finding("packaging is missing.", "make repair (or: pip install packaging)")]
    return missing + [finding for check in checks for finding in check(facts)]


# --- telling --------------------------------------------------------------------------------------


def describe(name: str, facts: Facts) -> str:
    """The text behind one name in the table of versions."""
    probe = facts.probes[name]
    if name == "operators":
        if probe.error:
            return "not compiled or not working"
        cuda = f"CUDA {probe.values['cuda']}" if probe.values["cuda"] else "not for CUDA"
        return f"compiled for the CPU ({probe.values['compiler']}), {cuda}"
    provider = facts.provider(name)
    if probe.error:
        return f"fails to import   {provider}" if provider else "not installed"
    return f"{probe.values['version']:<16} {provider}"


def report(facts: Facts, findings: list[Finding]) -> str:
    """The text for the terminal: versions, GPUs, problems with their mends, notes."""
    lines = [f"{'python':<12} {'.'.join(map(str, facts.python)):<16} {facts.executable}"]
    lines += [f"{name:<12} {describe(name, facts)}" for name in NEEDS]
    setuptools = facts.distributions.get("setuptools", "not installed")
    lines += [f"{'setuptools':<12} {setuptools}", f"{'platform':<12} {platform.platform()}"]
    gpus = facts.probes["torch"].values.get("gpus", "")
    lines += [f"{'GPU':<12} {gpu}" for gpu in gpus.splitlines() or ["none that torch can use"]]
    problems = [finding for finding in findings if finding.problem]
    lines += ["", f"{len(problems)} problem(s):" if problems else "No problems found."]
    for number, finding in enumerate(problems, 1):
        lines += [f"{number}. {finding.what}", f"   Mend: {finding.mend}"]
    for finding in findings:
        if not finding.problem:
            lines += [f"Note: {finding.what}", f"   {finding.mend}"]
    return "\n".join(lines)


def main() -> int:
    """Entry point; returns 1 if there are problems, else 0."""
    facts = gather()
    findings = diagnose(facts)
    with contextlib.suppress(BrokenPipeError):
        print(report(facts, findings))
    return int(any(finding.problem for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
