# 300 epochs of AdamW, lr 1e-3 for 1024 images: 5 epochs of warm-up from 1e-5, cosine to 1e-5.
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=True, begin=0, end=5),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=5, end=300),
]
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.025),
    # Adaptive clipping; acts on unscaled gradients under mixed precision.
    constructor="mmeformer.AdaptiveClippingConstructor",
    clip_grad=dict(type="agc", clip_factor=0.01),
    # Weight decay only for convolutions and linear layers. `gamma` are the layer scales.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={
            ".ls1.gamma": dict(decay_mult=0.0),
            ".ls2.gamma": dict(decay_mult=0.0),
            "attention_bias.table": dict(decay_mult=0.0),
        },
    ),
)
# `mmeformer train --auto-scale-lr` scales the learning rate to the actual batch size.
auto_scale_lr = dict(enable=False, base_batch_size=1024)
