# COCO 2017 with boxes only; masks are neither read nor checked. Otherwise as coco_instance.py.
_base_ = "coco_instance.py"

backend_args = None

train_pipeline = [
    dict(type="mmeformer.LoadImageFromFile", backend_args=backend_args),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_meta_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
test_pipeline = [
    dict(type="mmeformer.LoadImageFromFile", backend_args=backend_args),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=test_meta_keys),
]
tta_pipeline = [
    dict(type="mmeformer.LoadImageFromFile", backend_args=backend_args),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="Resize", scale=(1333, 800), keep_ratio=True),
                dict(type="Resize", scale=(1600, 960), keep_ratio=True),
            ],
            [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
            [dict(type="LoadAnnotations", with_bbox=True)],
            [dict(type="PackDetInputs", meta_keys=(*test_meta_keys, "flip", "flip_direction"))],
        ],
    ),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
