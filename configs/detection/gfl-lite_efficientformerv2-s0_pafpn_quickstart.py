# The light detector, reduced so that two CPU cores can train it from scratch in minutes on generated
# shapes of 128 px (`make quickstart-light`). For real data use the template ..._custom.py.
_base_ = "gfl-lite_efficientformerv2-s0_pafpn_300e_coco-416x416.py"

data_root = "data/quickstart-shapes/"
classes = ("circle", "rectangle", "triangle", "star")
size = (128, 128)
max_iters = 550

# From scratch: train the batch norms, start with large layer scales.
model = dict(
    backbone=dict(layer_scale_init_value=1.0, bias_grid=4, head_bias_keys=None, init_cfg=None),
    bbox_head=dict(num_classes=len(classes)),
)
metainfo = dict(classes=classes)
train_pipeline = [
    dict(type="mmeformer.LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.75, direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="mmeformer.LoadImageFromFile"),
    dict(type="Resize", scale=size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
tta_pipeline = [
    dict(type="mmeformer.LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(
                    type="Resize", scale=tuple(int(side * ratio) for side in size), keep_ratio=True
                )
                for ratio in (1.0, 1.2)
            ],
            [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
            [dict(type="LoadAnnotations", with_bbox=True)],
            [
                dict(
                    type="PackDetInputs",
                    meta_keys=(
                        *("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
                        *("flip", "flip_direction"),
                    ),
                )
            ],
        ],
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(type="InfiniteSampler"),
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        filter_cfg=dict(filter_empty_gt=True, min_size=0),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

train_cfg = dict(
    _delete_=True, type="IterBasedTrainLoop", max_iters=max_iters, val_interval=max_iters
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=50, end=max_iters, eta_min=1e-5),
]
optim_wrapper = dict(optimizer=dict(lr=5e-3), clip_grad=dict(max_norm=10, norm_type=2))
# `mmeformer train --auto-scale-lr` scales the learning rate, which is for this batch size.
auto_scale_lr = dict(base_batch_size=8)
log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(by_epoch=False, interval=max_iters, save_best=None),
)
custom_hooks = [dict(type="NumClassCheckHook")]
randomness = dict(seed=0)
