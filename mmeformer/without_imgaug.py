# SPDX-License-Identifier: Apache-2.0
"""Makes mmdet importable without imgaug.

``mmdet/datasets/transforms/generate_line.py`` (lane detection) imports imgaug, and every mmdet data
set imports that file. None of our tasks needs imgaug, and its distribution, imaug, holds back
OpenCV (< 4.13) and with it numpy (< 2.3). If imgaug is not installed, the file is imported with
placeholders for imgaug's names; the one transform that uses them, ``ImageAug``, then raises. No
other module gets the placeholders, so ``import imgaug`` fails elsewhere as it should.

Only the standard library is imported here.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from types import ModuleType

_USER = "mmdet.datasets.transforms.generate_line"
_NAMES = ("", ".augmenters", ".augmentables", ".augmentables.lines", ".augmentables.segmaps")


class _Placeholder(ModuleType):
    """A module of imgaug whose functions and classes raise when they are called."""

    augmenters: ModuleType

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise ImportError(
                f"mmdet's ImageAug needs {self.__name__}.{name}, and imgaug is not installed: "
                "pip install imaug"
            )

        return missing


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        placeholders = {f"imgaug{name}": _Placeholder(f"imgaug{name}") for name in _NAMES}
        for placeholder in placeholders.values():
            placeholder.__path__ = []  # Makes it a package for imports.
        # `import imgaug.augmenters as iaa` reads the attribute.
        placeholders["imgaug"].augmenters = placeholders["imgaug.augmenters"]
        sys.modules.update(placeholders)
        try:
            super().exec_module(module)
        finally:
            for name in placeholders:
                del sys.modules[name]


def _installed() -> bool:
    try:
        return find_spec("imgaug") is not None
    except (ImportError, ValueError):  # Its import was blocked.
        return False


class _Finder:
    """Finds the one module that imports imgaug, if imgaug is not installed."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        if name != _USER or _installed():
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


def register() -> None:
    """Make mmdet's data sets importable without imgaug. A second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
