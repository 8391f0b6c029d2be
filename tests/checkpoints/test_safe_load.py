# SPDX-License-Identifier: Apache-2.0
"""Reading files runs nothing, says clearly what is wrong, and still resumes our own training."""

import importlib.util
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import load_script
from mmengine.hooks import EMAHook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader, load_checkpoint
from tiny import ARCH as TINY

from mmeformer.backbones import EfficientFormerV2
from mmeformer.checkpoints import safe_load
from mmeformer.checkpoints.load import load_pretrained
from mmeformer.errors import CheckpointError
from mmeformer.paths import config_dir, tools_dir


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


class CodePayload(Payload):
    def __reduce__(self):
        return exec, (f"import os; os.mkdir({self.marker!r})",)


class GetattrPayload(Payload):
    """Goes through the names that training checkpoints may use."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, "__init__")


def zipped(content, path):
    torch.save(content, path)


def legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare(protocol):
    def write(content, path):
        path.write_bytes(pickle.dumps(content, protocol=protocol))

    return write


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "the-code-ran"


@pytest.fixture
def malicious(tmp_path, marker):
    """A real malicious checkpoint: it holds a payload beside good weights."""
    path = tmp_path / "malicious.pth"
    state = EfficientFormerV2(TINY).state_dict()
    torch.save({"state_dict": state, "meta": Payload(marker)}, path)
    return path


def test_the_payload_is_real(malicious, marker):
    torch.load(malicious, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("payload", [Payload, CodePayload, GetattrPayload])
@pytest.mark.parametrize(
    "write", [zipped, legacy, bare(2), bare(4), bare(5)], ids=["zip", "legacy", "p2", "p4", "p5"]
)
def test_pickles_that_would_run_code_are_refused(payload, write, tmp_path, marker):
    path = tmp_path / "malicious.pth"
    write({"state_dict": {"a": torch.ones(2)}, "meta": payload(marker)}, path)
    with pytest.raises(CheckpointError, match="malicious.pth is refused.*Nothing was run"):
        safe_load.read(path)
    assert not marker.exists()


def test_refusal_names_what_it_found(tmp_path, marker):
    path = tmp_path / "malicious.pth"
    torch.save({"meta": Payload(marker)}, path)
    with pytest.raises(CheckpointError, match=r"\((posix|nt)\.mkdir\)"):
        safe_load.read(path)


def test_refused_through_init_cfg(malicious, marker):
    backbone = EfficientFormerV2(
        TINY, init_cfg=dict(type="Pretrained", checkpoint=str(malicious), allow_partial=True)
    )
    with pytest.raises(CheckpointError, match="is refused"):
        backbone.init_weights()
    assert not marker.exists()


def test_refused_through_mmengine(malicious, marker, tmp_path):
    for loader in (load_checkpoint, lambda model, name: CheckpointLoader.load_checkpoint(name)):
        with pytest.raises(CheckpointError, match="is refused"):
            loader(EfficientFormerV2(TINY), str(malicious))
    with pytest.raises(CheckpointError, match="is refused"):
        build_runner(tmp_path, load_from=str(malicious)).train()
    with pytest.raises(CheckpointError, match="is refused"):
        build_runner(tmp_path, load_from=str(malicious), resume=True).train()
    assert not marker.exists()


def test_refused_through_the_conversion_tool(malicious, marker, tmp_path, capsys):
    tool = load_script(tools_dir() / "convert_checkpoint.py")
    assert tool.main([str(malicious), str(tmp_path / "out.pth")]) == 1
    assert "malicious.pth is refused" in capsys.readouterr().err
    assert not marker.exists() and not (tmp_path / "out.pth").exists()


def test_refused_through_init_detector(malicious, marker):
    apis = pytest.importorskip("mmdet.apis")
    config = config_dir() / "detection" / "mask-rcnn_efficientformerv2-s0_fpn_quickstart.py"
    with pytest.raises(CheckpointError, match="is refused"):
        apis.init_detector(str(config), str(malicious), device="cpu")
    assert not marker.exists()


# Importing the libraries takes most of the time of a fresh process, so copies of one are used.
FRESH = """
import importlib, json, os, sys, traceback

for library in sys.argv[1:]:
    importlib.import_module(library + ".apis")
# An installed mmeformer gives mmcv its operators (mmeformer.ops); nothing else of it is there.
loaded = {name.split(".")[1] for name in sys.modules if name.startswith("mmeformer.")}
assert loaded <= {"version", "errors", "ops", "without_imgaug"}, loaded
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(os.path.dirname(request["log"]))
        sys.argv = request["argv"]
        status = 70
        try:
            exec(request["code"], {"__name__": "__main__"})
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def fresh_process():
    """Runs code where the libraries are imported, but nothing of ours except operators.

    (code, arguments, log file) -> (exit status, output).
    """
    libraries = [name for name in ("mmdet", "mmseg") if importlib.util.find_spec(name)]
    paths = [str(tools_dir().parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", FRESH, *libraries]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:

        def run(code, arguments, log):
            request = dict(code=code, argv=["program", *map(str, arguments)], log=str(log))
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            status = process.stdout.readline()
            assert status, "the process died"
            return int(status), log.read_text()

        # Imports print, too.
        assert any(line == "ready\n" for line in iter(process.stdout.readline, ""))
        yield run
        process.stdin.close()


INFERENCER = """
import importlib, sys
library, name, config, checkpoint = sys.argv[1:]
getattr(importlib.import_module(library + ".apis"), name)(config, checkpoint, device="cpu")
"""


@pytest.mark.parametrize(
    ("library", "name", "config"),
    [
        (
            "mmdet",
            "DetInferencer",
            "detection/mask-rcnn_efficientformerv2-s0_fpn_quickstart.py",
        ),
        (
            "mmseg",
            "MMSegInferencer",
            "segmentation/semantic-fpn_efficientformerv2-s0_quickstart.py",
        ),
    ],
)
def test_refused_through_inferencers(
    library, name, config, malicious, marker, fresh_process, tmp_path
):
    """These read the file before they build a model, which is what imports our package."""
    pytest.importorskip(library)
    arguments = [library, name, config_dir() / config, malicious]
    status, output = fresh_process(INFERENCER, arguments, tmp_path / "log")
    assert not marker.exists()
    assert status != 0
    assert "malicious.pth is refused" in output, output[-2000:]


RUN_SCRIPT = """
import runpy, sys
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_refused_through_tools_test(malicious, marker, fresh_process, tmp_path):
    """The command itself, with data good enough that the checkpoint is all that is wrong."""
    pytest.importorskip("mmdet")
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    cv2.imwrite(str(tmp_path / "val2017" / "1.png"), np.zeros((128, 128, 3), np.uint8))
    box = dict(bbox=[8, 8, 32, 32], segmentation=[[8, 8, 40, 8, 40, 40]], area=512, iscrowd=0)
    names = ("circle", "rectangle", "triangle", "star")
    (tmp_path / "annotations" / "instances_val2017.json").write_text(
        json.dumps(
            dict(
                images=[dict(id=1, file_name="1.png", height=128, width=128)],
                annotations=[dict(id=1, image_id=1, category_id=1, **box)],
                categories=[dict(id=i, name=name) for i, name in enumerate(names, 1)],
            )
        )
    )
    arguments = [
        tools_dir() / "test.py",
        "detection/mask-rcnn_efficientformerv2-s0_fpn_quickstart.py",
        malicious,
        "--work-dir",
        tmp_path / "work",
        "--cfg-options",
        f"test_dataloader.dataset.data_root={tmp_path}/",
        f"test_evaluator.ann_file={tmp_path}/annotations/instances_val2017.json",
        "test_dataloader.num_workers=0",
        "test_dataloader.persistent_workers=False",
    ]
    status, output = fresh_process(RUN_SCRIPT, arguments, tmp_path / "log")
    assert status == 1
    assert "malicious.pth is refused" in output, output[-2000:]
    assert not marker.exists()


# --- files that are not checkpoints --------------------------------------------------------------


def good_zip():
    path = Path("good.pth")
    torch.save({"state_dict": EfficientFormerV2(TINY).state_dict()}, path)
    return path.read_bytes()


def good_safetensors():
    return safetensors.torch.save(EfficientFormerV2(TINY).state_dict())


def random_bytes():
    return np.random.default_rng(0).bytes(5000)


BROKEN = {
    "truncated": (lambda: good_zip()[:20000], "damaged or incomplete.*download or copy it again"),
    "half": (lambda: good_zip()[: len(good_zip()) // 2], "damaged or incomplete"),
    "truncated safetensors": (lambda: good_safetensors()[:20000], "damaged or incomplete"),
    "random": (random_bytes, "neither a PyTorch nor a safetensors file"),
    "random pickle": (lambda: b"\x80\x02" + random_bytes(), "is refused|damaged"),
    "random archive": (lambda: b"PK\x03\x04" + random_bytes(), "damaged or incomplete"),
    "web page": (lambda: b"\n<!DOCTYPE html><html>404", "is a web page"),
    "pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"hello", "neither a PyTorch nor a safetensors file"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("through", ["read", "init_cfg", "mmengine"])
def test_files_that_are_not_checkpoints(kind, through, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, match = BROKEN[kind]
    path = tmp_path / "bad.pth"
    path.write_bytes(make())
    with pytest.raises(CheckpointError, match=rf"(?s)bad\.pth.*({match})"):
        if through == "read":
            safe_load.read(path)
        elif through == "init_cfg":
            load_pretrained(EfficientFormerV2(TINY), str(path))
        else:
            load_checkpoint(EfficientFormerV2(TINY), str(path))


def test_flipped_bytes_in_an_archive_are_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = bytearray(good_zip())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        safe_load.read(path)


def test_programs_and_lists_are_not_checkpoints(tmp_path):
    path = tmp_path / "program.pth"
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(CheckpointError, match="is a TorchScript program"):
        safe_load.read(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        safe_load.read(path)
    torch.save({"module": torch.nn.Linear(2, 2)}, path)
    with pytest.raises(CheckpointError, match="torch.nn.modules.linear.Linear"):
        safe_load.read(path)
    torch.save({"array": np.array([object()])}, path)
    with pytest.raises(CheckpointError, match="is refused"):
        safe_load.read(path)


def test_collections_that_mmengine_would_unpickle_are_refused():
    for name in ("s3://bucket/a.pth", "pavi://a.pth", "cluster:petrel://a.pth"):
        with pytest.raises(CheckpointError, match="Download the file and use its local path"):
            CheckpointLoader.load_checkpoint(name)
    with pytest.raises(CheckpointError, match="unknown to mmengine"):
        CheckpointLoader.load_checkpoint("open-mmlab://nothing")


def test_named_collections_are_read_safely(tmp_path, monkeypatch):
    path = tmp_path / "resnet.pth"
    torch.save({"state_dict": {"backbone.a": torch.ones(1), "head.b": torch.ones(1)}}, path)
    seen = []
    monkeypatch.setattr(safe_load, "download", lambda url: seen.append(url) or path)
    assert CheckpointLoader.load_checkpoint("torchvision://resnet18")["state_dict"]
    assert CheckpointLoader.load_checkpoint("open-mmlab://detectron/resnet50_caffe")
    assert list(CheckpointLoader.load_checkpoint("mmcls://vgg11")["state_dict"]) == ["a"]
    assert len(seen) == 3 and all(url.startswith("https://") for url in seen)


# --- what must still load ------------------------------------------------------------------------


def test_what_training_checkpoints_hold_survives(tmp_path):
    buffer = HistoryBuffer()
    for value in (1.0, 3.0):
        buffer.update(value)
    content = {
        "log": buffer,
        "best": np.float64(0.5),
        "whole": np.int64(3),
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "flags": np.array([True, False]),
        "meta": {"seed": None, "classes": ("cat", "dog"), "set": {1}},
    }
    path = tmp_path / "training.pth"
    torch.save(content, path)
    read = safe_load.read(path)
    assert read["log"].mean() == 2 and read["log"].statistics("max") == 3
    assert read["best"] == 0.5 and read["whole"] == 3
    assert np.array_equal(read["array"], content["array"])
    assert np.array_equal(read["flags"], content["flags"])
    assert read["meta"] == content["meta"]


@pytest.mark.parametrize("meta", ["not JSON", "[1]", "7", '"text"', "", '{"a": '])
def test_safetensors_with_metadata_of_other_programs(meta, tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path, {"meta": meta, "format": "pt"})
    assert list(safe_load.read(path)) == ["a"]


def test_names_of_compiled_models_are_plain(tmp_path):
    """Also for mmengine, which loads whole models by name."""
    state = {"_orig_mod.backbone._orig_mod.a": torch.ones(1), "neck.b": torch.ones(2)}
    for content in (state, {"state_dict": state, "meta": {}}):
        torch.save(content, tmp_path / "compiled.pth")
        read = safe_load.read(tmp_path / "compiled.pth")
        assert list(read.get("state_dict", read)) == ["backbone.a", "neck.b"]


RUN = itertools.count()


class Toy(BaseModel):
    """A backbone in a model that mmengine can train."""

    def __init__(self):
        super().__init__()
        self.backbone = EfficientFormerV2(TINY)

    def forward(self, inputs, mode="tensor"):
        outputs = self.backbone(inputs)
        return {"loss": sum(output.square().mean() for output in outputs)}


def build_runner(folder, **kwargs):
    """A Runner with everything that our recipes put into a checkpoint."""
    return Runner(
        model=Toy(),
        work_dir=str(folder / "work"),
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=False),
            dataset=[torch.ones(3, 32, 32) * i for i in range(4)],
            collate_fn=lambda batch: {"inputs": torch.stack(batch)},
        ),
        train_cfg=dict(by_epoch=True, max_epochs=kwargs.pop("max_epochs", 2)),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-3)),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=2),
            dict(type="MultiStepLR", by_epoch=True, milestones=[1]),
        ],
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)),
        custom_hooks=[EMAHook()],
        experiment_name=f"toy-{next(RUN)}",
        default_scope="mmengine",
        **kwargs,
    )


def test_training_checkpoints_resume_without_full_unpickling(tmp_path, monkeypatch):
    build_runner(tmp_path).train()
    path = tmp_path / "work" / "epoch_2.pth"
    modes = []
    original = torch.load

    def spy(*args, **kwargs):
        modes.append(kwargs.get("weights_only"))
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "load", spy)
    content = safe_load.read(path)
    assert {"optimizer", "message_hub", "param_schedulers", "ema_state_dict"} <= set(content)
    history = content["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(history, HistoryBuffer) and len(history.data[0]) == 4

    runner = build_runner(tmp_path, load_from=str(path), resume=True, max_epochs=3)
    runner.train()
    # Two of six iterations: the history below holds the four from before as well.
    assert runner.iter == 6
    resumed = safe_load.read(tmp_path / "work" / "epoch_3.pth")
    steps = {int(state["step"]) for state in resumed["optimizer"]["state"].values()}
    assert steps == {6}
    assert len(resumed["message_hub"]["log_scalars"]["train/loss"].data[0]) == 6
    assert modes and all(mode is True for mode in modes)


def test_backbone_from_our_training_checkpoint(tmp_path):
    build_runner(tmp_path).train()
    path = tmp_path / "work" / "epoch_2.pth"
    backbone = EfficientFormerV2(TINY)
    report = load_pretrained(backbone, str(path))
    state = safe_load.read(path)["state_dict"]
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, state[f"backbone.{name}"])
    assert len(report.loaded) == len(backbone.state_dict())
    assert "the weights are the moving averages (EMA) of the training, 'state_dict'" in report.notes


def test_map_location_reaches_both_containers(tmp_path):
    state = {"a": torch.ones(3)}
    torch.save(state, tmp_path / "a.pth")
    safetensors.torch.save_file(state, tmp_path / "a.bin")
    for name in ("a.pth", "a.bin"):
        assert safe_load.read(tmp_path / name, "meta")["a"].device.type == "meta"
        assert safe_load.read(tmp_path / name, None)["a"].device.type == "cpu"
