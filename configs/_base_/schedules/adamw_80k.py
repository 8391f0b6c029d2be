# 80,000 iterations; otherwise as 40k.
_base_ = "adamw_40k.py"
train_cfg = dict(max_iters=80000)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, begin=0, end=80000, by_epoch=False)]
