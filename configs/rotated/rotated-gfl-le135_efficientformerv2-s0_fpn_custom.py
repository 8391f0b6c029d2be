# Your own rotated boxes in DOTA's format: copy this file and change the three lines below.
_base_ = "rotated-gfl-le135_efficientformerv2-s0_fpn_qfl-dfl-1x_dota.py"

# ---- always changed -------------------------------------------------------------------------
data_root = "data/my_dataset/"  # has train/ and val/, each with images/ and annfiles/
classes = ("ship", "plane")  # the class names of the label files
checkpoint = "timm://efficientformerv2_s0.snap_dist_in1k"  # backbone weights; None: from scratch

# ---- often changed --------------------------------------------------------------------------
size = (1024, 1024)  # size of the patches from tools/split_dota.py
batch_size = 2  # per GPU
learning_rate = 1e-4  # from pretrained weights, small batches; from scratch about 1e-3
anchor_scale = 4  # smallest anchors: 8 times this, in px
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
        bias_grid=[max(1, side // 32) for side in size],
        head_bias_keys=max(1, size[0] * size[1] // 1024) if scratch else 49,
        init_cfg=None if scratch else dict(type="Pretrained", checkpoint=checkpoint),
    ),
    neck=dict(norm_cfg=dict(type="BN") if scratch else None),
    bbox_head=dict(num_classes=len(classes), anchor_generator=dict(scales=[anchor_scale])),
)
metainfo = dict(classes=classes)
train_pipeline = [
    load_image,
    dict(type="mmdet.LoadAnnotations", with_bbox=True, box_type="qbox"),
    dict(type="ConvertBoxType", box_type_mapping=dict(gt_bboxes="rbox")),
    dict(type="mmdet.Resize", scale=size, keep_ratio=True, clip_object_border=False),
    dict(type="mmdet.RandomFlip", prob=0.75, direction=["horizontal", "vertical", "diagonal"]),
    dict(type="mmdet.PackDetInputs"),
]
val_pipeline = [
    load_image,
    dict(type="mmdet.Resize", scale=size, keep_ratio=True),
    dict(type="mmdet.LoadAnnotations", with_bbox=True, box_type="qbox"),
    dict(type="ConvertBoxType", box_type_mapping=dict(gt_bboxes="rbox")),
    dict(
        type="mmdet.PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    persistent_workers=num_workers > 0,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=num_workers,
    persistent_workers=num_workers > 0,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=val_pipeline),
)
test_dataloader = val_dataloader

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
