# SPDX-License-Identifier: Apache-2.0
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import nn

from mmeformer.detection.tta import InstanceTTAModel


def view(boxes, scores, masks, flip, direction="horizontal"):
    sample = DetDataSample(
        metainfo=dict(ori_shape=(20, 30), flip=flip, flip_direction=direction if flip else None)
    )
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor(scores),
        labels=torch.zeros(len(scores), dtype=torch.long),
        masks=masks,
    )
    return sample


def make_model():
    model = InstanceTTAModel.__new__(InstanceTTAModel)
    nn.Module.__init__(model)
    model.tta_cfg = dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=5)
    return model


def box_mask(box):
    mask = torch.zeros(20, 30, dtype=torch.bool)
    x1, y1, x2, y2 = box
    mask[y1:y2, x1:x2] = True
    return mask


def test_masks_follow_their_boxes():
    left, right = [2, 3, 10, 12], [18, 5, 28, 15]
    for direction, flip in (("horizontal", lambda m: m.flip(1)), ("vertical", lambda m: m.flip(0))):
        mirrored = {
            "horizontal": lambda b: [30 - b[2], b[1], 30 - b[0], b[3]],
            "vertical": lambda b: [b[0], 20 - b[3], b[2], 20 - b[1]],
        }[direction]
        plain = view([left], [0.9], box_mask(left)[None], False)
        # The mirrored view finds the same object (weaker) and one more.
        flipped = view(
            [mirrored(left), mirrored(right)],
            [0.5, 0.8],
            torch.stack([flip(box_mask(left)), flip(box_mask(right))]),
            True,
            direction,
        )
        (merged,) = make_model().merge_preds([[plain, flipped]])
        found = merged.pred_instances
        assert found.bboxes.tolist() == [left, right]
        torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.8]))
        assert torch.equal(found.masks, torch.stack([box_mask(left), box_mask(right)]))


def test_nothing_found():
    empty = view([], [], torch.zeros(0, 20, 30, dtype=torch.bool), False)
    (merged,) = make_model().merge_preds([[empty, empty]])
    assert merged.pred_instances.masks.shape == (0, 20, 30)
