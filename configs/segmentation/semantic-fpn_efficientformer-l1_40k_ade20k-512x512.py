_base_ = [
    "../_base_/models/semantic-fpn_efficientformer.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_40k.py",
    "../_base_/segmentation_runtime.py",
]
