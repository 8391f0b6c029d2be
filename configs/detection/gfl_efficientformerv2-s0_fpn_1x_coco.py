_base_ = [
    "../_base_/models/gfl_efficientformerv2.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/adamw_1x.py",
    "../_base_/detection_runtime.py",
]
