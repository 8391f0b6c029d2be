_base_ = [
    "../_base_/models/semantic-fpn_efficientformerv2.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_40k.py",
    "../_base_/segmentation_runtime.py",
]
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=1e-6, begin=0, end=40000, by_epoch=False)]
