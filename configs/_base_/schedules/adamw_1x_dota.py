# 12 epochs of AdamW, lr 1e-4 for 2 patches, the published recipe of EfficientFormer-L1 on DOTA.
_base_ = "adamw_1x.py"
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=35, norm_type=2),
)
auto_scale_lr = dict(base_batch_size=2)
