# SPDX-License-Identifier: Apache-2.0
"""Whoever has only one of mmseg and mmdet can use that task."""

import subprocess
import sys

import pytest

from mmeformer.paths import config_dir

# In a fresh process, where None in sys.modules makes an import fail as a missing package does.
PROGRAM = """
import sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, MODELS, init_default_scope
from mmeformer.configs import drop_pretrained

config = Config.fromfile(sys.argv[1])
init_default_scope(config.default_scope)
drop_pretrained(config.model)
MODELS.build(config.model)

def find(registry, name):
    with registry.switch_scope_and_registry(None) as scoped:
        found = scoped.get(name)
    assert found is not None, name
    return found

find(MODELS, config.tta_model.type)
dataset = find(DATASETS, config.train_dataloader.dataset.type)
assert dataset.__module__.startswith(sys.argv[3]), dataset.__module__
for hook in config.custom_hooks:
    find(HOOKS, hook.type)
loaded = [name for name in sys.argv[2].split(",") if sys.modules.get(name) is not None]
assert not loaded, loaded
"""


@pytest.mark.install
@pytest.mark.parametrize(
    ("config", "missing", "package"),
    [
        (
            "segmentation/semantic-fpn_efficientformerv2-s0_40k_ade20k-512x512.py",
            "mmdet,mmrotate,pycocotools",
            "mmeformer.segmentation",
        ),
        (
            "detection/mask-rcnn_efficientformerv2-s0_fpn_1x_coco.py",
            "mmseg,mmrotate",
            "mmeformer.detection",
        ),
    ],
)
def test_one_task_needs_only_its_own_library(config, missing, package):
    arguments = [str(config_dir() / config), missing, package]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
