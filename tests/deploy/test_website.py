# SPDX-License-Identifier: Apache-2.0
"""The web page: what is built, and that its JavaScript computes what the runtime computes."""

import json
import re
import shutil
import subprocess
import threading
import urllib.request
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest

import mmeformer
from mmeformer import runtime, tasks
from mmeformer.commands.web import main
from mmeformer.deploy import website
from mmeformer.deploy.check import match, random_image
from mmeformer.runtime.images import prepare
from mmeformer.runtime.metadata import Metadata
from mmeformer.runtime.parts import patch_side, window_side
from mmeformer.windows import windows

SOURCES = Path(mmeformer.__file__).parent / "deploy/web"
METADATA = Metadata(
    task="detection",
    version="0",
    config="config",
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    bgr_to_rgb=True,
    scale=(133, 80),
    pad_divisor=32,
    classes=("a", "b", "c"),
    score_threshold=0.1,
    iou_threshold=0.3,
    max_per_image=20,
    mask_threshold=0.5,
)
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")


def in_node(folder: Path, script: str, values: object) -> object:
    """Run JavaScript with the page's modules; ``values`` is its input, the last line its result."""
    for path in SOURCES.glob("*.js"):
        shutil.copy(path, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "values.json").write_text(json.dumps(values))
    (folder / "script.js").write_text(
        'import { readFileSync } from "node:fs";\n'
        'import * as images from "./images.js";\nimport * as results from "./results.js";\n'
        f'const values = JSON.parse(readFileSync("values.json", "utf8"));\n{script}\n'
    )
    done = subprocess.run(["node", "script.js"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def page(metadata: Metadata) -> dict:
    return {**asdict(metadata), "stretches": metadata.export.stretches}


def pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 3), np.uint8)


def as_picture(image: np.ndarray) -> dict:
    height, width = image.shape[:2]
    return dict(data=image[..., ::-1].ravel().tolist(), width=width, height=height)


@needs_node
def test_pictures_are_prepared_as_in_python(tmp_path):
    variants = [
        METADATA,
        replace(METADATA, bgr_to_rgb=False, size=(64, 96), preprocessing_in_graph=True),
        replace(METADATA, keep_ratio=False, pad_divisor=1),
        replace(METADATA, scale=None, multiple=32, pad_divisor=1),
        replace(METADATA, task="segmentation", size=(64, 96), pad_divisor=1),
        replace(METADATA, task="classification", scale=None, shorter_side=36, crop=(32, 32)),
    ]
    cases = [(meta, pixels(*size)) for meta in variants for size in [(33, 47), (200, 90), (64, 96)]]
    found = in_node(
        tmp_path,
        """const out = values.map(([meta, picture]) => {
          const item = images.prepare(picture, meta);
          return { ...item, numbers: Array.from(item.numbers) };
        });
        console.log(JSON.stringify(out));""",
        [(page(meta), as_picture(image)) for meta, image in cases],
    )
    for (meta, image), ours in zip(cases, found, strict=True):
        expected = prepare(image, meta)
        assert tuple(ours["size"]) == expected.size and tuple(ours["original"]) == image.shape[:2]
        numbers = np.array(ours["numbers"], np.float32).reshape(expected.data.shape)
        # OpenCV rounds weights to eleven bits: one step of 255. Pillow rounds twice.
        step = 2.01 if meta.crop else 1.01
        step = step if meta.preprocessing_in_graph else step / min(meta.std)
        assert np.abs(numbers - expected.data.astype(np.float32)).max() <= step
        blank = expected.data == 0
        assert (numbers[blank] == 0).mean() > 0.9 or not blank.any()


@needs_node
@pytest.mark.parametrize("room", [{}, dict(scale=(64, 64), size=(48, 64))])
def test_windows_are_those_of_the_runtime(tmp_path, room):
    sizes = [(150, 50), (64, 64), (64, 48), (48, 64), (30, 20), (65, 200)]
    meta = replace(METADATA, task="rotated", patch_size=64, **{"scale": None, **room})
    found = in_node(
        tmp_path,
        "console.log(JSON.stringify(values[1].map(([width, height]) =>"
        " images.windows({ width, height }, values[0]))));",
        [page(meta), sizes],
    )
    side = patch_side(meta)
    for (width, height), ours in zip(sizes, found, strict=True):
        if max(width, height) == 64 and window_side((height, width), meta) is None:
            assert ours is None
        else:
            assert list(map(tuple, ours)) == windows(width, height, side, side // 4)


@needs_node
def test_large_pictures_are_shrunk(tmp_path):
    cut = replace(METADATA, cut_above=1024, window=128)
    cases = [
        (METADATA, (4000, 3000), [4000, 3000]),
        (METADATA, (6000, 1), [4096, 1]),
        (cut, (1024, 300), [1024, 300]),
        (cut, (3000, 4000), [768, 1024]),
        (replace(cut, patch_size=64), (3000, 4000), [3000, 4000]),
    ]
    found = in_node(
        tmp_path,
        "console.log(JSON.stringify(values.map(([meta, size]) => "
        "images.shownSize(...size, meta))));",
        [(page(meta), size) for meta, size, _ in cases],
    )
    assert found == [expected for *_, expected in cases]


def outputs_of(task: str) -> dict[str, np.ndarray]:
    """Outputs of a detector for one picture, with many overlaps."""
    random = np.random.default_rng(5)
    count = 60
    centers, sides = random.uniform(5, 70, (count, 2)), random.uniform(4, 40, (count, 2))
    found = dict(
        scores=random.uniform(0, 1, count).astype(np.float32),
        labels=random.integers(0, 3, count),
        image_index=np.zeros(count, np.int64),
    )
    if task == "rotated":
        angle = random.uniform(-0.7, 2.3, (count, 1))
        boxes = np.concatenate([centers, sides, angle], 1)
    else:
        boxes = np.concatenate([centers - sides / 2, centers + sides / 2], 1)
        found["masks"] = random.uniform(0, 1, (count, 14, 14)).astype(np.float32)
    return {"boxes": boxes.astype(np.float32), **found}


@needs_node
@pytest.mark.parametrize("kind", ["detection", "rotated", "maps"])
def test_objects_are_those_of_the_runtime(tmp_path, kind):
    task = "detection" if kind == "maps" else kind
    metadata = replace(METADATA, task=task)
    item = prepare(pixels(50, 70), metadata)
    outputs = outputs_of(task)
    if kind == "maps":
        # Of the whole input, at stride 8; some are empty.
        maps = np.random.default_rng(1).normal(0, 1, (len(outputs.pop("masks")), 12, 16))
        maps[::3, 4:] = maps[::4] = -9
        outputs["mask_logits"] = maps.astype(np.float32)
    (expected,) = tasks.load(metadata.export.decoder)([item], outputs, metadata)
    tensors = {
        name: dict(dims=value.shape, data=value.ravel().tolist()) for name, value in outputs.items()
    }
    found = in_node(
        tmp_path,
        """const tensor = ({ dims, data }) => ({ dims, data: Float32Array.from(data) });
        const outputs = Object.fromEntries(
          Object.entries(values.tensors).map(([name, value]) => [name, tensor(value)]));
        const { objects } = results.decode(outputs, values.item, values.meta);
        for (const object of objects) {
          if (object.mask) object.mask.pixels = Array.from(object.mask.pixels);
        }
        console.log(JSON.stringify(objects));""",
        dict(
            tensors=tensors,
            meta=page(metadata),
            item=dict(size=item.size, original=item.original, input=item.data.shape[1:]),
        ),
    )
    assert len(found) == len(expected.boxes) > 10
    np.testing.assert_allclose([one["box"] for one in found], expected.boxes, atol=1e-3)
    np.testing.assert_allclose([one["score"] for one in found], expected.scores, atol=1e-6)
    assert [one["label"] for one in found] == expected.labels.tolist()
    for one, theirs in zip(found, getattr(expected, "instance_masks", None) or (), strict=False):
        ours = np.zeros((50, 70), bool)
        mask = one["mask"]
        shape = (mask["height"], mask["width"])
        ours[mask["y"] :, mask["x"] :][: shape[0], : shape[1]] = np.reshape(mask["pixels"], shape)
        pasted = np.zeros_like(ours)
        theirs.paste(pasted)
        assert (ours != pasted).sum() <= 2


BROWSER = """
import { chromium } from "playwright-core";
const [url, picture, executablePath, camera, ...args] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", ...args] });
const page = await browser.newPage({ viewport: { width: 1100, height: 760 } });
const problems = [], hosts = new Set();
page.on("console", (m) => ["error", "warning"].includes(m.type()) && problems.push(m.text()));
page.on("pageerror", (error) => problems.push(error.message));
page.on("requestfailed", (request) => problems.push(`failed: ${request.url()}`));
page.on("request", (request) => hosts.add(new URL(request.url()).host));
await page.goto(url);
const done = () => window.mmeformer?.shown || document.body.dataset.state === "failed";
await page.waitForFunction(done, null, { timeout: 300000 });
const frames = [];
if (camera) {
  await page.click("#camera");
  while (frames.length < 3) {
    await page.evaluate(() => { window.before = window.mmeformer.shown; });
    const another = () => window.mmeformer.shown !== window.before;
    await page.waitForFunction(another, null, { timeout: 300000 });
    frames.push(await page.evaluate(() => window.mmeformer.shown.picture.width));
  }
  await page.click("#camera");
}
await page.screenshot({ path: picture });
const found = await page.evaluate(() => {
  const { shown, device } = window.mmeformer;
  const result = shown && { ...shown.result };
  if (result?.labels) result.labels = Array.from(result.labels);
  result?.objects?.forEach((object) => delete object.mask);
  return { result, device, isolated: crossOriginIsolated, state: document.body.dataset.state,
    status: document.getElementById("status").textContent,
    list: document.getElementById("list").innerText, filming: Boolean(window.mmeformer.camera),
    header: document.querySelector("header").innerText };
});
console.log(JSON.stringify({ ...found, frames, problems, hosts: [...hosts].filter(Boolean) }));
await browser.close();
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """``browser(site)``: opens a served site in a headless Chromium; what it shows, after three
    frames of the camera if there is one."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None or shutil.which("npm") is None:
        pytest.skip("Chromium or Node.js is not installed")
    folder = tmp_path_factory.mktemp("browser")
    done = subprocess.run(
        ["npm", "install", "--silent", "--prefix", folder, "playwright-core"], capture_output=True
    )
    if done.returncode:
        pytest.skip("npm cannot fetch playwright-core")
    (folder / "browser.mjs").write_text(BROWSER)

    def show(site: Path, *arguments: str, camera: bool = False) -> dict:
        with website.server(site) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            address = f"http://127.0.0.1:{server.server_port}/"
            command = ["node", "browser.mjs", address, site.parent / "shown.png", chromium]
            command += ["camera" if camera else "", *arguments]
            try:
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            finally:
                server.shutdown()
                thread.join()
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["hosts"] == [address[7:-1]]
        return found

    return show


def assert_same(found: dict, expected) -> None:
    """What a page found on a picture is the runtime's result."""
    result = found["result"]
    if result["kind"] == "regions":
        labels = np.reshape(result["labels"], expected.labels.shape)
        assert (labels != expected.labels).mean() < 1e-3
        return
    if result["kind"] == "classes":
        np.testing.assert_allclose(result["scores"], expected.scores, atol=1e-4)
        return
    boxes, scores = (np.array([one[key] for one in result["objects"]]) for key in ("box", "score"))
    labels = np.array([one["label"] for one in result["objects"]])
    if boxes.shape[1] == 4:
        ours = runtime.Detections(boxes, scores, labels, (64, 64))
    else:
        ours = runtime.RotatedDetections(boxes, scores, labels)
    assert len(match(expected, ours)) >= 0.99 * max(len(expected.boxes), len(boxes)) >= 5


@pytest.fixture(scope="module")
def site(onnx_file, browser, tmp_path_factory):
    """``site(task)``: a page of a small model with an example, and what the runtime finds there."""

    def make(task: str) -> tuple[Path, object]:
        model = onnx_file(task, size=None, preprocessing=task == "detection")
        image = random_image(64, 64, 3)  # no resizing, which browser and OpenCV round differently
        example = tmp_path_factory.mktemp(task) / "example.png"
        cv2.imwrite(str(example), image)
        built = website.build(model, example.parent / "site", example=example)
        return built, runtime.load(model).predict(image)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_a_browser_finds_what_the_runtime_finds(site, browser, task):
    folder, expected = site(task)
    found = browser(folder)
    # Headless, there is no GPU.
    assert set(found["problems"]) <= {"No available adapters."} and found["state"] == "ready"
    assert found["device"] == "wasm" and found["isolated"] and found["list"]
    assert "on the processor" in found["header"] and "no WebGPU" in found["header"]
    assert_same(found, expected)
    shown = cv2.imread(str(folder.parent / "shown.png"))
    assert shown.shape[:2] == (760, 1100) and len(np.unique(shown.reshape(-1, 3), axis=0)) > 50


@pytest.mark.slow
def test_a_browser_says_that_a_picture_was_shrunk(onnx_file, browser, tmp_path):
    model = onnx_file("segmentation", size=None, preprocessing=False)
    assert runtime.load(model).metadata.cut_above == 1024
    cv2.imwrite(str(tmp_path / "example.png"), random_image(96, 2048, 3))
    found = browser(website.build(model, tmp_path / "site", example=tmp_path / "example.png"))
    assert "1024 x 48 px (shrunk from 2048 x 96 px; mmeformer predict" in found["status"]
    assert [found["result"][side] for side in ("height", "width")] == [48, 1024]


@pytest.mark.slow
def test_a_browser_runs_the_model_on_its_gpu(site, browser):
    folder, expected = site("segmentation")
    # SwiftShader, which Chromium brings, computes what a GPU would.
    found = browser(folder, "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    assert found["problems"] == [] and found["state"] == "ready"
    assert found["device"] == "webgpu" and "on the GPU (WebGPU)" in found["header"]
    assert_same(found, expected)


@pytest.mark.slow
def test_a_browser_runs_the_model_on_its_camera(site, browser):
    folder, _ = site("segmentation")
    fake = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    found = browser(folder, *fake, camera=True)
    assert set(found["problems"]) <= {"No available adapters."} and found["state"] == "ready"
    # Chromium's camera is larger than the example.
    assert len(found["frames"]) == 3 and found["frames"][-1] > 64
    assert not found["filming"] and found["list"]


@pytest.fixture
def library(tmp_path) -> Path:
    """A stand-in for onnxruntime-web's package."""
    dist = tmp_path / "library/dist"
    dist.mkdir(parents=True)
    for name in website.LIBRARY:
        (dist / name).write_text(name)
    facts = dict(name=website.PACKAGE, version=website.VERSION, license="MIT", homepage="home")
    (dist.parent / "package.json").write_text(json.dumps(facts))
    return dist.parent


def test_a_site_is_complete_and_relative(onnx_file, library, picture, tmp_path, capsys):
    model = onnx_file("segmentation", size=(64, 96), batch=2, preprocessing=True)
    site = tmp_path / "site"
    arguments = [str(model), "--out", str(site), "--library", str(library)]
    assert main([*arguments, "--example", str(picture)]) == 0
    assert f"wrote {site}" in capsys.readouterr().out
    names = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    ours = {"index.html", "style.css", "app.js", "images.js", "results.js", "LICENSES.txt"}
    assert names == ours | {"model.onnx", "model.json", "example.png"} | {
        f"ort/{name}" for name in website.LIBRARY
    }
    meta = json.loads((site / "model.json").read_text())
    assert meta["stretches"] and meta["example"] == "example.png" and meta["size"] == [64, 96]
    assert "onnxruntime-web 1" in (site / "LICENSES.txt").read_text()
    text = "".join((site / name).read_text() for name in ours - {"LICENSES.txt"})
    for address in re.findall(r"""(?:src|href|import|fetch\(|from)[=\s(]*["'`]([^"'`]+)""", text):
        assert not address.startswith(("/", "http:", "https:")), address
    assert main(arguments) == 1
    assert "exists; use another name, or --force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0 and not (site / "example.png").exists()


def test_the_server_allows_threads(tmp_path):
    (tmp_path / "index.html").write_text("page")
    (tmp_path / "module.mjs").write_text("module")
    with website.server(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/module.mjs") as got:
                headers, body = got.headers, got.read()
        finally:
            server.shutdown()
            thread.join()
    assert body == b"module" and headers["Content-Type"] == "text/javascript"
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"


def test_what_cannot_be_built(onnx_file, library, tmp_path, monkeypatch, capsys):
    model = str(onnx_file("segmentation", size=(64, 96), batch=2, preprocessing=True))
    out = tmp_path / "site"
    (library / "dist" / website.LIBRARY[0]).unlink()
    assert main([model, "--out", str(out), "--library", str(library)]) == 1
    assert f"has no dist/{website.LIBRARY[0]}" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main([model, "--out", str(out)]) == 1
    assert "npm is not installed" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(SystemExit):
        main([model])
    assert "give --out FOLDER, --serve or both" in capsys.readouterr().err
