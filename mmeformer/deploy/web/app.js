// SPDX-License-Identifier: Apache-2.0
// The page: load the model, run it on pictures and the camera, draw what it finds.

import { crop, fromCanvas, patchSize, prepare, shownSize, windows } from "./images.js";
import { corners, decode, kindOf, merged } from "./results.js";

const SMALLEST_SIDE = 640;
const MOST_LOGITS = 2 ** 26;
const BEST_CLASSES = 5;

const element = (id) => document.getElementById(id);
const canvas = element("picture");
const context = canvas.getContext("2d", { willReadFrequently: true });
const state = { meta: null, session: null, ort: null, device: "", shown: null, camera: null };

function say(text, failed = false) {
  element("status").textContent = text;
  if (failed) document.body.dataset.state = "failed";
}

function color(label) {
  const known = state.meta.palette?.[label];
  if (known) return known;
  // Hues a golden angle apart differ for neighbors.
  const hue = ((label * 137.5) % 360) / 60;
  const rise = 1 - Math.abs((hue % 2) - 1);
  const [r, g, b] = [[1, rise, 0], [rise, 1, 0], [0, 1, rise], [0, rise, 1], [rise, 0, 1], [1, 0, rise]][
    Math.trunc(hue)
  ];
  return [r, g, b].map((share) => Math.round(50 + 190 * share));
}

const css = (label) => `rgb(${color(label).join(" ")})`;
const nameOf = (label) => state.meta.classes[label] ?? `class ${label}`;

// --- the model -----------------------------------------------------------------------------------

async function hasWebGpu() {
  try {
    return Boolean(await navigator.gpu?.requestAdapter());
  } catch {
    return false;
  }
}

// `reason`: why it does not run on the GPU, if that is known already.
async function start(wanted, reason = "") {
  document.body.dataset.state = "loading";
  say("Loading the model ...");
  element("runs").textContent = "";
  const devices = wanted === "auto" ? ["webgpu", "wasm"] : [wanted];
  for (const device of devices) {
    if (device === "webgpu" && !(await hasWebGpu())) {
      reason = "this browser has no WebGPU";
      continue;
    }
    try {
      await state.session?.release();
      state.session = null;
      const bundle = device === "webgpu" ? "ort.webgpu.min.mjs" : "ort.wasm.min.mjs";
      const ort = await import(`./ort/${bundle}`);
      ort.env.wasm.wasmPaths = new URL("./ort/", location.href).href;
      // Threads need the headers COOP and COEP, which not every host sends.
      const cores = Math.min(navigator.hardwareConcurrency ?? 1, 4);
      ort.env.wasm.numThreads = crossOriginIsolated ? cores : 1;
      const model = await fetch("./model.onnx");
      if (!model.ok) throw new Error(`model.onnx: ${model.status} ${model.statusText}`);
      state.session = await ort.InferenceSession.create(await model.arrayBuffer(), {
        executionProviders: device === "webgpu" ? ["webgpu", "wasm"] : ["wasm"],
        logSeverityLevel: 3, // errors: that some nodes run on the processor is as it should be
      });
      Object.assign(state, { ort, device });
      const { numThreads } = ort.env.wasm;
      const facts = [`${numThreads} thread${numThreads > 1 ? "s" : ""}`, reason].filter(Boolean);
      element("runs").textContent =
        device === "webgpu" ? ", on the GPU (WebGPU)" : `, on the processor (${facts.join("; ")})`;
      document.body.dataset.state = "ready";
      say("Ready.");
      return;
    } catch (error) {
      reason = error.message;
    }
  }
  throw new Error(reason || "the model did not start");
}

// [height, width] of the labels: the picture's, or less if memory requires it.
function outputSize([height, width]) {
  const logits = height * width * Math.max(state.meta.classes.length, 1);
  const shrink = Math.min(Math.sqrt(MOST_LOGITS / logits), 1);
  return [height, width].map((side) => Math.max(Math.trunc(side * shrink), 1));
}

async function runOnce(picture) {
  const { meta, ort, session } = state;
  const item = prepare(picture, meta);
  const batch = meta.batch ?? 1;
  const whole = new item.numbers.constructor(item.numbers.length * batch);
  for (let i = 0; i < batch; i++) whole.set(item.numbers, i * item.numbers.length);
  const [H, W] = item.input;
  const feeds = {
    image: meta.preprocessing_in_graph
      ? new ort.Tensor("uint8", whole, [batch, H, W, 3])
      : new ort.Tensor("float32", whole, [batch, 3, H, W]),
  };
  if (session.inputNames.includes("image_size")) {
    const sizes = Float32Array.from({ length: 2 * batch }, (_, i) => item.size[i % 2]);
    feeds.image_size = new ort.Tensor("float32", sizes, [batch, 2]);
  }
  if (session.inputNames.includes("output_size")) {
    const size = BigInt64Array.from(outputSize(item.original), BigInt);
    feeds.output_size = new ort.Tensor("int64", size, [2]);
  }
  const outputs = await session.run(feeds);
  const kept = {};
  for (const name of session.outputNames) {
    const { dims } = outputs[name];
    kept[name] = { dims, data: await outputs[name].getData() };
    outputs[name].dispose();
  }
  return decode(kept, item, meta);
}

async function infer(picture) {
  const places = windows(picture, state.meta);
  if (!places) return runOnce(picture);
  const size = patchSize(state.meta);
  const results = [];
  for (const place of places) results.push(await runOnce(crop(picture, place, size)));
  return merged(places, results, state.meta);
}

// With "the fastest that works", a GPU that fails at work gives way to the processor.
async function inferAnywhere(picture) {
  try {
    return await infer(picture);
  } catch (error) {
    if (state.device !== "webgpu" || element("device").value !== "auto") {
      const size = `${picture.width} x ${picture.height} px`;
      throw new Error(`The model failed on ${size}; a smaller picture may work. ${error.message}`);
    }
    await start("wasm", `the GPU failed: ${error.message}`);
    return infer(picture);
  }
}

// --- drawing -------------------------------------------------------------------------------------

function draw() {
  const { picture, result } = state.shown;
  const image = context.createImageData(picture.width, picture.height);
  for (let i = 0, j = 0; i < picture.data.length; i += 3, j += 4) {
    image.data[j] = picture.data[i];
    image.data[j + 1] = picture.data[i + 1];
    image.data[j + 2] = picture.data[i + 2];
    image.data[j + 3] = 255;
  }
  const blend = Number(element("blend").value);
  const tint = (index, rgb, share) => {
    for (let c = 0; c < 3; c++) {
      image.data[4 * index + c] += share * (rgb[c] - image.data[4 * index + c]);
    }
  };
  const rows = { objects: drawObjects, regions: drawRegions, classes: drawClasses, maps: drawMaps }[
    result.kind
  ](result, image, tint, blend);
  element("list").replaceChildren(
    ...rows.map(([swatch, name, value]) => {
      const row = document.createElement("li");
      const square = document.createElement("span");
      square.className = "swatch";
      square.style.background = swatch;
      const texts = [name, value].map((text) => {
        const span = document.createElement("span");
        span.textContent = text;
        return span;
      });
      row.append(square, ...texts);
      return row;
    }),
  );
  element("save").disabled = false;
  element("hint").hidden = true;
}

// Put pixels on the canvas; small pictures are enlarged, so that texts on them stay legible.
function paint(image) {
  const surface = new OffscreenCanvas(image.width, image.height);
  surface.getContext("2d").putImageData(image, 0, 0);
  const factor = Math.max(1, Math.floor(SMALLEST_SIDE / Math.max(image.width, image.height)));
  canvas.width = image.width * factor;
  canvas.height = image.height * factor;
  context.imageSmoothingEnabled = false;
  context.scale(factor, factor);
  context.drawImage(surface, 0, 0);
}

function drawObjects({ objects }, image, tint, blend) {
  const threshold = Number(element("score").value);
  const shown = objects.filter((object) => object.score >= threshold);
  // The best object is drawn last, on top.
  for (const { label, mask } of [...shown].reverse()) {
    if (!mask) continue;
    const rgb = color(label);
    for (let y = 0; y < mask.height; y++) {
      for (let x = 0; x < mask.width; x++) {
        if (mask.pixels[y * mask.width + x]) {
          tint((mask.y + y) * image.width + mask.x + x, rgb, blend);
        }
      }
    }
  }
  paint(image);
  // Lines keep their width on the screen, whatever the size of the picture.
  const unit = image.width / Math.max(canvas.clientWidth, 1);
  context.lineWidth = 2 * unit;
  context.font = `600 ${13 * unit}px system-ui, sans-serif`;
  context.textBaseline = "bottom";
  for (const { label, score, box } of [...shown].reverse()) {
    const [left, top, right, bottom] = box;
    const outline =
      box.length === 5
        ? corners(box)
        : [[left, top], [right, top], [right, bottom], [left, bottom]];
    context.strokeStyle = css(label);
    context.beginPath();
    outline.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.closePath();
    context.stroke();
    const text = `${nameOf(label)} ${score.toFixed(2)}`;
    const [x, y] = outline.reduce((a, b) => (b[1] < a[1] ? b : a));
    const width = context.measureText(text).width + 6 * unit;
    const start = Math.min(Math.max(x, 0), Math.max(image.width - width, 0));
    const foot = Math.max(y, 18 * unit);
    context.fillStyle = css(label);
    context.fillRect(start, foot - 18 * unit, width, 18 * unit);
    const [r, g, b] = color(label);
    context.fillStyle = 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#000" : "#fff";
    context.fillText(text, start + 3 * unit, foot - unit);
  }
  say(`${shown.length} of ${objects.length} objects. ${timing()}`);
  return shown.map(({ label, score }) => [css(label), nameOf(label), score.toFixed(2)]);
}

function drawRegions({ labels, height, width }, image, tint, blend) {
  const counts = new Map();
  for (let y = 0, i = 0; y < image.height; y++) {
    const row = Math.min(Math.floor((y * height) / image.height), height - 1) * width;
    for (let x = 0; x < image.width; x++, i++) {
      const label = Number(labels[row + Math.min(Math.floor((x * width) / image.width), width - 1)]);
      counts.set(label, (counts.get(label) ?? 0) + 1);
      tint(i, color(label), blend);
    }
  }
  paint(image);
  say(`${counts.size} classes. ${timing()}`);
  const total = image.width * image.height;
  return [...counts]
    .sort((a, b) => b[1] - a[1])
    .map(([label, count]) => [css(label), nameOf(label), `${((100 * count) / total).toFixed(1)} %`]);
}

function drawClasses({ scores }, image) {
  paint(image);
  const best = scores.map((score, label) => [score, label]).sort((a, b) => b[0] - a[0]);
  say(timing());
  return best
    .slice(0, BEST_CLASSES)
    .map(([score, label]) => [css(label), nameOf(label), `${(100 * score).toFixed(1)} %`]);
}

function drawMaps({ maps }, image, tint, blend) {
  const { height, width, values } = maps.at(-1);
  for (let y = 0, i = 0; y < image.height; y++) {
    for (let x = 0; x < image.width; x++, i++) {
      const row = Math.floor((y * height) / image.height);
      const value = values[row * width + Math.floor((x * width) / image.width)];
      tint(i, [255 * value, 60, 255 * (1 - value)], blend);
    }
  }
  paint(image);
  say(`Strength of the coarsest of ${maps.length} maps. ${timing()}`);
  return maps.map((map, i) => ["transparent", `level ${i}`, `${map.width} x ${map.height}`]);
}

function timing() {
  const { milliseconds, original, picture } = state.shown;
  const device = state.device === "webgpu" ? "GPU" : "processor";
  const size = `${picture.width} x ${picture.height} px`;
  const before = `${original[0]} x ${original[1]} px`;
  const note = size === before ? "" : ` (shrunk from ${before}; mmeformer predict takes all pixels)`;
  return `${size}${note}, ${milliseconds.toFixed(0)} ms on the ${device}.`;
}

// --- pictures ------------------------------------------------------------------------------------

async function show(source) {
  const width = source.videoWidth ?? source.width;
  const height = source.videoHeight ?? source.height;
  const surface = new OffscreenCanvas(...shownSize(width, height, state.meta));
  const drawing = surface.getContext("2d", { willReadFrequently: true });
  drawing.fillStyle = "#fff"; // behind what is transparent
  drawing.fillRect(0, 0, surface.width, surface.height);
  drawing.drawImage(source, 0, 0, surface.width, surface.height);
  const picture = fromCanvas(drawing.getImageData(0, 0, surface.width, surface.height));
  const begin = performance.now();
  const result = await inferAnywhere(picture);
  const original = [width, height];
  state.shown = { picture, original, result, milliseconds: performance.now() - begin };
  draw();
}

async function open(blob) {
  if (!blob || document.body.dataset.state !== "ready") return;
  stopCamera();
  document.body.dataset.state = "busy";
  say("Working ...");
  try {
    let bitmap;
    try {
      bitmap = await createImageBitmap(blob);
    } catch {
      throw new Error("This file is not a picture that the browser can read.");
    }
    await show(bitmap);
    document.body.dataset.state = "ready";
  } catch (error) {
    document.body.dataset.state = "ready";
    element("list").replaceChildren();
    say(error.message);
  }
}

function stopCamera() {
  state.camera?.getTracks().forEach((track) => track.stop());
  state.camera = null;
  element("camera").setAttribute("aria-pressed", "false");
}

async function toggleCamera() {
  if (state.camera) return stopCamera();
  if (document.body.dataset.state !== "ready") return undefined;
  const video = element("video");
  try {
    state.camera = await navigator.mediaDevices.getUserMedia({
      video: { facingMode: "environment" },
    });
    video.srcObject = state.camera;
    await video.play();
  } catch (error) {
    stopCamera();
    return say(`The camera did not start: ${error.message}`);
  }
  element("camera").setAttribute("aria-pressed", "true");
  try {
    while (state.camera) {
      await show(video);
      await new Promise(requestAnimationFrame);
    }
  } catch (error) {
    stopCamera();
    say(error.message);
  }
  return undefined;
}

// --- the page ------------------------------------------------------------------------------------

function listen() {
  const drop = element("drop");
  element("file").onchange = (event) => {
    open(event.target.files[0]);
    event.target.value = ""; // the same file can be chosen again
  };
  element("camera").onclick = toggleCamera;
  element("camera").hidden = !navigator.mediaDevices?.getUserMedia;
  drop.ondragover = (event) => {
    event.preventDefault();
    drop.classList.add("over");
  };
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    open(event.dataTransfer.files[0]);
  };
  document.onpaste = (event) => open(event.clipboardData.files[0]);
  element("score").oninput = () => {
    element("score-value").value = Number(element("score").value).toFixed(2);
    if (state.shown) draw();
  };
  element("blend").oninput = () => state.shown && draw();
  element("device").onchange = (event) => {
    stopCamera();
    start(event.target.value).catch((error) => say(error.message, true));
  };
  element("save").onclick = () => {
    canvas.toBlob((blob) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = "result.png";
      link.click();
      URL.revokeObjectURL(link.href);
    });
  };
}

async function main() {
  const answer = await fetch("./model.json");
  if (!answer.ok) throw new Error(`model.json: ${answer.status} ${answer.statusText}`);
  const meta = await answer.json();
  state.meta = meta;
  element("title").textContent = meta.config;
  document.title = meta.config;
  const size = meta.size ? `${meta.size[1]} x ${meta.size[0]} px` : "pictures of any size";
  element("about").textContent =
    `${meta.task}, ${size}, exported by mmeformer ${meta.version}; runs in ONNX Runtime Web.`;
  listen();
  await start("auto");
  const kind = kindOf(state.session.outputNames);
  element("score-row").hidden = kind !== "objects";
  const masks = state.session.outputNames.some((name) => name.startsWith("mask"));
  const boxesAlone = kind === "objects" && !masks;
  element("blend-row").hidden = kind === "classes" || boxesAlone;
  const threshold = Math.max(0.3, meta.score_threshold ?? 0);
  element("score").min = meta.score_threshold ?? 0;
  element("score").value = threshold;
  element("score-value").value = threshold.toFixed(2);
  if (meta.example) {
    element("example").hidden = false;
    const example = async () => open(await (await fetch(meta.example)).blob());
    element("example").onclick = example;
    await example();
  }
}

// For tests: the latest result as numbers.
window.mmeformer = state;
main().catch((error) => say(error.message, true));
