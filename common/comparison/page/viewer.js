// Two codecs on one image at nearly equal rate: pictures, errors, bits, and where the rate goes.
"use strict";

const GAIN = 8;  // of the error maps
const SIDES = ["left", "right"];
const COLORS = ["#8d99ae", "#e07a5f", "#3d82c4", "#b5b5b5"];  // header, z, y, coder
const loaded = new Map();  // images by their data URI
const chosen = { left: null, right: null };  // what the two sides show
let drawing = 0;  // number of the newest drawing; older ones are given up

function startViewer() {
  const { images, codecs } = DATA.viewer;
  const named = codecs.map((codec, i) => [i, codec.name]);
  fillSelect(get("image"), images.map((image, i) => [i, image.name]));
  fillSelect(get("left"), named);
  fillSelect(get("right"), named);
  const jpeg = codecs.findIndex((codec) => !codec.points[0].views[0].rate);
  get("right").value = jpeg < 0 ? codecs.length - 1 : jpeg;
  listPoints();
  get("left").addEventListener("change", () => { listPoints(); drawViewer(); });
  get("image").addEventListener("change", () => { listPoints(get("point").value); drawViewer(); });
  for (const id of ["right", "point", "mode"]) get(id).addEventListener("change", drawViewer);
  get("split").addEventListener("input", drawSplit);
  drawViewer();
}

function codecOf(side) {
  return DATA.viewer.codecs[get(side).value];
}

function listPoints(keep = 0) {
  const image = get("image").value;
  fillSelect(get("point"), codecOf("left").points.map((point, i) =>
    [i, `${point.views[image].bpp.toFixed(3)} bpp (${point.label})`]));
  get("point").value = keep;
}

function nearestPoint(codec, image, rate) {
  const distance = (point) => Math.abs(Math.log(point.views[image].bpp / rate));
  return codec.points.reduce((a, b) => (distance(b) < distance(a) ? b : a));
}

function load(uri) {
  if (!loaded.has(uri)) {
    const image = new Image();
    image.src = uri;
    loaded.set(uri, image.decode().then(() => image));
  }
  return loaded.get(uri);
}

async function drawViewer() {
  const turn = ++drawing;
  const image = get("image").value;
  const original = DATA.viewer.images[image];
  const left = codecOf("left").points[get("point").value];
  chosen.left = left.views[image];
  const right = nearestPoint(codecOf("right"), image, chosen.left.bpp);
  chosen.right = right.views[image];
  const labels = { left: left.label, right: right.label };
  for (const side of SIDES) {
    const { bpp, psnr, bytes } = chosen[side];
    get(`caption-${side}`).textContent = `${side}: ${codecOf(side).name}, ${labels[side]}: ` +
      `${bpp.toFixed(3)} bpp, ${bytes.toLocaleString("en")} bytes, ` +
      (psnr === null ? "identical" : `${psnr.toFixed(2)} dB`);
  }
  drawRates();
  const mode = get("mode").value;
  get("stage").classList.toggle("coarse", mode === "bits");
  get("stage").style.aspectRatio = `${original.width} / ${original.height}`;
  const pictures = await Promise.all([original, chosen.left, chosen.right].map((v) => load(v.src)));
  if (turn !== drawing) return;
  SIDES.forEach((side, i) => {
    const canvas = get(`canvas-${side}`);
    if (mode === "bits") drawBits(canvas, chosen[side].rate, original);
    else drawPicture(canvas, pictures[i + 1], mode === "errors" ? pictures[0] : null, original);
  });
  get("stage").dataset.drawn = `${mode} ${get("left").value} ${get("right").value} ${image}`;
  drawSplit();
}

function pixels(picture, { width, height }) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

function drawPicture(canvas, picture, original, size) {
  canvas.width = size.width;
  canvas.height = size.height;
  const shownPixels = pixels(picture, size);
  if (original) {
    const [a, b] = [shownPixels.data, pixels(original, size).data];
    for (let i = 0; i < a.length; i++) if (i % 4 !== 3) a[i] = GAIN * Math.abs(a[i] - b[i]);
  }
  canvas.getContext("2d").putImageData(shownPixels, 0, 0);
}

function mostBits() {
  return Math.max(1, ...SIDES.flatMap((side) => chosen[side].rate?.map.bits ?? []));
}

function drawBits(canvas, rate, size) {
  const context = canvas.getContext("2d");
  if (!rate) {
    canvas.width = size.width;
    canvas.height = size.height;
    context.fillStyle = "#777777";
    context.font = "20px sans-serif";
    context.textAlign = "center";
    context.fillText("no map: not one of our codecs", size.width / 2, size.height / 2);
    return;
  }
  const { width, height, bits } = rate.map;
  canvas.width = width;
  canvas.height = height;
  const map = context.createImageData(width, height);
  const most = mostBits();
  bits.forEach((value, i) => map.data.set([...heat(value / most), 255], 4 * i));
  context.putImageData(map, 0, 0);
}

function heat(t) {  // black, purple, orange, pale yellow
  const stops = [[4, 3, 18], [110, 30, 110], [240, 110, 50], [252, 250, 190]];
  const at = Math.min(0.9999, Math.max(0, t)) * 3;
  const [a, b] = [stops[Math.floor(at)], stops[Math.floor(at) + 1]];
  return a.map((v, i) => Math.round(v + (at % 1) * (b[i] - v)));
}

function drawSplit() {
  const percent = get("split").value;
  get("canvas-right").style.clipPath = `inset(0 0 0 ${percent}%)`;
  get("divider").style.left = `${percent}%`;
}

function drawRates() {
  for (const side of SIDES) {
    drawRate(get(`rate-${side}`), chosen[side]);
    drawSteps(get(`steps-${side}`), chosen[side]?.rate);
  }
}

function drawRate(box, view) {
  box.replaceChildren();
  if (!view?.rate) return;
  const { header, z, y, coder, step } = view.rate;
  const parts = [["header and checksum", header], ["z", z ?? 0],
    [y.length > 1 ? `y, in ${y.length} steps (${step})` : "y", y.reduce((a, b) => a + b, 0)],
    ["coder, beyond the estimate", coder]];
  const bar = document.createElement("div");
  const list = document.createElement("ul");
  bar.className = "bar";
  parts.forEach(([name, bytes], i) => {
    if (!bytes) return;
    const piece = document.createElement("span");
    piece.style.background = COLORS[i];
    piece.style.width = `${100 * Math.max(0, bytes) / view.bytes}%`;
    bar.append(piece);
    const item = document.createElement("li");
    const mark = document.createElement("span");
    mark.style.background = COLORS[i];
    item.append(mark, `${name}: ${Math.round(bytes).toLocaleString("en")} bytes, ` +
      `${(100 * bytes / view.bytes).toFixed(1)} %`);
    list.append(item);
  });
  box.append(bar, list);
}

// the bytes of y by slice, pass or wave
function drawSteps(chart, rate) {
  chart.hidden = !rate || rate.y.length < 2;
  if (chart.hidden) return;
  Plotly.react(chart, [{ type: "bar", x: rate.y.map((_, i) => i), y: rate.y,
    marker: { color: COLORS[2] },
    hovertemplate: `${rate.step} %{x}: %{y} bytes<extra></extra>` }], plotLayout(
    { title: { text: `${rate.step} of y` }, tickformat: "d" }, { title: { text: "bytes" } },
    { margin: { l: 50, r: 5, t: 5, b: 40 } }), { responsive: true, displayModeBar: false });
}
