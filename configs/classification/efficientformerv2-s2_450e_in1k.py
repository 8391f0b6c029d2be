_base_ = "efficientformerv2-s2_300e_in1k.py"
train_cfg = dict(max_epochs=450)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=True, begin=0, end=5),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=5, end=450),
]
