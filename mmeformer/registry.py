# SPDX-License-Identifier: Apache-2.0
"""Child registries of mmengine's roots, scope ``mmeformer``.

mmengine imports this file by itself when it finds a scoped name such as
``type="mmeformer.EfficientFormerV2"``, and then the modules in ``locations``
(``mmengine.registry.Registry.import_from_location``). So configs need ``custom_imports`` only for
modules that need mmdet or mmseg: the runtime base of each task imports these, so that nobody needs
both libraries.
"""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import TASK_UTILS as MMENGINE_TASK_UTILS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import VISUALIZERS as MMENGINE_VISUALIZERS
from mmengine.registry import WEIGHT_INITIALIZERS as MMENGINE_WEIGHT_INITIALIZERS
from mmengine.registry import Registry

from mmeformer.checkpoints import safe_load

# By default mmengine unpickles checkpoints without restriction. The safe reader is installed here
# because every module that registers something imports this file. The first backbone would be too
# late: mmdet's and mmseg's inferencers read a checkpoint before they build a model.
safe_load.install()

MODELS = Registry(
    "model", parent=MMENGINE_MODELS, scope="mmeformer", locations=["mmeformer.backbones"]
)
WEIGHT_INITIALIZERS = Registry(
    "weight initializer",
    parent=MMENGINE_WEIGHT_INITIALIZERS,
    scope="mmeformer",
    locations=["mmeformer.checkpoints.load"],
)
TRANSFORMS = Registry(
    "transform",
    parent=MMENGINE_TRANSFORMS,
    scope="mmeformer",
    locations=["mmeformer.training.loading"],
)
DATASETS = Registry("dataset", parent=MMENGINE_DATASETS, scope="mmeformer")
METRICS = Registry("metric", parent=MMENGINE_METRICS, scope="mmeformer")
VISUALIZERS = Registry("visualizer", parent=MMENGINE_VISUALIZERS, scope="mmeformer")
TASK_UTILS = Registry("task util", parent=MMENGINE_TASK_UTILS, scope="mmeformer")
HOOKS = Registry(
    "hook",
    parent=MMENGINE_HOOKS,
    scope="mmeformer",
    locations=[
        "mmeformer.training.hooks",
        "mmeformer.training.compile",
        "mmeformer.training.cuda_graphs",
    ],
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor",
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope="mmeformer",
    locations=["mmeformer.training.optim"],
)
