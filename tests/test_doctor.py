# SPDX-License-Identifier: Apache-2.0
"""The doctor: silence on a healthy environment, the right name and fix for every other."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from probe_trial import trial

from mmeformer import doctor
from mmeformer.doctor import Facts, Probe

ROOT = Path(__file__).resolve().parents[1]

HEALTHY = Facts(
    python="3.11.7",
    distributions={
        "mmeformer": "0.1.0",
        "packaging": "26.3",
        "numpy": "2.4.6",
        "opencv-python-headless": "5.0.0.93",
        "torch": "2.12.1",
        "torchvision": "0.27.1",
        "timm": "1.0.31",
        "onedl-mmengine": "0.10.12",
        "onedl-mmcv": "2.3.6",
        "onedl-mmdetection": "3.5.1",
        "onedl-mmsegmentation": "1.4.2",
        "onedl-mmrotate": "1.2.1",
        "onedl-mmpretrain": "1.3.6",
    },
    requirements={
        "mmeformer": (
            "torch>=2.6",
            "torchvision",
            "timm>=1.0",
            "onedl-mmengine<0.11,>=0.10.8",
            "onedl-mmcv<2.4,>=2.3",
            "opencv-python-headless",
            "numpy>=1.26",
            'onedl-mmdetection<3.6,>=3.5; extra == "detection"',
            'coremltools>=9; extra == "deploy"',
        ),
        "torchvision": ("numpy", "torch (==2.12.1)"),
        "opencv-python-headless": ('numpy<2.0; python_version < "3.9"', "numpy>=2"),
        "onedl-mmcv": ("onedl-mmengine>=0.10.8rc1", "opencv-python", "numpy"),
        "onedl-mmdetection": ("imaug", "numpy"),
        "onedl-mmsegmentation": ("numpy>2",),
    },
    requires_python="<3.14,>=3.10",
    probes={
        **{name: Probe({"version": "1.0"}) for name in doctor.NEEDS},
        "torch": Probe({"version": "2.12.1+cu130", "cuda": "13.0", "gpus": ""}),
        "operators": Probe({"version": "torch", "reason": "mmcv has no compiled operators"}),
    },
)


def changed(*, remove=(), errors=None, **distributions):
    """Facts with distributions added or replaced (``_`` for ``-``), removed, and failed probes."""
    installed = {name: v for name, v in HEALTHY.distributions.items() if name not in remove}
    installed |= {name.replace("_", "-"): version for name, version in distributions.items()}
    errors = {name: Probe(error=error) for name, error in (errors or {}).items()}
    return replace(HEALTHY, distributions=installed, probes={**HEALTHY.probes, **errors})


def only_problem(facts, note=False):
    """The single problem of the facts: one cause must not be told twice."""
    (found,) = doctor.diagnose(facts)
    assert found.note == note
    return found


def test_healthy():
    # Although mmdet's requirement imaug is missing, and mmcv's opencv-python.
    assert doctor.diagnose(HEALTHY) == []


@pytest.mark.parametrize("version", ["3.9.18", "3.14.0"])
def test_python_out_of_range(version):
    found = only_problem(replace(HEALTHY, python=version))
    assert f"Python {version} is outside of <3.14,>=3.10" in found.what
    assert "PYTHON=python3.11" in found.fix


def test_mmeformer_not_installed():
    found = only_problem(replace(HEALTHY, requires_python=""))
    assert "mmeformer is not installed" in found.what and "make repair" in found.fix


@pytest.mark.parametrize(
    ("name", "error", "fix"),
    [
        ("operators", "ImportError: _ext.so: undefined symbol: _ZN3c10", "make install-compiled"),
        ("operators", "mmcv's operators are compiled for the CPU only, but", "install-compiled"),
        ("operators", "OperatorsError: MMEFORMER_OPERATORS is 'on'", "unset MMEFORMER_OPERATORS"),
        (
            "operators",
            "this mmcv has no mmcv.ops (mmcv-lite leaves it out)",
            "uninstall -y mmcv-lite",
        ),
        ("torchvision", "RuntimeError: operator torchvision::nms does not exist", "in one command"),
        (
            "operators",
            "NotImplementedError: Could not run 'torchvision::nms' with arguments from 'CUDA'",
            "in one command",
        ),
        (
            "cv2",
            "ImportError: libGL.so.1: cannot open shared object file",
            "uninstall -y opencv-python ",
        ),
        ("cv2", "AttributeError: _ARRAY_API not found", "another numpy"),
        ("mmengine", "ModuleNotFoundError: No module named 'pkg_resources'", "setuptools<81"),
        ("mmseg", "ValueError: something else", "make repair"),
    ],
)
def test_import_or_trial_that_fails(name, error, fix):
    found = only_problem(changed(errors={name: error}))
    assert found.what == f"{name} does not work: {error}." and fix in found.fix


def test_torchvision_of_another_release():
    error = "RuntimeError: operator torchvision::nms does not exist"
    found = only_problem(changed(torch="2.13.0", errors={"torchvision": error}))
    assert "torch 2.13.0 is out of range (torchvision: torch==2.12.1)" in found.what
    assert "in one command" in found.fix


@pytest.mark.parametrize(("cuda", "why"), [("13.0", "driver may be too old"), ("", "CPU build")])
def test_gpu_that_torch_cannot_use_is_a_note(cuda, why):
    facts = replace(
        HEALTHY,
        driver_gpus="GPU 0: NVIDIA A",
        probes=HEALTHY.probes | {"torch": Probe({"version": "2.12.1", "cuda": cuda, "gpus": ""})},
    )
    assert why in only_problem(facts, note=True).what


@pytest.mark.parametrize(
    ("rival", "module"),
    [("mmcv", "mmcv"), ("mmcv-lite", "mmcv"), ("mmengine", "mmengine"), ("mmdet", "mmdet")],
)
def test_families_over_each_other(rival, module):
    found = only_problem(changed(**{rival: "9.0"}))
    assert f"{rival} 9.0 all provide {module}" in found.what and f"{rival}, then" in found.fix


def test_openmmlab_alone_is_fine():
    ours = ["onedl-mmengine", "onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation"]
    facts = changed(
        remove=[*ours, "onedl-mmrotate", "onedl-mmpretrain"],
        mmengine="0.10.7",
        mmcv="2.1.0",
        mmdet="3.3.0",
        mmsegmentation="1.2.2",
        mmrotate="1.0.0rc1",
        mmpretrain="1.2.0",
    )
    assert doctor.diagnose(facts) == []


def test_out_of_range():
    found = only_problem(changed(numpy="1.26.4"))
    owners = "onedl-mmsegmentation: numpy>2; opencv-python-headless: numpy>=2"
    assert f"numpy 1.26.4 is out of range ({owners})" in found.what
    assert 'pip install "numpy>2,>=2"' in found.fix


@pytest.mark.parametrize("name", ["timm", "torchvision", "numpy"])
def test_missing_package(name):
    error = f"ModuleNotFoundError: No module named '{name}'"
    found = only_problem(changed(remove=[name], errors={name: error}))
    assert f"{name} is missing" in found.what and f'pip install "{name}' in found.fix


def test_missing_packaging_is_told_instead_of_a_crash():
    assert "packaging is missing" in only_problem(changed(remove=["packaging"])).what


def test_opencv_of_two_versions():
    found = only_problem(changed(opencv_python="4.12.0.88"))
    assert "opencv-python 4.12.0.88, opencv-python-headless 5.0.0.93 all provide cv2" in found.what
    assert doctor.diagnose(changed(opencv_python="5.0.0.93")) == []


@pytest.mark.parametrize(("module", "extra"), doctor.OPTIONAL.items())
def test_missing_task_package_is_a_note(module, extra):
    (name,) = {name for name in doctor.RIVALS[module] if name in HEALTHY.distributions}
    error = f"ModuleNotFoundError: No module named '{module}'"
    found = doctor.diagnose(changed(remove=[name], errors={module: error}))
    assert all(problem.note for problem in found)
    assert f"mmeformer[{extra}]" in found[0].fix


def test_failure_is_told_where_it_begins():
    errors = {name: "ImportError: libcudart.so" for name in doctor.NEEDS if name != "numpy"}
    found = doctor.diagnose(changed(errors={**errors, "cv2": ""}))
    assert [problem.what.split()[0] for problem in found] == ["torch"]


def test_needs_are_listed_before_what_needs_them():
    seen = set()
    for name, needs in doctor.NEEDS.items():
        assert set(needs) <= seen
        seen.add(name)


# --- probes and the command -----------------------------------------------------------------------


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
    errors = {"mmrotate": "ModuleNotFoundError: No module named 'mmrotate'", "timm": "E"}
    facts = changed(remove=["onedl-mmrotate"], mmcv_lite="2.1.0", errors=errors)
    facts = replace(facts, probes={**facts.probes, "torch": torch})
    text = doctor.report(facts, doctor.diagnose(facts))
    assert re.search(r"^mmengine +1\.0 +onedl-mmengine 0\.10\.12$", text, re.MULTILINE)
    assert re.search(r"^mmrotate +not installed$", text, re.MULTILINE)
    assert re.search(r"^operators +torch +mmcv has no compiled operators$", text, re.MULTILINE)
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


# Every installation ends with it.
@pytest.mark.slow
def test_command_on_this_environment():
    reply = run_doctor()
    assert reply.stderr == ""
    assert all(re.search(rf"^{name} +\S", reply.stdout, re.MULTILINE) for name in doctor.NEEDS)
    assert re.search(r"^operators +(torch|compiled) ", reply.stdout, re.MULTILINE)
    assert reply.returncode == ("No problems found." not in reply.stdout)


@pytest.mark.slow
def test_command_names_broken_imports(tmp_path):
    (tmp_path / "mmengine").mkdir()
    (tmp_path / "mmengine" / "__init__.py").write_text("import os\nos.abort()\n")
    (tmp_path / "timm.py").write_text("raise RuntimeError('half-installed')\n")
    # The first on the path counts; a half removed distribution has no name.
    for name, metadata in {"timm-0.1": "Name: timm\nVersion: 0.1\n", "~umpy-2": ""}.items():
        (tmp_path / f"{name}.dist-info").mkdir()
        (tmp_path / f"{name}.dist-info" / "METADATA").write_text(metadata)
    reply = run_doctor(PYTHONPATH=str(tmp_path))
    assert reply.returncode == 1
    assert "mmengine does not work: the import ended its process" in reply.stdout
    assert "timm does not work: half-installed." in reply.stdout
    assert re.search(r"^timm +fails +timm 0\.1$", reply.stdout, re.MULTILINE)
    assert "mmcv does" not in reply.stdout
    assert "Traceback" not in reply.stdout + reply.stderr


def test_nothing_heavy_is_imported_with_the_module():
    code = "import mmeformer.doctor, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "numpy", "cv2", "mmengine", "mmcv", "mmdet", "timm"} & set(loaded)
