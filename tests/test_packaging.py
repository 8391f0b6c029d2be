# SPDX-License-Identifier: Apache-2.0
"""What a wheel carries, what the constraints cover, and the commands of the Makefile."""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mmeformer import paths
from mmeformer.version import __version__

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
INSTALLED = ("3.10", "3.13", "3.14")
"""The oldest, and the two newest: few machines have the newest one."""


def shipped(folder: str) -> set[str]:
    """Files below a folder of the checkout that a wheel must carry."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != "bootstrap.py"
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what packaging needs, so that building leaves no trace in the checkout."""
    root = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", ".mim")
    for folder in ("mmeformer", "configs", "tools"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, root)
    return root


# Without the running environment's own .pth files, but with its packages.
SITE = (
    "import sys; sys.path += " + repr([path for path in sys.path if "site-packages" in path]) + "\n"
)


def pip(*arguments, **options):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_wheel_carries_package_configs_and_tools(wheel, source):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.testzip() is None
        # Command lines stay executable where pip lets them be.
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
    assert "mmeformer/deploy/web/index.html" in names
    for folder in ("configs", "tools"):
        assert {f"mmeformer/.mim/{path}" for path in shipped(folder)} == {
            name for name in names if name.startswith(f"mmeformer/.mim/{folder}/")
        }
    for path in shipped("tools"):
        assert modes[f"mmeformer/.mim/{path}"] & 0o777 == (ROOT / path).stat().st_mode & 0o777
    modules = {path for path in shipped("mmeformer") if path.endswith(".py")}
    assert modules == {name for name in names if name.endswith(".py") and "/.mim/" not in name}, (
        "a package without __init__.py is left out"
    )
    assert "mmeformer/.mim/model-index.yml" in names
    assert not any(re.search(r"bootstrap|__pycache__|^tests/", name) for name in names)
    licences = [name for name in names if re.search(r"dist-info/.*(LICENSE|NOTICE)$", name)]
    assert len(licences) == 2
    assert not (source / "mmeformer" / ".mim").exists(), "building wrote into the source tree"


def test_wheel_metadata(metadata):
    assert (metadata["Name"], metadata["Version"]) == ("mmeformer", __version__)
    assert set(metadata["Requires-Python"].split(",")) == {">=3.10", "<3.15"}
    assert metadata.get_all("Provides-Extra") == [
        "detection",
        "segmentation",
        "rotated",
        "classification",
        "deploy",
        "track",
        "executorch",
        "litert",
        "openvino",
        "all",
        "dev",
    ]


def test_extra_all_is_what_the_tasks_and_the_deployment_need(metadata):
    lines = [Requirement(line) for line in metadata.get_all("Requires-Dist")]

    def wanted(extra):
        chosen = [line for line in lines if line.marker and line.marker.evaluate({"extra": extra})]
        return {(line.name, str(line.specifier)) for line in chosen}

    extras = ("detection", "segmentation", "rotated", "classification", "deploy", "track")
    assert wanted("all") == set.union(*map(wanted, extras))


def test_wheel_lets_mmcv_and_mmdet_find_what_they_lack(wheel, tmp_path):
    pip("install", "--no-deps", "--no-index", "--target", tmp_path, wheel)
    line = (tmp_path / "mmeformer.pth").read_text()
    # Python runs single lines of a .pth file, if they begin so.
    assert line.count("\n") == 1 and line.startswith("import ")
    code = (
        "import site, sys; site.addsitedir(sys.argv[1]); assert 'mmeformer' not in sys.modules\n"
        "import mmcv; assert sys.modules['mmeformer'].__file__.startswith(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-S", "-c", SITE + code, tmp_path], cwd=tmp_path, check=True)


def test_installed_wheel_finds_its_configs(wheel, tmp_path):
    pip("install", "--no-deps", "--no-index", "--target", tmp_path, wheel)
    # A stranger's folder beside the package must not be taken for the configs.
    (tmp_path / "configs").mkdir()
    code = "from mmeformer.paths import config_dir, tools_dir; print(config_dir(), tools_dir())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert found == [str(tmp_path / "mmeformer" / ".mim" / name) for name in ("configs", "tools")]


def test_wheel_has_the_command(wheel, tmp_path):
    """``mmeformer`` starts, and finds the templates of ``init`` in the package."""
    pip("install", "--no-deps", "--no-index", "--target", tmp_path, wheel)
    (entry,) = importlib.metadata.Distribution.at(
        next(tmp_path.glob("*.dist-info"))
    ).entry_points.select(group="console_scripts")
    assert (entry.name, entry.value) == ("mmeformer", "mmeformer.commands.__main__:main")
    code = (
        "from mmeformer.commands.__main__ import main; main(['--version']); "
        "from mmeformer.paths import config_dir; "
        "print(sum(1 for _ in config_dir().rglob('*_custom.py')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert found[:2] == ["mmeformer", __version__] and int(found[2]) >= 4


def test_wheel_from_a_source_archive_is_the_same(wheel, source, tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, archive)
    (again,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_checkout_finds_its_configs():
    assert paths.config_dir() == ROOT / "configs"
    assert paths.tools_dir() == ROOT / "tools"


def test_missing_configs_are_an_error_with_the_place(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\.mim/configs does not exist.*reinstall"):
        paths._find("configs", tmp_path / "mmeformer")


# --- constraints ----------------------------------------------------------------------------------


def environment_of(python: str) -> dict[str, str]:
    """What markers of requirements ask for, of one Python version."""
    return {"python_version": python, "python_full_version": f"{python}.0"}


def pins(python: str) -> dict[str, Requirement]:
    """Constraints that hold for one Python version, by canonical name."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment_of(python)):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice for Python {python}"
            found[name] = requirement
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_are_exact_versions(python):
    for requirement in pins(python).values():
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_lie_in_the_ranges_of_the_package(python, metadata):
    pinned = pins(python)
    for line in metadata.get_all("Requires-Dist"):
        requirement = Requirement(line)
        if any(f'extra == "{extra}"' in line for extra in ("executorch", "litert", "openvino")):
            continue  # `make install` does not install them
        if requirement.marker:
            extra = re.search(r'extra == "(\w+)"', line)
            environment = environment_of(python) | {"extra": extra[1] if extra else ""}
            if not requirement.marker.evaluate(environment):
                continue
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no tested version for Python {python}"
        (specifier,) = pinned[name].specifier
        assert requirement.specifier.contains(specifier.version), f"{pinned[name]} against {line}"


# --- commands -------------------------------------------------------------------------------------


def without_make() -> dict[str, str]:
    """The environment as if not below `make test`, which hands its own settings down."""
    handed_down = re.compile("MAKE.*|MFLAGS|TESTS|JOBS|PYTHON")  # variables set on its command line
    return {key: value for key, value in os.environ.items() if not handed_down.fullmatch(key)}


def make(*arguments, cwd=ROOT):
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=cwd,
        env=without_make(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_make_alone_lists_every_target():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    listed = set(re.findall(r"^  make ([a-z-]+) +\S", make(), re.MULTILINE))
    assert listed == targets
    assert {"help", "quickstart", "test", "test-all", "check", "format", "doctor"} <= listed
    assert {"install", "clean"} <= listed


@pytest.mark.parametrize("target", ["quickstart", "test", "test-all", "check", "format", "install"])
def test_commands_bring_the_environment_up_to_date_first(target):
    assert make("-n", target).splitlines()[0] == "python3 tools/bootstrap.py"


def test_as_many_processes_as_cores():
    command = (
        r"OMP_NUM_THREADS=1 \S+ -m pytest -n 3 --dist worksteal -m \"not slow and not install\""
    )
    assert re.fullmatch(command, make("-n", "test", "JOBS=3").splitlines()[1])
    assert "-n 1" not in make("-n", "test", "JOBS=1")
    assert f"pytest -n {os.cpu_count()} " in make("-n", "test") or os.cpu_count() == 1


def test_clean_keeps_data_and_results(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = ["data/coco/a.jpg", "work_dirs/run/epoch_12.pth", ".venv/bin/python", "tests/test_a.py"]
    removed = ["build/lib/a.py", "mmeformer.egg-info/PKG-INFO", "mmeformer/__pycache__/a.pyc"]
    removed += ["dist/a.whl", ".pytest_cache/a", ".ruff_cache/a", "tests/__pycache__/a.pyc"]
    for name in kept + removed + ["configs/a.py", "tools/a.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    make("clean", cwd=tmp_path)
    assert all((tmp_path / name).exists() for name in kept)
    assert not any((tmp_path / name).exists() for name in removed)


def test_ci_stops_at_the_first_failure(tmp_path):
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    targets = ("check", "test")
    for failing in (None, *targets):
        makefile = "".join(
            f"{name}:\n\t@echo {name}\n" + ("\t@false\n" if name == failing else "")
            for name in targets
        )
        (tmp_path / "Makefile").write_text(makefile)
        done = subprocess.run(
            [tmp_path / ".ci" / "run"],
            cwd="/",
            env=without_make(),
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) == (failing is None)
        ran = targets if failing is None else targets[: targets.index(failing) + 1]
        assert done.stdout.split() == list(ran)


# --- the wheel in use -----------------------------------------------------------------------------


def interpreter(version: str) -> str | None:
    """Path of a Python of this version that runs, on PATH or of pyenv."""
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [shutil.which(f"python{version}"), *home.glob(f"versions/{version}.*/bin/python")]
    for path in filter(None, found):
        code = "import sys, ensurepip, venv; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if done.stdout.strip() == version:
            return str(path)
    return None


def install_and_use(python: str, wheel: Path, folder: Path) -> tuple[Path, str, str]:
    """Install the wheel as its users do; the environment, and what doctor and smoke test say."""
    venv = folder / "venv"
    subprocess.run([python, "-m", "venv", venv], check=True)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*arguments):
        done = subprocess.run(
            [venv / "bin" / "python", *arguments],
            cwd=folder,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout

    try:
        # The pip that Python comes with. Of the modules few are ever imported, so few are compiled.
        run("-m", "pip", "install", "--quiet", "--no-compile", f"{wheel}[all]")
        return venv, run("-m", "mmeformer.doctor"), run(ROOT / "tests" / "smoke.py")
    finally:
        shutil.rmtree(venv)  # several GB


@pytest.fixture(scope="module")
def environments(wheel, tmp_path_factory):
    """Futures of :func:`install_and_use` by version of Python; all are made at the same time."""
    pythons = {version: interpreter(version) for version in INSTALLED}
    with ThreadPoolExecutor() as pool:
        yield {
            version: pool.submit(install_and_use, python, wheel, tmp_path_factory.mktemp("wheel"))
            for version, python in pythons.items()
            if python is not None
        }


@pytest.mark.install
@pytest.mark.parametrize("version", INSTALLED)
def test_one_plain_install_of_the_wheel_works(version, environments):
    if version not in environments:
        pytest.skip(f"no Python {version} on PATH or in pyenv")
    venv, report, smoke = environments[version].result()
    assert "No problems found." in report and re.search(r"^operators +torch ", report, re.MULTILINE)
    assert str(venv) in smoke
