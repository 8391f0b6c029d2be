_base_ = "mask-rcnn_efficientformer-l1_fpn_1x_coco.py"
optim_wrapper = dict(type="AmpOptimWrapper", loss_scale="dynamic")
