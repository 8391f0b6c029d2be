_base_ = [
    "../_base_/datasets/coco_instance_ms.py",
    "../_base_/schedules/adamw_3x.py",
    "../_base_/detection_runtime.py",
    "../_base_/models/mask-rcnn_efficientformerv2.py",
]
model = dict(
    backbone=dict(
        arch="s2", init_cfg=dict(checkpoint="timm://efficientformerv2_s2.snap_dist_in1k")
    ),
    neck=dict(in_channels=[32, 64, 144, 288]),
)
