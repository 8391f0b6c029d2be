_base_ = [
    "../_base_/models/gfl-lite_efficientformer.py",
    "../_base_/detection_lite_640.py",
]
