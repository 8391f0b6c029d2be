# SPDX-License-Identifier: Apache-2.0
"""Packaging of mmeformer.

The base requirements name the maintained forks of OpenMMLab's packages (distributions ``onedl-*``,
import names ``mmengine``, ``mmcv``, ``mmdet``, ...), because that is the tested combination.
Whoever runs OpenMMLab's own distributions, which have the same import names, installs with
``pip install --no-deps``: otherwise pip lays the forks' files over theirs.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# OpenMMLab's convention for what an installed package carries beside its modules.
SHIPPED = "mmeformer/.mim"
SHIPPED_FOLDERS = ("configs", "tools")
# It installs a source checkout; there is none beside an installed wheel.
CHECKOUT_ONLY = ("bootstrap.py",)
STARTUP = "mmeformer.pth"

BASE = [
    # Checkpoints are read weights-only with an allow-list of torch 2.6.
    "torch>=2.6",
    "torchvision",
    "timm>=1.0",
    "onedl-mmengine>=0.10.8,<0.11",
    "onedl-mmcv>=2.3,<2.4",
    # The forks require opencv-python, which needs libGL. pip installs what lies deeper first, so
    # this build, which works on servers too, ends on top of it.
    "opencv-python-headless",
    "numpy>=1.26",
    "packaging",
    "rich",
    "safetensors",
]
DETECTION = ["onedl-mmdetection>=3.5,<3.6"]
SEGMENTATION = ["onedl-mmsegmentation>=1.4,<1.5"]
ROTATED = [*DETECTION, "onedl-mmrotate>=1.2,<1.3", "shapely"]
# scikit-image brings the photographs of the quickstart.
CLASSIFICATION = ["onedl-mmpretrain>=1.3.6,<1.4", "scikit-image>=0.22"]
DEPLOY = [
    "onnx",
    "onnxruntime>=1.15",
    "onnxscript",
    # Where there is a build: without its libraries it cannot write a model.
    "coremltools>=9; sys_platform != 'win32' and python_version < '3.14'",
]
TRACK = ["trackers>=2.6,<3"]
# Outside of "all" and of constraints.txt: they bring jax and transformers, or hundreds of MB.
TARGETS = {
    # 1.3 is built for torch 2.12, 1.4 for torch 2.13, and so on: others do not run its files.
    "executorch": ["executorch>=1.3"],
    # litert-torch takes any transformers, but version 5 breaks `import mmpretrain`.
    "litert": ["litert-torch>=0.10,<0.11", "ai-edge-litert>=2.3", "transformers<5"],
    "openvino": ["openvino>=2025.0"],
}
EXTRAS = {
    "detection": DETECTION,
    "segmentation": SEGMENTATION,
    "rotated": ROTATED,
    "classification": CLASSIFICATION,
    "deploy": DEPLOY,
    "track": TRACK,
    **TARGETS,
    "all": list(
        dict.fromkeys(DETECTION + SEGMENTATION + ROTATED + CLASSIFICATION + DEPLOY + TRACK)
    ),
    "dev": [
        "hypothesis",
        "mypy",
        "pip>=25",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "setuptools>=77",
        "shapely",
    ],
}


def read_version() -> str:
    """Version as text, so that packaging needs none of the runtime requirements."""
    text = (ROOT / "mmeformer" / "version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


class build_py_with_configs(build_py):  # noqa: N801 (setuptools' naming of commands)
    """Copy configs and tools into the built package, never into the source tree."""

    def shipped_files(self) -> dict[str, str]:
        """Map of built path to source path, both relative to the project's root or the build."""
        sources = [
            path.relative_to(ROOT)
            for folder in SHIPPED_FOLDERS
            for path in sorted((ROOT / folder).rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts and path.name not in CHECKOUT_ONLY
        ]
        sources.append(Path("model-index.yml"))
        return {f"{self.build_lib}/{SHIPPED}/{path.as_posix()}": str(path) for path in sources}

    def write_startup(self, folder: str) -> None:
        """Write the line that Python runs at its start; see mmeformer/ops/startup.py."""
        text = (ROOT / "mmeformer" / "ops" / "startup.py").read_text(encoding="utf-8")
        # Python runs single lines that begin with "import".
        Path(folder, STARTUP).write_text(f"import sys; exec({text!r})\n", encoding="utf-8")

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            # Whatever lies here becomes the root of the editable wheel.
            self.write_startup(self.get_finalized_command("install").install_lib)
            return
        self.write_startup(self.build_lib)
        # An older build's leftovers would be packed too.
        shutil.rmtree(Path(self.build_lib, SHIPPED), ignore_errors=True)
        for built, source in self.shipped_files().items():
            Path(built).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / source, built)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        shipped = [f"{self.build_lib}/{STARTUP}", *self.shipped_files()]
        shipped = [] if self.editable_mode else shipped
        return super().get_outputs(include_bytecode) + shipped


setup(
    name="mmeformer",
    version=read_version(),
    description="EfficientFormer V1 and V2 backbones for OpenMMLab detection, segmentation "
    "and rotated detection",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The mmeformer authors",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    keywords="computer vision, object detection, segmentation, EfficientFormer, OpenMMLab",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10,<3.15",
    packages=find_packages(include=["mmeformer", "mmeformer.*"]),
    package_data={"mmeformer.deploy": ["web/*"]},
    cmdclass={"build_py": build_py_with_configs},
    entry_points={"console_scripts": ["mmeformer = mmeformer.commands.__main__:main"]},
    install_requires=BASE,
    extras_require=EXTRAS,
    zip_safe=False,
)
