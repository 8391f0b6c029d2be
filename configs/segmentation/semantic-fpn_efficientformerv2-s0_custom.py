# Your own images and label masks: copy this file and change the three lines below.
_base_ = "semantic-fpn_efficientformerv2-s0_40k_ade20k-512x512.py"

# ---- always changed -------------------------------------------------------------------------
data_root = "data/my_dataset/"  # has images/ and annotations/, each training/ and validation/
# In the order of the labels. At least two: for one kind of object name the background as well.
metainfo = dict(classes=("road", "car"), palette=[[128, 64, 128], [0, 0, 142]])
checkpoint = "timm://efficientformerv2_s0.snap_dist_in1k"  # backbone weights; None: from scratch

# ---- often changed --------------------------------------------------------------------------
# True: masks have 0 for "other" and 1, 2, ... for the classes. False: 0, 1, ... for the classes.
# In both cases 255 means "unlabeled".
reduce_zero_label = False
img_suffix = ".jpg"
seg_map_suffix = ".png"
scale = (2048, 512)  # images are resized to fit into this size; longer side first
crop_size = (512, 512)  # in training, height first; at most the shorter side of most images
batch_size = 4  # per GPU
class_weight = None  # such as [1.0, 3.0]: weight of each class in the loss
learning_rate = 2e-4
max_iters = 8000
warmup_iters = 200
num_workers = 2
# Raw imagery: type="mmeformer.LoadImageFromFile" with the bands of red, green and blue, and the
# values of black and white, such as bands=(4, 3, 2), stretch=(0, 4095).
load_image = dict(type="LoadImageFromFile")  # the name that MMSegInferencer looks for

# ---- rarely changed -------------------------------------------------------------------------
scratch = checkpoint is None
num_classes = len(metainfo["classes"])
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        # From scratch, train the batch norms and start with large layer scales.
        norm_eval=not scratch,
        layer_scale_init_value=0.5 if scratch else None,
        bias_grid=tuple(-(-side // 32) for side in crop_size),
        # Lets images be larger than in training (ImageNet's 7 x 7 keys, or the crops).
        head_bias_keys=(crop_size[0] // 32) * (crop_size[1] // 32) if scratch else 49,
        init_cfg=None if scratch else dict(type="Pretrained", checkpoint=checkpoint),
    ),
    neck=dict(norm_cfg=dict(type="SyncBN") if scratch else None),
    decode_head=dict(
        num_classes=num_classes,
        # Mean over labeled pixels only, as mmseg's loss with class weights always is.
        loss_decode=dict(avg_non_ignore=class_weight is None, class_weight=class_weight),
    ),
    # V2's talking heads add a constant per key, so whole images much larger than the training crops
    # give wrong results. Windows have the size of the crops. See docs/segmentation.md.
    test_cfg=dict(
        mode="slide", crop_size=crop_size, stride=tuple(side * 2 // 3 for side in crop_size)
    ),
)
train_pipeline = [
    load_image,
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    load_image,
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
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
                for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
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
    reduce_zero_label=reduce_zero_label,
    img_suffix=img_suffix,
    seg_map_suffix=seg_map_suffix,
)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    persistent_workers=num_workers > 0,
    dataset=dict(pipeline=train_pipeline, **dataset),
)
val_dataloader = dict(
    num_workers=num_workers,
    persistent_workers=num_workers > 0,
    dataset=dict(pipeline=test_pipeline, **dataset),
)
test_dataloader = val_dataloader

train_cfg = dict(max_iters=max_iters, val_interval=max(1, max_iters // 10))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=warmup_iters),
    dict(
        type="CosineAnnealingLR",
        by_epoch=False,
        begin=int(0.7 * max_iters),
        end=max_iters,
        eta_min_ratio=0.01,
    ),
]
optim_wrapper = dict(optimizer=dict(lr=learning_rate), clip_grad=dict(max_norm=10, norm_type=2))
# `mmeformer train --auto-scale-lr` scales the learning rate, which is for this batch size.
auto_scale_lr = dict(base_batch_size=batch_size)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=max(1, max_iters // 10)))
