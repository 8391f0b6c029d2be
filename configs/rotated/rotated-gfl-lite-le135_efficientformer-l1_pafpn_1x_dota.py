_base_ = [
    "../_base_/models/rotated-gfl-lite_efficientformer.py",
    "../_base_/datasets/dota.py",
    "../_base_/schedules/adamw_1x_dota.py",
    "../_base_/rotated_runtime.py",
]
