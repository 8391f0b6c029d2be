# 12 epochs of AdamW, lr 2e-4 for 16 images, the published 1x recipe.
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
optim_wrapper = dict(
    type="OptimWrapper",
    # Published for V2; V1 configs set 1e-4.
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
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
auto_scale_lr = dict(enable=False, base_batch_size=16)
