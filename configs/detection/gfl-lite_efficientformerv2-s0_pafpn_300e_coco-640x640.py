_base_ = [
    "../_base_/models/gfl-lite_efficientformerv2.py",
    "../_base_/detection_lite_640.py",
]
