_base_ = [
    "../_base_/models/mask-rcnn_efficientformerv2.py",
    "../_base_/datasets/coco_instance_ms.py",
    "../_base_/schedules/adamw_3x.py",
    "../_base_/detection_runtime.py",
]
