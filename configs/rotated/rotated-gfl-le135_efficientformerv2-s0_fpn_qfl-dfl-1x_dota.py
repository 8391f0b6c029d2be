_base_ = "rotated-gfl-le135_efficientformerv2-s0_fpn_1x_dota.py"
# Generalized focal loss: the score learns the IoU of its box, each distribution learns its target.
model = dict(
    bbox_head=dict(
        loss_cls=dict(_delete_=True, type="mmdet.QualityFocalLoss", use_sigmoid=True, beta=2.0),
        loss_bbox=dict(loss_weight=2.0),
        loss_dfl=dict(type="mmdet.DistributionFocalLoss", loss_weight=0.25),
    )
)
