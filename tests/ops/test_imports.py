# SPDX-License-Identifier: Apache-2.0
"""Which operators mmcv gets, by order of imports, process, kind of mmcv and variable.

Every case is a fresh Python. ``installed`` is an environment as pip makes it, whose
``mmeformer.pth`` runs at every start; ``checkout`` is one where mmeformer is merely on the path.
Importing mmdet takes several seconds, so most cases with the real packages run with the tests of
installation.
"""

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
INSTALL = pytest.mark.install
NMS = "torch.tensor([[0.0, 0, 9, 9], [1, 0, 9, 9]]), torch.tensor([0.9, 0.8])"


def startup_line() -> str:
    """The line of ``mmeformer.pth`` as ``setup.py`` writes it (tests/test_packaging.py)."""
    source = (ROOT / "mmeformer" / "ops" / "startup.py").read_text(encoding="utf-8")
    return f"import sys; exec({source!r})\n"


def environment(folder: Path, *lines: str, startup: bool) -> Path:
    """A bare environment with ``lines`` as folders to import from; its interpreter."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("".join(f"{line}\n" for line in lines))
    if startup:
        (packages / "mmeformer.pth").write_text(startup_line())
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def dependencies():
    """Folders of the installed packages."""
    return [path for path in sys.path if path.endswith("site-packages")]


@pytest.fixture(scope="module")
def installed(tmp_path_factory, dependencies):
    folder = tmp_path_factory.mktemp("installed")
    return environment(folder, str(ROOT), *dependencies, startup=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, dependencies):
    folder = tmp_path_factory.mktemp("checkout")
    if importlib.util.find_spec("imgaug") is None:
        # Without it and without mmeformer.pth, nobody can import mmdet first.
        stub = tmp_path_factory.mktemp("stub")
        (stub / "imgaug" / "augmentables").mkdir(parents=True)
        for module in ("__init__", "augmenters", "augmentables/__init__"):
            (stub / "imgaug" / f"{module}.py").write_text("")
        names = "LineString = LineStringsOnImage = SegmentationMapsOnImage = object"
        for module in ("lines", "segmaps"):
            (stub / "imgaug" / "augmentables" / f"{module}.py").write_text(names)
        dependencies = [*dependencies, str(stub)]
    return environment(folder, str(ROOT), *dependencies, startup=False)


def start(python: Path, code: str, *arguments, **variables: str) -> subprocess.CompletedProcess:
    """Run a program elsewhere and without PYTHONPATH, so that no checkout is on the path."""
    keep = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
    return subprocess.run(
        [python, "-W", "ignore", *arguments, "-c", textwrap.dedent(code)],
        env=keep | {"OMP_NUM_THREADS": "1"} | variables,
        cwd=python.parent,
        capture_output=True,
        text=True,
    )


def run(python: Path, code: str, *arguments, fails: bool = False, **variables: str) -> str:
    """Standard output of a program, or its standard error if it is to fail."""
    done = start(python, code, *arguments, **variables)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


# --- an mmcv of a few lines -----------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path):
    """A function that makes an environment with an mmcv whose extension is given as source."""

    def make(extension: str | None, startup: bool = True, operators: bool = True) -> Path:
        package = tmp_path / "fake" / "mmcv"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        if operators:
            (package / "ops.py").write_text(
                "import importlib\next_module = importlib.import_module('mmcv._ext')\n"
            )
        if extension is not None:
            (package / "_ext.py").write_text(extension)
        # The substitute imports torchvision, whose place these cases need not.
        (package.parent / "torchvision.py").write_text("")
        folders = [str(package.parent), str(ROOT), *(p for p in sys.path if "site-packages" in p)]
        return environment(tmp_path / "environment", *folders, startup=startup)

    return make


COMPILED = "def get_compiling_cuda_version(): return '12.8'"
BROKEN = "raise ImportError('undefined symbol:\\n _ZN3c10')"
STATUS = "from mmeformer.ops import status; print(*status(), sep='; ')"


@pytest.mark.parametrize("first", ["mmcv", "mmeformer"])
@pytest.mark.parametrize(
    "extension, choice, expected",
    [
        (COMPILED, None, r"compiled; mmcv's own, compiled for CUDA 12.8: .*_ext.py"),
        (COMPILED, "", r"compiled; .*"),
        (COMPILED, "auto", r"compiled; .*"),
        (COMPILED, "compiled", r"compiled; .*"),
        pytest.param(COMPILED, "torch", r"torch; MMEFORMER_OPERATORS=torch", marks=INSTALL),
        (COMPILED, "fast", r"broken; MMEFORMER_OPERATORS is 'fast'; set it to auto, torch or .*"),
        (BROKEN, "auto", r"broken; ImportError: undefined symbol: _ZN3c10"),
        (BROKEN, "compiled", r"broken; ImportError: undefined symbol: _ZN3c10"),
        pytest.param(BROKEN, "torch", r"torch; MMEFORMER_OPERATORS=torch", marks=INSTALL),
        (None, "auto", r"torch; mmcv was installed without compiled operators"),
        pytest.param(None, "torch", r"torch; MMEFORMER_OPERATORS=torch", marks=INSTALL),
        (None, "compiled", r"missing; .*without compiled operators, and MMEFORMER_OPERATORS=.*"),
        (None, "TORCH", r"broken; MMEFORMER_OPERATORS is 'TORCH'; set it to .*"),
    ],
)
def test_choice_of_operators(fake, extension, choice, expected, first):
    variables = {} if choice is None else {"MMEFORMER_OPERATORS": choice}
    python = fake(extension, startup=first == "mmcv")
    code = "try:\n    import mmcv.ops\nexcept Exception: pass\n" if first == "mmcv" else ""
    assert re.fullmatch(expected, run(python, code + STATUS, **variables).strip())


def test_wrong_choice_is_an_error_where_operators_are_imported(fake):
    python = fake(COMPILED)
    message = run(python, "import mmcv.ops", fails=True, MMEFORMER_OPERATORS="fast")
    assert message.splitlines()[-1] == (
        "mmeformer.ops.finder.OperatorsError: MMEFORMER_OPERATORS is 'fast'; set it to auto, torch "
        "or compiled, or unset it"
    )


def test_no_mmcv_and_an_mmcv_without_operators(tmp_path, fake):
    python = environment(tmp_path / "bare", str(ROOT), startup=True)
    assert run(python, STATUS).strip() == "missing; mmcv is not installed"
    assert run(fake(None, operators=False), STATUS).startswith("missing; this mmcv has no mmcv.ops")


@INSTALL
def test_choice_made_in_the_program(fake):
    code = "import os; os.environ['MMEFORMER_OPERATORS'] = 'torch'\nimport mmeformer\n" + STATUS
    assert run(fake(COMPILED), code).startswith("torch")


def test_registering_again_leaves_one_finder(fake):
    code = """
        import sys, mmeformer.ops
        rooms = [type(finder).__module__ for finder in sys.meta_path]
        mmeformer.ops.register()
        again = [type(finder).__module__ for finder in sys.meta_path]
        print(again == rooms, again.count("mmeformer.ops.finder"), again[-1])
    """
    assert run(fake(COMPILED), code).split() == ["True", "1", "mmeformer.ops.finder"]


# --- the start of Python --------------------------------------------------------------------------


def test_starting_python_imports_nothing(installed):
    assert run(installed, "import sys; print('mmeformer' in sys.modules)", "-I") == "False\n"
    code = """
        import sys
        before = set(sys.modules)
        import mmeformer
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        assert new <= set(sys.stdlib_module_names) | {"mmeformer"}, new
    """
    run(installed, code)


def test_another_checkout_on_the_path_comes_first(installed, tmp_path):
    (tmp_path / "mmeformer").mkdir()
    (tmp_path / "mmeformer" / "__init__.py").write_text("print('another')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mmcv; import mmeformer"
    assert run(installed, code).split() == ["another"]


def test_an_environment_whose_checkout_is_gone_stays_quiet(tmp_path):
    (tmp_path / "mmcv.py").write_text("print('mmcv')")
    python = environment(tmp_path / "environment", str(tmp_path), startup=True)
    done = start(python, "import mmcv")
    assert (done.stdout, done.stderr) == ("mmcv\n", "")


def test_a_damaged_installation_is_named(tmp_path):
    (tmp_path / "mmcv.py").write_text("print('mmcv')")
    (tmp_path / "mmeformer.py").write_text("import gone_for_good")
    python = environment(tmp_path / "environment", str(tmp_path), startup=True)
    done = start(python, "import mmcv")
    assert done.stdout == "mmcv\n" and done.returncode == 0
    assert "mmeformer is damaged, reinstall it: No module named 'gone_for_good'" in done.stderr


# --- the real packages ----------------------------------------------------------------------------

AFTER = f"""
    import torch
    from mmcv.ops import nms
    print(nms({NMS}, 0.5)[1].tolist())
"""
DETECTION = f"""
    import torch
    from mmdet.models.layers.bbox_nms import batched_nms
    boxes, kept = batched_nms({NMS}, torch.zeros(2), dict(type="nms", iou_threshold=0.5))
    print(kept.tolist())
"""
ROTATED = """
    import torch
    from mmrotate.structures.bbox.bbox_overlaps import rbbox_overlaps
    box = torch.tensor([[9.0, 9, 8, 4, 1]])
    print([int(rbbox_overlaps(box, box).item() < 0.999)])
"""


def right(printed: str) -> bool:
    """Whether the last line of one of the programs above, after those of the libraries, is [0]."""
    return printed.splitlines()[-1:] == ["[0]"]


@pytest.mark.parametrize(
    "first, then, packages",
    [
        ("mmdet.models", DETECTION, ["mmdet"]),
        pytest.param("mmdet.apis", DETECTION, ["mmdet"], marks=INSTALL),
        pytest.param("mmseg.apis", AFTER, ["mmseg"], marks=INSTALL),
        pytest.param("mmrotate.apis", ROTATED, ["mmdet", "mmrotate"], marks=INSTALL),
        pytest.param("mmcv.ops", AFTER, ["mmcv"], marks=INSTALL),
        pytest.param("mmeformer", DETECTION, ["mmdet"], marks=INSTALL),
    ],
)
def test_orders_of_imports_in_an_installed_environment(first, then, packages, installed):
    for package in packages:
        pytest.importorskip(package)
    assert right(run(installed, f"import {first}\n" + textwrap.dedent(then) + "\nimport mmeformer"))


@pytest.mark.parametrize(
    "first, then",
    [("mmdet.apis", DETECTION), pytest.param("mmrotate.apis", ROTATED, marks=INSTALL)],
)
def test_a_checkout_replaces_placeholders(first, then, checkout):
    for package in ("mmdet", "mmrotate"):
        pytest.importorskip(package)
    assert right(run(checkout, f"import {first}\nimport mmeformer\n" + textwrap.dedent(then)))


@INSTALL
def test_only_placeholders_are_replaced(checkout):
    for package in ("mmdet", "mmseg"):
        pytest.importorskip(package)
    code = """
        import inspect, sys
        import mmdet.apis, mmdet.evaluation, mmdet.structures
        import mmseg.apis
        import mmeformer
        import mmcv.ops
        from mmdet.structures.bbox import bbox_overlaps
        structures = sys.modules["mmdet.structures.mask.structures"]
        found = [
            bbox_overlaps.__module__ == "mmdet.structures.bbox.bbox_overlaps",
            mmdet.apis.inference.RoIPool is mmcv.ops.RoIPool,
            structures.roi_align is mmcv.ops.roi_align,
        ]
        left = []
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in ("mmdet", "mmseg") and module is not None:
                for key, value in vars(module).items():
                    known = getattr(mmcv.ops, key.lstrip("_"), None)
                    if known is not None and getattr(value, "__module__", "") == name:
                        text = inspect.getsource(value)
                        if "compiled with ops" in text or "is not available" in text:
                            left.append((name, key))
        print(found, left)
    """
    assert run(checkout, code).splitlines()[-1] == "[True, True, True] []"


@INSTALL
@pytest.mark.parametrize("method", ["spawn", pytest.param("fork", marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ["installed", "checkout"])
def test_worker_processes(place, method, request):
    pytest.importorskip("mmdet")
    python = request.getfixturevalue(place)
    (python.parent / "work.py").write_text(
        "def work(_):\n"
        # An installed package needs no import of mmeformer in a worker.
        + ("    import mmeformer\n" if place == "checkout" else "")
        + textwrap.indent(textwrap.dedent(DETECTION), "    ")
        + "    return kept.tolist()\n"
    )
    code = f"""
        import multiprocessing, sys
        sys.path.insert(0, "")
        import mmeformer
        from work import work
        if __name__ == "__main__":
            if {method!r} == "fork":
                work(0)
            with multiprocessing.get_context({method!r}).Pool(1) as pool:
                results = pool.map(work, [0])
            print(results[0])
    """
    # A spawned worker runs a file again, not a command.
    (python.parent / "main.py").write_text(textwrap.dedent(code))
    start = "import runpy, sys; sys.argv = ['main.py']; "
    assert right(run(python, start + "runpy.run_path('main.py', run_name='__main__')"))


@INSTALL
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
def test_processes_of_torchrun(installed):
    pytest.importorskip("mmdet")
    script = installed.parent / "distributed.py"
    script.write_text(
        "import torch.distributed as dist\ndist.init_process_group('gloo')\n"
        + textwrap.dedent(DETECTION)
        + "dist.destroy_process_group()\nprint('fine')\n"
    )
    code = """
        import sys
        from torch.distributed.run import main
        main(["--standalone", "--nproc_per_node=2", "distributed.py"])
    """
    printed = run(installed, code)
    assert printed.count("fine") == printed.count("[0]") == 2


# --- inferencers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_configs(tmp_path_factory):
    """Config files of models of all tasks that are small enough to build in seconds."""
    import tiny

    folder = tmp_path_factory.mktemp("configs")
    paths = {}
    for task, make in tiny.TASKS.items():
        config = make(folder / task)
        config.work_dir = str(folder)
        paths[task] = folder / f"{task}.py"
        config.dump(paths[task])
    return paths


@INSTALL
def test_init_detector_and_inferencer_of_mmdet(installed, tiny_configs):
    code = f"""
        from mmdet.apis import DetInferencer, inference_detector, init_detector
        import numpy as np
        image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        path = {str(tiny_configs["detection"])!r}
        model = init_detector(path, device="cpu")
        found = len(inference_detector(model, image).pred_instances)
        result = DetInferencer(path, device="cpu", show_progress=False)(image)
        print(found, len(result["predictions"][0]["labels"]))
    """
    counts = run(installed, code).splitlines()[-1].split()
    assert len(counts) == 2 and all(int(count) > 0 for count in counts)


# Of the other tasks tests/smoke.py has much of this.
@INSTALL
@pytest.mark.slow
def test_init_detector_on_a_rotated_model(installed, tiny_configs):
    code = f"""
        from mmdet.apis import inference_detector, init_detector
        import numpy as np
        image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        model = init_detector({str(tiny_configs["rotated"])!r}, device="cpu")
        model.test_cfg.score_thr = 0.0
        model.bbox_head.test_cfg.score_thr = 0.0
        result = inference_detector(model, image).pred_instances
        print(*result.bboxes.shape)
    """
    count, numbers = run(installed, code).splitlines()[-1].split()
    assert int(count) > 0 and numbers == "5"


@INSTALL
@pytest.mark.slow
def test_inferencer_of_mmseg(installed, tiny_configs):
    code = f"""
        from mmseg.apis import MMSegInferencer
        import numpy as np
        image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        inferencer = MMSegInferencer({str(tiny_configs["segmentation"])!r}, device="cpu")
        print(inferencer(image)["predictions"].shape)
    """
    assert run(installed, code).splitlines()[-1] == "(64, 64)"
