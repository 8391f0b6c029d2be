# SPDX-License-Identifier: Apache-2.0
"""The model index names what exists, for every variant and task, and its READMEs link to it."""

import re

import pytest
import yaml

from mmeformer.paths import config_dir
from mmeformer.variants import VARIANTS

TASKS = ("detection", "segmentation", "rotated", "classification")


def test_index_lists_every_task():
    index = yaml.safe_load((config_dir().parent / "model-index.yml").read_text())
    assert index["Import"] == [f"configs/{task}/metafile.yml" for task in TASKS]


@pytest.mark.parametrize("task", TASKS)
def test_metafile_names_a_config_of_every_variant(task):
    root = config_dir().parent
    content = yaml.safe_load((root / f"configs/{task}/metafile.yml").read_text())
    collections = {collection["Name"] for collection in content["Collections"]}
    for collection in content["Collections"]:
        assert (root / collection["README"]).is_file()
    named = set()
    for model in content["Models"]:
        assert model["In Collection"] in collections
        assert (root / model["Config"]).is_file()
        assert model["Config"].endswith(f"/{model['Name']}.py")
        named |= {name for name in VARIANTS if name.replace("_", "-") + "_" in model["Name"]}
    assert named == set(VARIANTS)


@pytest.mark.parametrize("task", TASKS)
def test_readme_links_to_every_config(task):
    folder = config_dir() / task
    links = set(re.findall(r"\]\(([^)#]+)\)", (folder / "README.md").read_text()))
    assert not [link for link in links if "://" not in link and not (folder / link).exists()]
    assert {path.name for path in folder.glob("*.py")} <= links
