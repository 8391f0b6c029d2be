# The 40k config, reduced so that two CPU cores can train it from scratch in minutes on generated
# shapes of 128 px (`make quickstart-seg`). For real data use the template ..._custom.py.
_base_ = "semantic-fpn_efficientformerv2-s0_40k_ade20k-512x512.py"

data_root = "data/quickstart-masks/"
metainfo = dict(
    classes=("background", "circle", "rectangle", "triangle", "star"),
    palette=[[60, 60, 60], [220, 60, 60], [60, 160, 60], [70, 90, 220], [230, 190, 50]],
)
size = (128, 128)
max_iters = 500

# From scratch: train the batch norms, add some to the neck, start with large layer scales.
model = dict(
    data_preprocessor=dict(size=size),
    backbone=dict(norm_eval=False, layer_scale_init_value=0.5, bias_grid=4, init_cfg=None),
    neck=dict(out_channels=128, norm_cfg=dict(type="SyncBN")),
    decode_head=dict(
        in_channels=[128, 128, 128, 128], channels=64, num_classes=len(metainfo["classes"])
    ),
    test_cfg=dict(crop_size=size, stride=(85, 85)),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomFlip", prob=0.75, direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(side, side), keep_ratio=True) for side in (96, 128, 160)],
            [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
dataset = dict(
    type="mmeformer.SegmentationDataset",
    data_root=data_root,
    metainfo=metainfo,
    img_suffix=".png",
)
train_dataloader = dict(
    batch_size=16, num_workers=1, dataset=dict(pipeline=train_pipeline, **dataset)
)
val_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader

train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=50, end=max_iters, eta_min=1e-5),
]
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=10, norm_type=2))
# `mmeformer train --auto-scale-lr` scales the learning rate, which is for this batch size.
auto_scale_lr = dict(base_batch_size=16)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=max_iters, save_best=None))
randomness = dict(seed=0)
