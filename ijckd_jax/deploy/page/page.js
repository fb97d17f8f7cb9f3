// Runs the classifiers beside this file on pictures that are dropped here.

import * as ort from './onnxruntime/ort.wasm.bundle.min.mjs';
import {prepare} from './pixels.js';

const TOP = 3;
const MAX_SIDE = 4096; // Of a picture, before it is made smaller.
const element = (id) => document.getElementById(id);

const WASM = 'onnxruntime/ort-wasm-simd-threaded.wasm';
ort.env.wasm.wasmPaths = {wasm: new URL(WASM, import.meta.url).href};
ort.env.wasm.numThreads = 1; // More need headers that not every server sends.

const about = await (await fetch('models.json')).json();
const sessions = {};
try {
  for (const model of about.models) {
    const data = await (await fetch(model.file)).arrayBuffer();
    sessions[model.file] = await ort.InferenceSession.create(data);
    // Once for nothing: the first takes longest, and would be what is shown.
    await classify(model, new Uint8Array(model.image_shape.reduce((a, b) => a * b)));
  }
  element('about').textContent =
    about.models.map((m) => `${m.role}: ${m.description}`).join('; ');
  element('state').textContent = '';
  document.body.dataset.ready = 'yes';
} catch (error) {
  element('state').textContent = '';
  element('problem').textContent = `The classifier cannot be loaded: ${error}`;
}

// Returns the levels of a picture file, upright and over white.
async function read(file, model) {
  const bitmap = await createImageBitmap(file);
  const shrink = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * shrink));
  const height = Math.max(1, Math.round(bitmap.height * shrink));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.fillStyle = 'white';
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  const {data} = context.getImageData(0, 0, width, height);
  return prepare(data, width, height, model.image_shape, model.crop);
}

// Returns the classes of some levels, likeliest first, and the milliseconds.
async function classify(model, levels) {
  const isFloat = model.takes === 'float32';
  const data = isFloat ? Float32Array.from(levels, (x) => x / 255)
                       : Uint8Array.from(levels);
  const images = new ort.Tensor(model.takes, data, [1, ...model.image_shape]);
  const start = performance.now();
  const {probabilities} = await sessions[model.file].run({images});
  const milliseconds = performance.now() - start;
  const classes = Array.from(probabilities.data, (probability, index) => ({
    index, probability, name: model.class_names[index],
  }));
  classes.sort((a, b) => b.probability - a.probability || a.index - b.index);
  return {classes, milliseconds};
}

function draw(levels, [height, width, channels]) {
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [width, height];
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) {
      image.data[4 * i + c] = levels[i * channels + (channels === 1 ? 0 : c)];
    }
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext('2d').putImageData(image, 0, 0);
  return canvas;
}

function bar({name, probability, index}) {
  const row = document.createElement('div');
  row.className = 'bar';
  row.dataset.class = index;
  row.dataset.probability = probability;
  const fill = row.appendChild(document.createElement('i'));
  fill.style.width = `${100 * probability}%`;
  const text = row.appendChild(document.createElement('span'));
  text.append(name);
  text.appendChild(document.createElement('b')).textContent =
    `${(100 * probability).toFixed(1)}%`;
  return row;
}

async function show(file) {
  const row = document.createElement('section');
  row.className = 'picture';
  row.dataset.name = file.name;
  for (const model of about.models) {
    const levels = await read(file, model);
    if (!row.childElementCount) row.append(draw(levels, model.image_shape));
    const {classes, milliseconds} = await classify(model, levels);
    const part = row.appendChild(document.createElement('div'));
    part.className = model.role;
    const said = part.appendChild(document.createElement('div'));
    said.className = 'said';
    said.textContent =
      `${file.name} · ${model.role} · ${milliseconds.toFixed(1)} ms`;
    part.append(...classes.slice(0, TOP).map(bar));
  }
  element('pictures').prepend(row);
}

let queue = Promise.resolve();

// Shows pictures one after the other; `done` counts those that were tried.
function add(files) {
  if (files.length) element('problem').textContent = '';
  for (const file of files) {
    queue = queue.then(() => show(file)).catch((error) => {
      element('problem').textContent =
        `${file.name} cannot be shown: ${error.message || error}`;
    }).then(() => {
      document.body.dataset.done = 1 + Number(document.body.dataset.done || 0);
    });
  }
}

const drop = element('drop');
const input = drop.querySelector('input');
input.addEventListener('change', () => { add([...input.files]); input.value = ''; });
document.addEventListener('dragover', (event) => {
  event.preventDefault();
  drop.classList.add('over');
});
document.addEventListener('dragleave', () => drop.classList.remove('over'));
document.addEventListener('drop', (event) => {
  event.preventDefault();
  drop.classList.remove('over');
  add([...event.dataTransfer.files]);
});
document.addEventListener('paste', (event) => add([...event.clipboardData.files]));
