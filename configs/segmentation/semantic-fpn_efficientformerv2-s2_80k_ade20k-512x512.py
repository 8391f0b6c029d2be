_base_ = "semantic-fpn_efficientformerv2-s2_40k_ade20k-512x512.py"
train_cfg = dict(max_iters=80000)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=1e-6, begin=0, end=80000, by_epoch=False)]
