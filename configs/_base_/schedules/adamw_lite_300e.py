# 300 epochs of AdamW, lr 4e-3 for 256 images: flat, then cosine from the middle; validated more
# often at the end. Source: mmdet's configs/rtmdet/rtmdet_l_8xb32-300e_coco.py.
train_cfg = dict(
    type="EpochBasedTrainLoop",
    max_epochs=300,
    val_interval=10,
    dynamic_intervals=[(280, 1)],
)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-5, by_epoch=False, begin=0, end=1000),
    dict(
        type="CosineAnnealingLR",
        eta_min_ratio=0.05,
        begin=150,
        end=300,
        T_max=150,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=4e-3, betas=(0.9, 0.999), weight_decay=0.05),
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
auto_scale_lr = dict(enable=False, base_batch_size=256)
