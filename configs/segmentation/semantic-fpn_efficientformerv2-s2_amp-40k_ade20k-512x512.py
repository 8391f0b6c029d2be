_base_ = "semantic-fpn_efficientformerv2-s2_40k_ade20k-512x512.py"
optim_wrapper = dict(type="AmpOptimWrapper", loss_scale="dynamic")
