_base_ = [
    "../_base_/models/gfl_efficientformer.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/adamw_1x.py",
    "../_base_/detection_runtime.py",
]
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
