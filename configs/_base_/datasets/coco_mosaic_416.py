# COCO 2017 boxes for light detectors: mosaics, mixed images, large changes of scale and crops of
# 416 px; otherwise as coco_mosaic_640.py.
_base_ = "coco_detection.py"

size = (416, 416)
train_pipeline = [
    dict(type="mmeformer.LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="CachedMosaic", img_scale=size, pad_val=114.0, max_cached_images=20, random_pop=False
    ),
    dict(
        type="RandomResize",
        scale=(size[0] * 2, size[1] * 2),
        ratio_range=(0.5, 2.0),
        keep_ratio=True,
    ),
    dict(type="RandomCrop", crop_size=size),
    dict(type="YOLOXHSVRandomAug"),
    dict(type="RandomFlip", prob=0.5),
    dict(type="Pad", size=size, pad_val=dict(img=(114, 114, 114))),
    dict(
        type="CachedMixUp",
        img_scale=size,
        ratio_range=(1.0, 1.0),
        max_cached_images=10,
        random_pop=False,
        pad_val=(114, 114, 114),
        prob=0.5,
    ),
    dict(type="PackDetInputs"),
]
# The last epochs see whole pictures as they are.
last_pipeline = [
    dict(type="mmeformer.LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomResize", scale=size, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=size),
    dict(type="YOLOXHSVRandomAug"),
    dict(type="RandomFlip", prob=0.5),
    dict(type="Pad", size=size, pad_val=dict(img=(114, 114, 114))),
    dict(type="PackDetInputs"),
]
test_meta_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
test_pipeline = [
    dict(type="mmeformer.LoadImageFromFile"),
    dict(type="Resize", scale=size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=test_meta_keys),
]
larger = tuple(int(side * 1.2) for side in size)
tta_pipeline = [
    dict(type="mmeformer.LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="Resize", scale=size, keep_ratio=True),
                dict(type="Resize", scale=larger, keep_ratio=True),
            ],
            [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
            [dict(type="LoadAnnotations", with_bbox=True)],
            [dict(type="PackDetInputs", meta_keys=(*test_meta_keys, "flip", "flip_direction"))],
        ],
    ),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=10,
    batch_sampler=None,
    dataset=dict(filter_cfg=dict(filter_empty_gt=False), pipeline=train_pipeline),
)
val_dataloader = dict(batch_size=5, num_workers=10, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
