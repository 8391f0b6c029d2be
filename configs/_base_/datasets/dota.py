# DOTA-v1.0 cut into patches of 1024 px that overlap by 512 (tools/split_dota.py): train and val in
# `train/` and `val/`, each with `images/` and `annfiles/`. Random flips, 2 patches per GPU.
dataset_type = "mmeformer.DOTADataset"
data_root = "data/split_ss_dota/"
backend_args = None

train_pipeline = [
    dict(type="mmeformer.LoadImageFromFile", backend_args=backend_args),
    dict(type="mmdet.LoadAnnotations", with_bbox=True, box_type="qbox"),
    dict(type="ConvertBoxType", box_type_mapping=dict(gt_bboxes="rbox")),
    # Rotated boxes cannot be clipped to the image.
    dict(type="mmdet.Resize", scale=(1024, 1024), keep_ratio=True, clip_object_border=False),
    dict(type="mmdet.RandomFlip", prob=0.75, direction=["horizontal", "vertical", "diagonal"]),
    dict(type="mmdet.PackDetInputs"),
]
test_meta_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
val_pipeline = [
    dict(type="mmeformer.LoadImageFromFile", backend_args=backend_args),
    dict(type="mmdet.Resize", scale=(1024, 1024), keep_ratio=True),
    # After resizing: boxes are compared in pixels of the file.
    dict(type="mmdet.LoadAnnotations", with_bbox=True, box_type="qbox"),
    dict(type="ConvertBoxType", box_type_mapping=dict(gt_bboxes="rbox")),
    dict(type="mmdet.PackDetInputs", meta_keys=test_meta_keys),
]
test_pipeline = [
    dict(type="mmeformer.LoadImageFromFile", backend_args=backend_args),
    dict(type="mmdet.Resize", scale=(1024, 1024), keep_ratio=True),
    dict(type="mmdet.PackDetInputs", meta_keys=test_meta_keys),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    batch_sampler=None,
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file="train/annfiles/",
        data_prefix=dict(img_path="train/images/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file="val/annfiles/",
        data_prefix=dict(img_path="val/images/"),
        test_mode=True,
        pipeline=val_pipeline,
    ),
)
test_dataloader = val_dataloader
# The published columns: AP50, AP75 and AP over IoU 0.5 to 0.95.
val_evaluator = dict(type="mmeformer.DOTAMetric")
test_evaluator = val_evaluator
