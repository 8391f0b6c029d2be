// SPDX-License-Identifier: Apache-2.0
// Prepare pictures for the network: the steps of mmeformer/runtime/images.py.

const BLANK = [124, 116, 104]; // red, green, blue: becomes 0 after normalization

const roundUp = (side, step) => Math.ceil(side / step) * step;
// As Python rounds: halves to the even number.
const halfToEven = (value) => {
  const low = Math.floor(value);
  return value - low === 0.5 ? low + (low % 2) : Math.round(value);
};
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// A picture is {data, width, height}, three bytes (red, green, blue) per pixel, row by row.
export function fromCanvas(imageData) {
  const { data, width, height } = imageData;
  const out = new Uint8Array(width * height * 3);
  for (let i = 0, j = 0; i < data.length; i += 4) {
    out[j++] = data[i];
    out[j++] = data[i + 1];
    out[j++] = data[i + 2];
  }
  return { data: out, width, height };
}

const LARGEST_SIDE = 4096; // of a picture; larger ones would not fit into a canvas everywhere

// [width, height] that a picture is shown in. Prediction in Python cuts pictures beyond
// `cut_above`, and merges what it finds; here they are shrunk.
export function shownSize(width, height, meta) {
  const limit = Math.min(LARGEST_SIDE, (!meta.patch_size && meta.cut_above) || LARGEST_SIDE);
  const shrink = Math.min(limit / Math.max(width, height), 1);
  return [width, height].map((side) => Math.max(Math.round(side * shrink), 1));
}

// The window [x0, y0, x1, y1); padded to a square of `size` pixels if that is given.
export function crop(picture, [x0, y0, x1, y1], size = null) {
  const width = size ?? x1 - x0;
  const height = size ?? y1 - y0;
  const out = new Uint8Array(width * height * 3);
  for (let i = 0; i < out.length; i++) out[i] = BLANK[i % 3];
  for (let y = y0; y < y1; y++) {
    const start = (y * picture.width + x0) * 3;
    out.set(picture.data.subarray(start, start + (x1 - x0) * 3), (y - y0) * width * 3);
  }
  return { data: out, width, height };
}

// Places and weights of each output pixel along one side.
function bilinear(full, length) {
  const scale = full / length;
  return Array.from({ length }, (_, i) => {
    const position = clamp((i + 0.5) * scale - 0.5, 0, full - 1);
    const first = Math.min(Math.floor(position), Math.max(full - 2, 0));
    const share = position - first;
    return { first, weights: full > 1 ? [1 - share, share] : [1] };
  });
}

// Pillow's bicubic filter, which grows with the step between pixels.
function bicubic(full, length) {
  const scale = full / length;
  const stretch = Math.max(scale, 1);
  return Array.from({ length }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(center - 2 * stretch + 0.5), 0);
    const last = Math.min(Math.trunc(center + 2 * stretch + 0.5), full);
    const weights = [];
    for (let place = first; place < last; place++) {
      const d = Math.abs((place - center + 0.5) / stretch);
      weights.push(
        d < 1 ? (1.5 * d - 2.5) * d * d + 1 : d < 2 ? (((d - 5) * d + 8) * d - 4) * -0.5 : 0,
      );
    }
    const sum = weights.reduce((a, b) => a + b, 0);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
}

// Resize by a filter; `between`: whether rows are rounded before columns, as Pillow does.
function resample(picture, width, height, filter, between) {
  if (picture.width === width && picture.height === height) return picture;
  const { data } = picture;
  const columns = filter(picture.width, width);
  const rows = filter(picture.height, height);
  const wide = between
    ? new Uint8ClampedArray(picture.height * width * 3)
    : new Float32Array(picture.height * width * 3);
  for (let y = 0, j = 0; y < picture.height; y++) {
    for (let x = 0; x < width; x++) {
      const { first, weights } = columns[x];
      const start = (y * picture.width + first) * 3;
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let k = 0; k < weights.length; k++) sum += weights[k] * data[start + 3 * k + c];
        wide[j++] = sum;
      }
    }
  }
  const out = new Uint8ClampedArray(height * width * 3);
  const line = width * 3;
  for (let y = 0, j = 0; y < height; y++) {
    const { first, weights } = rows[y];
    for (let x = 0; x < line; x++) {
      let sum = 0;
      for (let k = 0; k < weights.length; k++) sum += weights[k] * wide[(first + k) * line + x];
      out[j++] = sum;
    }
  }
  return { data: out, width, height };
}

export function resize(picture, width, height) {
  return resample(picture, width, height, bilinear, false);
}

// [height, width] that the network sees of a picture, without padding.
function networkSize(picture, meta) {
  const { width, height } = picture;
  if (meta.size && meta.stretches) return meta.size;
  let factor = 1;
  if (meta.scale && meta.keep_ratio) {
    factor = Math.min(
      Math.max(...meta.scale) / Math.max(height, width),
      Math.min(...meta.scale) / Math.min(height, width),
    );
  } else if (meta.scale) {
    return meta.size ?? [meta.scale[1], meta.scale[0]];
  }
  if (meta.size) factor = Math.min(factor, meta.size[0] / height, meta.size[1] / width);
  const sides = [height, width].map((side) => Math.max(Math.trunc(side * factor + 0.5), 1));
  return meta.size ? sides.map((side, i) => Math.min(side, meta.size[i])) : sides;
}

function center(picture, meta) {
  const { width, height } = picture;
  const side = meta.shorter_side;
  const [h, w] =
    width < height
      ? [Math.trunc((side * height) / width), side]
      : [side, Math.trunc((side * width) / height)];
  const resized = resample(picture, w, h, bicubic, true);
  const [rows, columns] = meta.crop;
  const top = halfToEven((h - rows) / 2);
  const left = halfToEven((w - columns) / 2);
  return crop(resized, [left, top, left + columns, top + rows]);
}

// A picture as input of the network: numbers of one batch, [height, width] of the whole input and
// of the part that the picture covers, and the picture's own size.
export function prepare(picture, meta) {
  const original = [picture.height, picture.width];
  if (meta.crop) {
    picture = center(picture, meta);
  } else {
    const [h, w] = networkSize(picture, meta);
    picture = resize(picture, w, h);
  }
  if (meta.multiple > 1) {
    const [w, h] = [picture.width, picture.height].map((side) => roundUp(side, meta.multiple));
    picture = resize(picture, w, h);
  }
  const { data, width, height } = picture;
  const [H, W] = meta.size ?? [height, width].map((side) => roundUp(side, meta.pad_divisor));
  const channels = meta.preprocessing_in_graph || !meta.bgr_to_rgb ? [2, 1, 0] : [0, 1, 2];
  let numbers;
  if (meta.preprocessing_in_graph) {
    numbers = new Uint8Array(H * W * 3);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        for (let c = 0; c < 3; c++) {
          numbers[(y * W + x) * 3 + c] = data[(y * width + x) * 3 + channels[c]];
        }
      }
    }
  } else {
    numbers = new Float32Array(3 * H * W);
    for (let c = 0; c < 3; c++) {
      for (let y = 0; y < height; y++) {
        for (let x = 0; x < width; x++) {
          const value = data[(y * width + x) * 3 + channels[c]];
          numbers[(c * H + y) * W + x] = (value - meta.mean[c]) / meta.std[c];
        }
      }
    }
  }
  return { numbers, input: [H, W], size: [height, width], original };
}

function starts(length, size, overlap) {
  const last = Math.max(length - size, 0);
  const out = [];
  for (let start = 0; start < last; start += size - overlap) out.push(start);
  return [...out, last];
}

// Side of the windows that a picture is cut into or padded to; 0: neither.
export function patchSize(meta) {
  const side = meta.patch_size ?? 0;
  if (!meta.size || !meta.scale) return side;
  return Math.trunc(Math.min(1, Math.min(...meta.size) / Math.min(...meta.scale)) * side);
}

// Windows of a picture for a model of patches, else null: the picture as it is.
export function windows(picture, meta) {
  const size = patchSize(meta);
  const { width, height } = picture;
  // One that is as long as a patch is taken as it is, where a file of one size has room for it.
  const factor = Math.min(...(meta.scale ?? [0])) / meta.patch_size;
  const fits =
    !meta.size || !meta.scale ||
    (Math.round(height * factor) <= meta.size[0] && Math.round(width * factor) <= meta.size[1]);
  if (!size || (Math.max(width, height) === meta.patch_size && fits)) return null;
  const overlap = Math.trunc(size / 4);
  return starts(height, size, overlap).flatMap((y) =>
    starts(width, size, overlap).map((x) => [
      x,
      y,
      Math.min(x + size, width),
      Math.min(y + size, height),
    ]),
  );
}
