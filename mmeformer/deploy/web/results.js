// SPDX-License-Identifier: Apache-2.0
// Outputs of the network as results in pixels of the picture: the steps of
// mmeformer/runtime/decoders.py and mmeformer/rotated_boxes.py.

// Which results a file gives, by its outputs.
export function kindOf(outputNames) {
  const has = (name) => outputNames.includes(name);
  if (has("boxes")) return "objects";
  if (has("labels")) return "regions";
  if (has("scores")) return "classes";
  return "maps";
}

export function decode(outputs, prepared, meta) {
  const kind = kindOf(Object.keys(outputs));
  if (kind === "objects") return { kind, objects: objects(outputs, prepared, meta) };
  if (kind === "regions") return { kind, ...regions(outputs.labels, prepared.original) };
  if (kind === "classes") return { kind, scores: firstOf(outputs.scores) };
  return { kind, maps: Object.values(outputs).map(energy) };
}

// Numbers of the first picture of a batch (B, C).
const firstOf = ({ data, dims }) => Array.from(data.subarray(0, dims[1]));

// Labels of every pixel, resized to the picture if the graph did not do that.
function regions(labels, [height, width]) {
  const [, h, w] = labels.dims;
  let data = labels.data.subarray(0, h * w); // the first picture of a batch
  if (h !== height || w !== width) {
    data = new data.constructor(height * width);
    for (let y = 0; y < height; y++) {
      const row = Math.min(Math.floor((y * h) / height), h - 1) * w;
      for (let x = 0; x < width; x++) {
        data[y * width + x] = labels.data[row + Math.min(Math.floor((x * w) / width), w - 1)];
      }
    }
  }
  return { labels: data, height, width };
}

// Mean of the absolute values of a map (1, C, H, W) over its channels, from 0 to 1.
function energy(map) {
  const [, channels, height, width] = map.dims;
  const values = new Float32Array(height * width);
  for (let c = 0; c < channels; c++) {
    for (let i = 0; i < values.length; i++) {
      values[i] += Math.abs(map.data[c * values.length + i]) / channels;
    }
  }
  const high = values.reduce((a, b) => Math.max(a, b), 1e-12);
  return { height, width, values: values.map((value) => value / high) };
}

function objects(outputs, prepared, meta) {
  const numbers = outputs.boxes.dims[1];
  const scale = [0, 1].map((axis) => prepared.size[axis] / prepared.original[axis]);
  const found = [];
  for (let i = 0; i < outputs.boxes.dims[0]; i++) {
    const score = outputs.scores.data[i];
    const enough = meta.score_threshold === null || score > meta.score_threshold;
    if (Number(outputs.image_index.data[i]) !== 0 || !enough) continue;
    const box = Array.from(outputs.boxes.data.subarray(i * numbers, (i + 1) * numbers));
    const object = { score, label: Number(outputs.labels.data[i]) };
    object.box = numbers === 5 ? rescaled(box, scale) : box.map((v, k) => v / scale[1 - (k % 2)]);
    if (outputs.masks) object.mask = maskOf(outputs.masks, i, object.box, prepared, meta);
    if (outputs.mask_logits) object.mask = maskOfMap(outputs.mask_logits, i, prepared, meta);
    found.push(object);
  }
  if (numbers !== 5) return found;
  return suppressed(found, meta.iou_threshold).slice(0, meta.max_per_image ?? Infinity);
}

function rescaled([x, y, w, h, angle], [height, width]) {
  const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
  return [
    x / width,
    y / height,
    w * Math.hypot(cos / width, sin / height),
    h * Math.hypot(sin / width, cos / height),
    Math.atan2(sin / width, cos / height),
  ];
}

// Pixels of one object: {x, y, width, height, pixels}, of the rectangle around its box.
function maskOf(masks, index, box, prepared, meta) {
  const side = masks.dims[2];
  const grid = masks.data.subarray(index * side * side, (index + 1) * side * side);
  const [left, top, right, bottom] = box;
  const [rows, columns] = prepared.original;
  const y0 = Math.max(Math.floor(top) - 1, 0);
  const y1 = Math.min(Math.ceil(bottom) + 1, rows);
  const x0 = Math.max(Math.floor(left) - 1, 0);
  const x1 = Math.min(Math.ceil(right) + 1, columns);
  const width = Math.max(x1 - x0, 0);
  const height = Math.max(y1 - y0, 0);
  const pixels = new Uint8Array(width * height);
  if (right <= left || bottom <= top) return { x: x0, y: y0, width, height, pixels };
  const weights = (first, count, start, stop) =>
    Array.from({ length: count }, (_, i) => {
      const position = ((first + i + 0.5 - start) / (stop - start)) * side - 0.5;
      const low = Math.floor(position);
      return [low, low + 1 - position, position - low];
    });
  const across = weights(x0, width, left, right);
  const down = weights(y0, height, top, bottom);
  const at = (y, x) => (y < 0 || x < 0 || y >= side || x >= side ? 0 : grid[y * side + x]);
  for (let y = 0; y < height; y++) {
    const [r, near, far] = down[y];
    for (let x = 0; x < width; x++) {
      const [c, close, distant] = across[x];
      const upper = close * at(r, c) + distant * at(r, c + 1);
      const lower = close * at(r + 1, c) + distant * at(r + 1, c + 1);
      pixels[y * width + x] = near * upper + far * lower >= meta.mask_threshold ? 1 : 0;
    }
  }
  return { x: x0, y: y0, width, height, pixels };
}

// The same from logits on a map of the whole input, as mmeformer/runtime/masks.py.
function maskOfMap({ dims, data }, index, prepared, meta) {
  const [rows, columns] = dims.slice(1);
  const map = data.subarray(index * rows * columns, (index + 1) * rows * columns);
  const limit = Math.log(meta.mask_threshold / (1 - meta.mask_threshold));
  const empty = { x: 0, y: 0, width: 0, height: 0, pixels: new Uint8Array(0) };
  const [down, across] = [0, 1].map((axis) => taps(dims[1 + axis], axis, prepared));
  // Only near cells above the limit can pixels be.
  const used = [new Set(), new Set()];
  map.forEach((value, i) => {
    if (value <= limit) return;
    used[0].add(Math.floor(i / columns));
    used[1].add(i % columns);
  });
  const [y0, y1, x0, x1] = [down, across].flatMap((axis, i) => {
    const near = axis.map((cells) => cells.some(([cell]) => used[i].has(cell)));
    return [near.indexOf(true), near.lastIndexOf(true) + 1];
  });
  if (y0 < 0 || x0 < 0) return empty;
  const [height, width] = [y1 - y0, x1 - x0];
  const wide = new Float32Array(rows * width);
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < width; x++) {
      for (const [cell, weight] of across[x0 + x]) {
        wide[y * width + x] += weight * map[y * columns + cell];
      }
    }
  }
  const pixels = new Uint8Array(width * height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      let value = 0;
      for (const [cell, weight] of down[y0 + y]) value += weight * wide[cell * width + x];
      pixels[y * width + x] = value > limit ? 1 : 0;
    }
  }
  return { x: x0, y: y0, width, height, pixels };
}

// For every pixel of the picture along an axis, cells of a map and their weights: the map is resized
// to the input, that to the picture.
function taps(cells, axis, { input, size, original }) {
  const linear = (count, places) =>
    Array.from({ length: count }, (_, i) => {
      const position = ((i + 0.5) * places) / count - 0.5;
      const clipped = Math.min(Math.max(position, 0), places - 1);
      const low = Math.min(Math.floor(clipped), places - 1);
      return [[low, low + 1 - clipped], [Math.min(low + 1, places - 1), clipped - low]];
    });
  const fine = linear(input[axis], cells);
  const scale = size[axis] / original[axis];
  return linear(Math.ceil(input[axis] * (1 / scale)), input[axis])
    .slice(0, original[axis])
    .map((pair) => pair.flatMap(([i, share]) => fine[i].map(([cell, w]) => [cell, share * w])));
}

// Corners of a rotated box, in turn around it.
export function corners([x, y, w, h, angle]) {
  const [cos, sin] = [Math.cos(angle) / 2, Math.sin(angle) / 2];
  return [
    [1, 1],
    [1, -1],
    [-1, -1],
    [-1, 1],
  ].map(([a, b]) => [x + a * w * cos - b * h * sin, y + a * w * sin + b * h * cos]);
}

function area(polygon) {
  let sum = 0;
  polygon.forEach(([x, y], i) => {
    const [u, v] = polygon[(i + 1) % polygon.length];
    sum += x * v - u * y;
  });
  return Math.abs(sum) / 2;
}

// IoU of two rotated boxes: the first is cut by the four sides of the second.
export function rotatedIou(first, second) {
  const [cx, cy, w, h, angle] = second;
  const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
  let polygon = corners(first).map(([x, y]) => [
    (x - cx) * cos + (y - cy) * sin,
    (y - cy) * cos - (x - cx) * sin,
  ]);
  for (const [axis, sign, limit] of [
    [0, 1, w / 2],
    [0, -1, w / 2],
    [1, 1, h / 2],
    [1, -1, h / 2],
  ]) {
    const inside = (point) => limit - sign * point[axis];
    const cut = [];
    polygon.forEach((point, i) => {
      const next = polygon[(i + 1) % polygon.length];
      const [a, b] = [inside(point), inside(next)];
      if (a >= 0) cut.push(point);
      if (a * b < 0) {
        const share = a / (a - b);
        cut.push(point.map((value, k) => value + share * (next[k] - value)));
      }
    });
    polygon = cut;
  }
  const shared = polygon.length > 2 ? area(polygon) : 0;
  const union = first[2] * first[3] + w * h - shared;
  return union > 1e-12 ? shared / union : 0;
}

// Non-maximum suppression of rotated objects within each class, the best first.
export function suppressed(found, threshold) {
  const kept = [];
  for (const object of [...found].sort((a, b) => b.score - a.score)) {
    const radius = (box) => Math.hypot(box[2], box[3]) / 2;
    const hidden = kept.some((other) => {
      if (other.label !== object.label) return false;
      const [a, b] = [object.box, other.box];
      if (Math.hypot(a[0] - b[0], a[1] - b[1]) > radius(a) + radius(b)) return false;
      return rotatedIou(a, b) > threshold;
    });
    if (!hidden) kept.push(object);
  }
  return kept;
}

// Objects of all windows of a picture.
export function merged(places, results, meta) {
  const moved = results.flatMap((result, i) =>
    result.objects.map((object) => {
      const box = [...object.box];
      box[0] += places[i][0];
      box[1] += places[i][1];
      return { ...object, box };
    }),
  );
  return { kind: "objects", objects: suppressed(moved, meta.iou_threshold) };
}
