_base_ = "mask-rcnn_efficientformerv2-s2_fpn_1x_coco.py"
optim_wrapper = dict(type="AmpOptimWrapper", loss_scale="dynamic")
