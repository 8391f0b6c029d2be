# Your own COCO-format data with boxes only (masks in the files are not read), with the light
# detector for phones and CPUs: copy this file and change the three lines below. Faster R-CNN:
# faster-rcnn_..._custom.py; for data with masks use mask-rcnn_..._custom.py.
_base_ = "gfl-lite_efficientformerv2-s0_pafpn_300e_coco-640x640.py"

# ---- always changed -------------------------------------------------------------------------
data_root = "data/my_dataset/"  # has train2017/, val2017/ and annotations/instances_*.json
classes = ("cat", "dog")  # the category names of the annotation files, in any order
checkpoint = "timm://efficientformerv2_s0.snap_dist_in1k"  # backbone weights; None: from scratch

# ---- often changed --------------------------------------------------------------------------
scale = (640, 640)  # images are resized to fit into this size; longer side first
stride = 8  # of the finest level, in px; 4 for objects below about 16 px, at twice the time
width = 96  # channels of neck and head; 96 to 160
batch_size = 8  # per GPU
learning_rate = 2e-4  # from pretrained weights, small batches; from scratch about 1e-3
epochs = 24
warmup_iters = 100
num_workers = 2
# Raw imagery: add the bands of red, green and blue, and the values of black and white, such as
# bands=(4, 3, 2), stretch=(0, 4095). Pictures (8 bits, gray or RGB) need nothing.
load_image = dict(type="mmeformer.LoadImageFromFile")

# ---- rarely changed -------------------------------------------------------------------------
scratch = checkpoint is None
first = {4: 0, 8: 1}[stride]
model = dict(
    backbone=dict(
        out_indices=tuple(range(first, 4)),
        # With pretrained weights and small batches, keep their statistics of the batch norms.
        norm_eval=not scratch,
        layer_scale_init_value=0.5 if scratch else None,
        bias_grid=[max(1, side // 32) for side in scale[::-1]],
        # Lets images be larger than in training (ImageNet's 7 x 7 keys, or this scale).
        head_bias_keys=(scale[0] // 32) * (scale[1] // 32) if scratch else 49,
        init_cfg=None if scratch else dict(type="Pretrained", checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[32, 48, 96, 176][first:], out_channels=width),
    bbox_head=dict(
        num_classes=len(classes),
        in_channels=width,
        feat_channels=width,
        anchor_generator=dict(strides=[4, 8, 16, 32][first:]),
    ),
)
metainfo = dict(classes=classes)
train_pipeline = [
    load_image,
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="RandomResize",
        scale=scale,
        ratio_range=(0.75, 1.0),
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

train_cfg = dict(
    _delete_=True,
    type="EpochBasedTrainLoop",
    max_epochs=epochs,
    val_interval=max(1, epochs // 12),
)
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
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=1))
# Without mosaics and averaged weights: for long trainings, as in the base config.
custom_hooks = [dict(type="NumClassCheckHook")]
