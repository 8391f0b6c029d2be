# 40,000 iterations of AdamW, lr 2e-4 for 32 images, the published recipe: poly, no warm-up.
train_cfg = dict(type="IterBasedTrainLoop", max_iters=40000, val_interval=4000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
# The published schedule of V1 ends at 0; V2 configs end at 1e-6.
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, begin=0, end=40000, by_epoch=False)]
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=1e-4),
    # Weight decay only for convolutions and linear layers. `gamma` are the layer scales. (The
    # published recipe decays everything: at this rate 0.04% of a value over the whole training.)
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
auto_scale_lr = dict(enable=False, base_batch_size=32)
