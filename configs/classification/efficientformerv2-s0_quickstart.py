# The custom config, reduced so that two CPU cores can train it from scratch in minutes on crops of
# 64 px from ten photographs (`tools/quickstart.py classification`): training crops from the left half
# of each, validation crops from the right half. For real data use the template ..._custom.py.
_base_ = "efficientformerv2-s0_300e_in1k.py"

data_root = "data/quickstart-photographs/"
metainfo = dict(
    classes=(
        "astronaut",
        "brick",
        "cat",
        "coffee",
        "coins",
        "grass",
        "gravel",
        "motorcycle",
        "rocket",
        "tissue",
    )
)
num_classes = len(metainfo["classes"])
max_epochs = 8

# From scratch: start with large layer scales.
model = dict(
    data_preprocessor=dict(num_classes=num_classes),
    backbone=dict(layer_scale_init_value=0.5, bias_grid=2, head_bias_keys=4),
    head=dict(num_classes=num_classes, distillation=False, loss=dict(num_classes=num_classes)),
    train_cfg=dict(_delete_=True),
    # None could not be overridden by a dict.
    teacher=dict(_delete_=True),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]
    ),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=64, edge="short", backend="pillow", interpolation="bicubic"),
    dict(type="CenterCrop", crop_size=64),
    dict(type="PackInputs"),
]
dataset = dict(type="mmeformer.ImageFolderDataset", data_root=data_root, metainfo=metainfo)
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    sampler=dict(_delete_=True, type="DefaultSampler", shuffle=True),
    dataset=dict(pipeline=train_pipeline, **dataset),
)
val_dataloader = dict(batch_size=32, num_workers=1, dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(
        type="LinearLR",
        start_factor=0.01,
        by_epoch=True,
        begin=0,
        end=1,
        convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-5,
        by_epoch=True,
        begin=1,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
optim_wrapper = dict(
    optimizer=dict(lr=2e-3),
    constructor="DefaultOptimWrapperConstructor",
    clip_grad=dict(_delete_=True, max_norm=10, norm_type=2),
)
# `mmeformer train --auto-scale-lr` scales the learning rate, which is for this batch size.
auto_scale_lr = dict(base_batch_size=32)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=max_epochs, save_best=None),
)
randomness = dict(seed=0)
