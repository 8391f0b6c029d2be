# The full GFL config, reduced so that two CPU cores can train it from scratch in minutes on
# generated scenes of 128 px (`make quickstart-rotated`). For real data use the template ..._custom.py.
_base_ = "rotated-gfl-le135_efficientformerv2-s0_fpn_qfl-dfl-1x_dota.py"

data_root = "data/quickstart-aerial/"
metainfo = dict(
    classes=("ship", "vehicle", "plane", "court"),
    palette=[(255, 80, 80), (255, 210, 60), (90, 200, 255), (150, 255, 120)],
)
size = (128, 128)
max_iters = 1000

# From scratch: train the batch norms, add some to the neck, start with large layer scales.
# For two cores: half the channels in neck and head, and half the depth of its towers.
width = 128
model = dict(
    backbone=dict(
        norm_eval=False,
        layer_scale_init_value=1.0,
        bias_grid=4,
        head_bias_keys=16,
        init_cfg=None,
    ),
    neck=dict(out_channels=width, norm_cfg=dict(type="BN")),
    bbox_head=dict(
        num_classes=len(metainfo["classes"]),
        in_channels=width,
        feat_channels=width,
        stacked_convs=2,
    ),
    test_cfg=dict(max_per_img=100),
)
train_pipeline = [
    dict(type="mmeformer.LoadImageFromFile"),
    dict(type="mmdet.LoadAnnotations", with_bbox=True, box_type="qbox"),
    dict(type="ConvertBoxType", box_type_mapping=dict(gt_bboxes="rbox")),
    dict(type="mmdet.RandomFlip", prob=0.75, direction=["horizontal", "vertical", "diagonal"]),
    dict(type="mmdet.PackDetInputs"),
]
val_pipeline = [
    dict(type="mmeformer.LoadImageFromFile"),
    dict(type="mmdet.Resize", scale=size, keep_ratio=True),
    dict(type="mmdet.LoadAnnotations", with_bbox=True, box_type="qbox"),
    dict(type="ConvertBoxType", box_type_mapping=dict(gt_bboxes="rbox")),
    dict(
        type="mmdet.PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(type="InfiniteSampler"),
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=val_pipeline),
)
test_dataloader = val_dataloader

train_cfg = dict(
    _delete_=True, type="IterBasedTrainLoop", max_iters=max_iters, val_interval=max_iters
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=50, end=max_iters, eta_min=1e-5),
]
optim_wrapper = dict(
    optimizer=dict(lr=2e-3, weight_decay=0.05), clip_grad=dict(max_norm=10, norm_type=2)
)
# `mmeformer train --auto-scale-lr` scales the learning rate, which is for this batch size.
auto_scale_lr = dict(base_batch_size=8)
log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(by_epoch=False, interval=max_iters, save_best=None),
)
visualizer = dict(line_width=1)
randomness = dict(seed=0)
