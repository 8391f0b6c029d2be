# SPDX-License-Identifier: Apache-2.0
"""mmdet without imgaug: its data sets are imported, its lane augmentation says what it lacks."""

import subprocess
import sys
import textwrap

import pytest

WITHOUT = """
    import sys

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("imgaug", "imagecorruptions"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Absent())
    import mmeformer
"""


def run(code: str, prelude: str = WITHOUT) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_mmdet_works_and_nobody_sees_an_imgaug():
    printed = run(
        """
        import mmdet.datasets
        from mmdet.datasets.transforms import ImageAug, LinesToArray
        from mmdet.registry import TRANSFORMS

        assert TRANSFORMS.get("LinesToArray") is LinesToArray and LinesToArray().n_offsets == 72
        assert not [name for name in sys.modules if name.startswith("imgaug")]
        try:
            import imgaug
        except ModuleNotFoundError:
            print("absent")
        size = dict(name="Resize", parameters=dict(size=dict(height=1, width=1)), p=1.0)
        try:
            ImageAug([size])
        except ImportError as error:
            print(error)
        """
    )
    # mmdet prints lines of its own before.
    assert printed.splitlines()[-2:] == [
        "absent",
        "mmdet's ImageAug needs imgaug.augmenters.Resize, and imgaug is not installed: "
        "pip install imaug",
    ]


@pytest.mark.slow
def test_an_installed_imgaug_is_used(tmp_path):
    (tmp_path / "imgaug" / "augmentables").mkdir(parents=True)
    files = {
        "__init__.py": "",
        "augmenters.py": "MINE = True",
        "augmentables/__init__.py": "",
        "augmentables/lines.py": "LineString = LineStringsOnImage = None",
        "augmentables/segmaps.py": "SegmentationMapsOnImage = None",
    }
    for name, text in files.items():
        (tmp_path / "imgaug" / name).write_text(text)
    prelude = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mmeformer\n"
    code = """
        from mmdet.datasets.transforms import generate_line
        print(generate_line.iaa.MINE)
    """
    assert run(code, prelude).splitlines()[-1] == "True"
