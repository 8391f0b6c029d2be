# SPDX-License-Identifier: Apache-2.0
"""The teacher: its loss, and that it stays outside the model that it teaches."""

import copy

import numpy as np
import pytest
import timm
import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper
from tiny import ARCH

pytest.importorskip("mmpretrain")
from mmpretrain.structures import DataSample

from mmeformer.classification.classifier import Classifier
from mmeformer.classification.distillation import Teacher, distillation_loss
from mmeformer.registry import MODELS

CLASSES = 5
TEACHER = "test_vit"
"""A model of timm of 0.4 million weights."""


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_hard_loss_is_the_formula():
    student, teacher = np.random.default_rng(0).normal(0, 2, (2, 6, CLASSES))
    chosen = softmax(student)[np.arange(6), teacher.argmax(1)]
    found = distillation_loss(torch.tensor(student), torch.tensor(teacher), "hard", 3.0)
    assert found.item() == pytest.approx(-np.log(chosen).mean(), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_loss_is_the_formula(temperature):
    student, teacher = np.random.default_rng(1).normal(0, 2, (2, 6, CLASSES))
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    wanted = temperature**2 * (p * (np.log(p) - np.log(q))).sum() / student.size
    found = distillation_loss(torch.tensor(student), torch.tensor(teacher), "soft", temperature)
    assert found.item() == pytest.approx(wanted, rel=1e-12)


@pytest.fixture
def weights(tmp_path):
    """Weights of the teacher."""
    model = timm.create_model(TEACHER, num_classes=CLASSES)
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    return str(tmp_path / "teacher.pth")


def settings(teacher=None, classes=CLASSES, distillation=True, **head):
    extra = {} if teacher is None else dict(teacher=teacher)
    return dict(
        type="mmeformer.Classifier",
        data_preprocessor=dict(num_classes=classes),
        backbone=dict(type="mmeformer.EfficientFormerV2", arch=ARCH, out_indices=(3,)),
        head=dict(
            type="mmeformer.EfficientFormerHead",
            family="v2",
            in_channels=ARCH["widths"][3],
            num_classes=classes,
            distillation=distillation,
            loss=dict(type="mmpretrain.CrossEntropyLoss"),
            **head,
        ),
        **extra,
    )


@pytest.fixture
def student(weights):
    model = MODELS.build(settings(dict(timm=TEACHER, checkpoint=weights), alpha=0.3))
    model.init_weights()
    return model


def batch(size=160):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, size, size, generator=generator)
    return images, [DataSample().set_gt_label(label) for label in (0, 1, 2, 4)]


def test_the_teacher_sees_the_same_batch_and_takes_its_share(student, weights):
    student.eval()
    images, samples = batch()
    losses = student.loss(images, samples)
    teacher = timm.create_model(TEACHER, num_classes=CLASSES).eval()
    teacher.load_state_dict(torch.load(weights))
    x = student.head.pre_logits(student.extract_feat(images))
    labels = torch.tensor([0, 1, 2, 4])
    cross_entropy = torch.nn.functional.cross_entropy
    wanted = cross_entropy(student.head.fc(x), labels) * 0.7
    assert torch.allclose(losses["loss_cls"], wanted)
    wanted = cross_entropy(student.head.fc_dist(x), teacher(images).argmax(1)) * 0.3
    assert torch.allclose(losses["loss_dist"], wanted)


def test_the_teacher_belongs_to_nothing_of_the_model(student):
    plain = MODELS.build(settings())
    assert student.state_dict().keys() == plain.state_dict().keys()
    assert {n for n, _ in student.named_parameters()} == {n for n, _ in plain.named_parameters()}
    assert {n for n, _ in student.named_buffers()} == {n for n, _ in plain.named_buffers()}
    frozen = {name: tensor.clone() for name, tensor in student.teacher.model.state_dict().items()}

    wrapper = build_optim_wrapper(student, dict(optimizer=dict(type="SGD", lr=0.1)))
    optimized = {id(p) for group in wrapper.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in student.teacher.model.parameters()}
    average = ExponentialMovingAverage(student, momentum=0.1)
    assert average.module.teacher is student.teacher
    assert copy.deepcopy(student).teacher is student.teacher

    student.train()
    assert not student.teacher.model.training
    images, samples = batch()
    before = student.head.fc_dist.weight.clone()
    wrapper.update_params(sum(student.loss(images, samples).values()))
    average.update_parameters(student)
    assert not torch.equal(before, student.head.fc_dist.weight)
    for name, tensor in student.teacher.model.state_dict().items():
        assert torch.equal(frozen[name], tensor), name
    assert all(parameter.grad is None for parameter in student.teacher.model.parameters())


def test_testing_does_not_read_the_teacher():
    model = MODELS.build(settings(dict(timm=TEACHER, checkpoint="missing.pth")))
    model.eval().predict(*batch(64))
    with pytest.raises(FileNotFoundError, match=r"missing\.pth"):
        model.init_weights()


def test_what_is_no_teacher_is_named(weights):
    with pytest.raises(ValueError, match="distillation=True"):
        MODELS.build(settings(dict(timm=TEACHER, checkpoint=weights), distillation=False))
    with pytest.raises(ValueError, match="timm= .* or config="):
        Teacher(CLASSES)
    with pytest.raises(ValueError, match="needs a checkpoint"):
        Teacher(CLASSES, config="config.py")
    with pytest.raises(ValueError, match="do not fit timm's test_vit"):
        Teacher(CLASSES + 1, timm=TEACHER, checkpoint=weights)
    for wrong in (dict(kind="mild"), dict(alpha=1.5), dict(temperature=0.0)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            MODELS.build(settings(**wrong))


def test_a_teacher_of_other_classes_is_an_error(weights):
    teacher = Teacher(CLASSES, timm=TEACHER, checkpoint=weights)
    teacher.num_classes = 7
    with pytest.raises(ValueError, match="has 5 classes, the model 7"):
        teacher(batch()[0])


def test_whole_classifiers_load_by_init_cfg_or_not_at_all(tmp_path):
    first = MODELS.build(settings())
    path = str(tmp_path / "first.pth")
    torch.save(dict(state_dict=first.state_dict()), path)
    second = MODELS.build({**settings(), "init_cfg": dict(type="Pretrained", checkpoint=path)})
    assert isinstance(second, Classifier)
    second.init_weights()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    other = settings(classes=7)
    other["init_cfg"] = dict(type="Pretrained", checkpoint=path)
    with pytest.raises(RuntimeError, match=r"fc.weight \(5, 32\) where the model has \(7, 32\)"):
        MODELS.build(other).init_weights()
