_base_ = [
    "../_base_/models/rtmdet-ins-lite_efficientformer.py",
    "../_base_/detection_lite_masks_640.py",
]
