# SPDX-License-Identifier: Apache-2.0
"""The doctor: silence on a healthy environment, the right name and mend for every sick one."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mmeformer import doctor
from mmeformer.doctor import Facts, Probe

ROOT = Path(__file__).resolve().parents[1]

HEALTHY = Facts(
    python=(3, 11, 7),
    executable="/my/.venv/bin/python",
    distributions={
        "mmeformer": "0.1.0",
        "packaging": "26.3",
        "setuptools": "80.10.2",
        "numpy": "2.2.6",
        "opencv-python": "4.12.0.88",
        "opencv-python-headless": "4.12.0.88",
        "torch": "2.12.1",
        "torchvision": "0.27.1",
        "timm": "1.0.31",
        "onedl-mmengine": "0.10.12",
        "onedl-mmcv": "2.3.6",
        "onedl-mmdetection": "3.5.1",
        "onedl-mmsegmentation": "1.4.2",
        "onedl-mmrotate": "1.2.1",
    },
    requirements={
        "mmeformer": (
            "torch<2.14,>=2.4",
            "torchvision",
            "timm>=1.0",
            "onedl-mmengine<0.11,>=0.10.8",
            "onedl-mmcv<2.4,>=2.3",
            "opencv-python<4.13",
            "numpy<2.3",
            "setuptools<81",
            'onedl-mmdetection<3.6,>=3.5; extra == "detection"',
            'coremltools>=9; extra == "deploy"',
        ),
        "torchvision": ("numpy", "torch (==2.12.1)"),
        "opencv-python": (
            'numpy<2.0; python_version < "3.9"',
            'numpy<2.3.0,>=2; python_version >= "3.9"',
        ),
        "onedl-mmcv": ("onedl-mmengine>=0.10.8rc1", "opencv-python", "numpy"),
        "onedl-mmsegmentation": ("numpy>2",),
    },
    requires_python="<3.13,>=3.10",
    probes={
        **{name: Probe({"version": "1.0"}) for name in doctor.NEEDS},
        "torch": Probe({"version": "2.12.1+cu130", "cuda": "13.0", "gpus": ""}),
        "torchvision": Probe({"version": "0.27.1+cu130", "cuda": "13.0"}),
        "operators": Probe({"compiler": "GCC 12.2", "cuda": ""}),
    },
)


def changed(facts=HEALTHY, *, remove=(), errors=None, probes=None, **distributions):
    """Facts with distributions added or replaced (``_`` for ``-``), removed, and failed probes."""
    installed = {name: v for name, v in facts.distributions.items() if name not in remove}
    installed |= {name.replace("_", "-"): version for name, version in distributions.items()}
    outcomes = dict(facts.probes) | (probes or {})
    outcomes |= {name: Probe(error=error) for name, error in (errors or {}).items()}
    return replace(facts, distributions=installed, probes=outcomes)


def problems(facts):
    return [finding for finding in doctor.diagnose(facts) if finding.problem]


def only_problem(facts):
    """The single problem of the facts: one cause must not be told twice."""
    found = problems(facts)
    assert len(found) == 1, found
    return found[0]


def test_healthy():
    assert doctor.diagnose(HEALTHY) == []


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 13, 0)])
def test_python_out_of_range(version):
    found = only_problem(replace(HEALTHY, python=version))
    assert f"Python 3.{version[1]}" in found.what and "<3.13,>=3.10" in found.what
    assert "PYTHON=python3.11" in found.mend


def test_mmeformer_not_installed():
    found = only_problem(replace(HEALTHY, requires_python=""))
    assert "mmeformer is not installed" in found.what and "make repair" in found.mend


def test_operators_of_lite():
    facts = changed(
        remove=["onedl-mmcv"],
        mmcv_lite="2.1.0",
        errors={"operators": "ModuleNotFoundError: No module named 'mmcv._ext'"},
    )
    found = only_problem(facts)
    assert "mmcv-lite has no operators" in found.what and "uninstall -y mmcv-lite" in found.mend


def test_operators_never_compiled():
    # Everything that needs them fails too, and must not be told.
    text = "ModuleNotFoundError: No module named 'mmcv._ext'"
    facts = changed(errors=dict.fromkeys(("operators", "mmdet", "mmseg", "mmrotate"), text))
    found = only_problem(facts)
    assert "without compiled operators" in found.what
    assert "--no-build-isolation onedl-mmcv" in found.mend and "make repair" in found.mend


def test_operators_for_another_torch():
    text = "ImportError: _ext.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocation"
    found = only_problem(changed(errors={"operators": text}))
    assert "another torch" in found.what and "undefined symbol" in found.what


def test_operators_that_fail_otherwise():
    text = "RuntimeError: nms on cuda kept boxes [0, 1] instead of [0]"
    assert text in only_problem(changed(errors={"operators": text})).what


def test_operators_without_cuda_beside_a_gpu():
    torch = Probe({"version": "2.12.1+cu130", "cuda": "13.0", "gpus": "NVIDIA A (capability 8.6)"})
    found = only_problem(changed(probes={"torch": torch}))
    assert "for the CPU only" in found.what and "CUDA toolkit 13.0" in found.mend
    operators = Probe({"compiler": "GCC 12.2", "cuda": "13.0"})
    assert problems(changed(probes={"torch": torch, "operators": operators})) == []


def test_torchvision_of_another_release():
    error = "RuntimeError: operator torchvision::nms does not exist"
    facts = changed(torch="2.13.0", errors={"torchvision": error, "timm": error, "mmdet": error})
    found = only_problem(facts)
    assert "built for torch 2.12.1, but torch 2.13.0 is installed" in found.what
    assert "one command" in found.mend


@pytest.mark.parametrize(
    "error",
    [
        "RuntimeError: operator torchvision::nms does not exist",
        "RuntimeError: Detected that PyTorch and torchvision were compiled with different CUDA "
        "major versions. PyTorch has CUDA Version=13.0 and torchvision has CUDA Version=12.8.",
    ],
)
def test_torchvision_of_another_kind_of_build_that_fails(error):
    found = only_problem(changed(errors={"torchvision": error}))
    assert "torchvision does not fit torch 2.12.1" in found.what and error in found.what


def test_torchvision_of_another_kind_of_build_that_imports():
    vision = Probe({"version": "0.27.1+cpu", "cuda": ""})
    found = only_problem(changed(probes={"torchvision": vision}))
    assert "torch is built for CUDA 13.0, but torchvision without CUDA" in found.what


@pytest.mark.parametrize(
    ("ours", "theirs", "module"),
    [
        ("onedl-mmcv", "mmcv", "mmcv"),
        ("onedl-mmcv", "mmcv-lite", "mmcv"),
        ("onedl-mmengine", "mmengine", "mmengine"),
        ("onedl-mmdetection", "mmdet", "mmdet"),
        ("onedl-mmsegmentation", "mmsegmentation", "mmseg"),
        ("onedl-mmrotate", "mmrotate", "mmrotate"),
    ],
)
def test_families_over_each_other(ours, theirs, module):
    facts = replace(HEALTHY, distributions={**HEALTHY.distributions, theirs: "2.1.0"})
    found = only_problem(facts)
    assert f"{ours} and {theirs}" in found.what and f"both provide {module}" in found.what
    assert f"pip uninstall -y {ours} {theirs}" in found.mend


def test_openmmlab_alone_is_fine():
    forks = [name for name in HEALTHY.distributions if name.startswith("onedl-")]
    facts = changed(
        remove=forks, mmengine="0.10.7", mmcv="2.1.0", mmdet="3.3.0", mmsegmentation="1.2.2"
    )
    assert problems(facts) == []
    notes = [finding.what for finding in doctor.diagnose(facts)]
    assert notes == ["mmrotate is not installed."]


def test_mixed_families_are_noted():
    facts = changed(remove=["onedl-mmdetection"], mmdet="3.3.0")
    assert problems(facts) == []
    assert ["mixed" in finding.what for finding in doctor.diagnose(facts)] == [True]


def test_numpy_out_of_range():
    found = only_problem(changed(numpy="2.4.1"))
    assert "numpy 2.4.1 is out of range" in found.what
    assert "mmeformer: numpy<2.3" in found.what and "opencv-python: numpy" in found.what
    (wanted,) = re.findall(r'pip install "numpy(.*)"', found.mend)
    assert set(wanted.split(",")) == {"<2.3", ">=2"}


def test_old_numpy_is_the_complaint_of_those_who_need_more():
    found = only_problem(changed(numpy="1.26.4"))
    assert "onedl-mmsegmentation: numpy>2" in found.what and "mmeformer:" not in found.what


def test_setuptools_out_of_range():
    found = only_problem(changed(setuptools="82.0.1"))
    assert "setuptools 82.0.1 is out of range" in found.what and '"setuptools<81"' in found.mend


@pytest.mark.parametrize("name", ["timm", "torchvision", "numpy"])
def test_missing_package(name):
    error = f"ModuleNotFoundError: No module named '{name}'"
    found = only_problem(changed(remove=[name], errors={name: error}))
    assert f"{name} is missing" in found.what and f'"{name}' in found.mend


def test_missing_packaging_is_told_instead_of_a_crash():
    found = only_problem(changed(remove=["packaging"]))
    assert "packaging is missing" in found.what


def test_headless_opencv_alone_is_fine():
    assert problems(changed(remove=["opencv-python"])) == []


def test_opencv_of_two_versions():
    found = only_problem(changed(opencv_contrib_python="4.10.0.84"))
    assert "opencv-contrib-python 4.10.0.84" in found.what and "4.12.0.88" in found.what


def test_opencv_without_graphics_library():
    error = "ImportError: libGL.so.1: cannot open shared object file: No such file or directory"
    found = only_problem(changed(errors={"cv2": error, "mmengine": error, "mmcv": error}))
    assert "graphics library" in found.what and "opencv-python-headless" in found.mend


def test_module_built_for_another_numpy():
    error = "ImportError: numpy.core.multiarray failed to import"
    found = only_problem(changed(errors={"cv2": error}))
    assert "cv2 was built for another numpy" in found.what


@pytest.mark.parametrize(("module", "extra"), doctor.OPTIONAL.items())
def test_missing_task_package_is_a_note(module, extra):
    distribution = doctor.RIVALS[module][0]
    error = f"ModuleNotFoundError: No module named '{module}'"
    facts = changed(remove=[distribution], errors={module: error})
    (note,) = doctor.diagnose(facts)
    assert not note.problem and f"mmeformer[{extra}]" in note.mend


def test_broken_task_package_is_a_problem():
    error = "AssertionError: MMCV==2.3.6 is used but incompatible."
    found = only_problem(changed(errors={"mmseg": error}))
    assert found.what == f"Importing mmseg fails: {error}."


def test_failure_is_told_where_it_begins():
    error = "ImportError: broken"
    everything = changed(errors=dict.fromkeys(doctor.NEEDS, error))
    assert [found.what.split()[1] for found in problems(everything)] == ["numpy", "torch"]
    errors = {name: error for name in doctor.NEEDS if name not in ("numpy", "torch", "cv2")}
    assert [found.what.split()[1] for found in problems(changed(errors=errors))] == [
        "torchvision",
        "mmengine",
    ]


def test_needs_are_listed_before_what_needs_them():
    seen = set()
    for name, needs in doctor.NEEDS.items():
        assert set(needs) <= seen, name
        seen.add(name)


# --- probes and the command -----------------------------------------------------------------------


def trial(name):
    """Stands in for an import in the child process; must be importable there."""
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "exits":
        os._exit(3)
    return Probe({"version": name})


def test_import_that_ends_its_process_is_told_and_the_rest_goes_on():
    outcomes = doctor.run_probes(("a", "killed", "b", "exits", "c"), trial)
    assert list(outcomes) == ["a", "killed", "b", "exits", "c"]
    assert "ended its process" in outcomes["killed"].error == outcomes["exits"].error
    assert [outcomes[name].values["version"] for name in "abc"] == ["a", "b", "c"]


def test_probe_survives_whatever_an_import_raises(tmp_path, monkeypatch):
    (tmp_path / "leaver.py").write_text("raise SystemExit('bye\\n  for now')")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.run_probe("leaver") == Probe(error="SystemExit: bye for now")
    assert doctor.run_probe("no_such_module").error.startswith("ModuleNotFoundError")


def test_report_names_everything():
    torch = Probe({"version": "2.12.1+cu130", "cuda": "13.0", "gpus": "NVIDIA A\nNVIDIA B"})
    facts = changed(setuptools="82.0.1", probes={"torch": torch}, remove=["onedl-mmrotate"])
    facts = changed(facts, errors={"mmrotate": "ModuleNotFoundError: No module named 'mmrotate'"})
    text = doctor.report(facts, doctor.diagnose(facts))
    assert re.search(r"^mmcv +1\.0 +onedl-mmcv 2\.3\.6$", text, re.MULTILINE)
    assert re.search(r"^mmrotate +not installed$", text, re.MULTILINE)
    assert re.search(r"^operators +compiled for the CPU \(GCC 12\.2\), not for CUDA$", text, re.M)
    assert re.search(r"^GPU +NVIDIA A\nGPU +NVIDIA B$", text, re.MULTILINE)
    assert "2 problem(s):\n1. " in text and "\n2. " in text and "\nNote: mmrotate" in text
    assert "No problems found." in doctor.report(HEALTHY, [])


def run_doctor(**environment):
    return subprocess.run(
        [sys.executable, "-m", "mmeformer.doctor"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_command_on_this_environment():
    reply = run_doctor()
    assert reply.stderr == ""
    assert all(re.search(rf"^{name} +\S", reply.stdout, re.MULTILINE) for name in doctor.NEEDS)
    # The tests themselves need compiled operators, so whatever else is wrong, these are there.
    assert "compiled for the CPU" in reply.stdout
    assert reply.returncode == ("No problems found." not in reply.stdout)


def test_command_names_broken_imports(tmp_path):
    (tmp_path / "mmengine").mkdir()
    (tmp_path / "mmengine" / "__init__.py").write_text("import os\nos.abort()\n")
    (tmp_path / "timm.py").write_text("raise RuntimeError('half-installed')\n")
    reply = run_doctor(PYTHONPATH=str(tmp_path))
    assert reply.returncode == 1
    assert "Importing mmengine fails: the import ended its process" in reply.stdout
    assert "Importing timm fails: RuntimeError: half-installed." in reply.stdout
    assert "Importing mmcv" not in reply.stdout
    assert "Traceback" not in reply.stdout + reply.stderr


def test_nothing_heavy_is_imported_with_the_module():
    code = "import mmeformer.doctor, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "numpy", "cv2", "mmengine", "mmcv", "mmdet", "timm"} & set(loaded)
