_base_ = [
    "../_base_/models/mask-rcnn_efficientformer.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/adamw_1x.py",
    "../_base_/detection_runtime.py",
]
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
