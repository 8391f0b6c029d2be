_base_ = [
    "../_base_/models/classifier_efficientformerv2.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/adamw_300e.py",
    "../_base_/classification_runtime.py",
]
model = dict(backbone=dict(arch="s2"), head=dict(in_channels=288))
