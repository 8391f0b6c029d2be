_base_ = [
    "../_base_/models/classifier_efficientformer.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/adamw_300e.py",
    "../_base_/classification_runtime.py",
]
