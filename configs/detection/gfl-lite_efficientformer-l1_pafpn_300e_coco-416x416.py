_base_ = [
    "../_base_/models/gfl-lite_efficientformer.py",
    "../_base_/detection_lite_416.py",
]
# A 416 px side has 13 cells at stride 32.
model = dict(backbone=dict(bias_grid=13))
