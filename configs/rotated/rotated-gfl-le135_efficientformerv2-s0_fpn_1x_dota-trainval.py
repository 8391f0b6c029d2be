_base_ = [
    "../_base_/models/rotated-gfl_efficientformerv2.py",
    "../_base_/datasets/dota_trainval.py",
    "../_base_/schedules/adamw_1x_dota.py",
    "../_base_/rotated_runtime.py",
]
