# Your own COCO-format data with boxes only (masks in the files are not read): copy this file and
# change the three lines below. For data with masks use mask-rcnn_..._custom.py.
_base_ = "faster-rcnn_efficientformerv2-s0_fpn_1x_coco.py"

# ---- always changed -------------------------------------------------------------------------
data_root = "data/my_dataset/"  # has train2017/, val2017/ and annotations/instances_*.json
classes = ("cat", "dog")  # the category names of the annotation files, in any order
checkpoint = "timm://efficientformerv2_s0.snap_dist_in1k"  # backbone weights; None: from scratch

# ---- often changed --------------------------------------------------------------------------
scale = (1333, 800)  # images are resized to fit into this size; longer side first
batch_size = 2  # per GPU
learning_rate = 1e-4  # from pretrained weights, small batches; from scratch about 5e-4
anchor_scale = 8  # smallest anchors: 4 times this, in px; 4 for objects of 10 to 30 px
rois_per_image = 512  # boxes to train the head on; fewer are faster, 128 is enough on a CPU
epochs = 24
warmup_iters = 100
num_workers = 2
# Raw imagery: add the bands of red, green and blue, and the values of black and white, such as
# bands=(4, 3, 2), stretch=(0, 4095). Pictures (8 bits, gray or RGB) need nothing.
load_image = dict(type="mmeformer.LoadImageFromFile")

# ---- rarely changed -------------------------------------------------------------------------
scratch = checkpoint is None
model = dict(
    backbone=dict(
        # From scratch, train the batch norms and start with large layer scales.
        norm_eval=not scratch,
        layer_scale_init_value=0.5 if scratch else None,
        # Lets images be larger than in training (ImageNet's 7 x 7 keys, or this scale).
        head_bias_keys=(scale[0] // 32) * (scale[1] // 32) if scratch else 49,
        init_cfg=None if scratch else dict(type="Pretrained", checkpoint=checkpoint),
    ),
    neck=dict(norm_cfg=dict(type="BN") if scratch else None),
    rpn_head=dict(anchor_generator=dict(scales=[anchor_scale])),
    roi_head=dict(bbox_head=dict(num_classes=len(classes))),
    train_cfg=dict(rcnn=dict(sampler=dict(num=rois_per_image))),
)
metainfo = dict(classes=classes)
train_pipeline = [
    load_image,
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="RandomResize",
        scale=scale,
        ratio_range=(0.75, 1.25),
        keep_ratio=True,
    ),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    load_image,
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
tta_pipeline = [
    load_image,
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(
                    type="Resize", scale=tuple(int(side * ratio) for side in scale), keep_ratio=True
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
    batch_size=batch_size,
    num_workers=num_workers,
    persistent_workers=num_workers > 0,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        filter_cfg=dict(filter_empty_gt=False, min_size=1),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=num_workers,
    persistent_workers=num_workers > 0,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=epochs, val_interval=max(1, epochs // 12))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=warmup_iters),
    dict(
        type="CosineAnnealingLR",
        by_epoch=True,
        begin=int(0.7 * epochs),
        end=epochs,
        eta_min_ratio=0.01,
        convert_to_iter_based=True,
    ),
]
optim_wrapper = dict(optimizer=dict(lr=learning_rate), clip_grad=dict(max_norm=10, norm_type=2))
# `mmeformer train --auto-scale-lr` scales the learning rate, which is for this batch size.
auto_scale_lr = dict(base_batch_size=batch_size)
default_hooks = dict(logger=dict(interval=10))
