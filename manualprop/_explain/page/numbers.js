// The numbers, and how they look. Every array is float32, as the tensor was.
const DATA = JSON.parse(document.getElementById('data').textContent);
const state = { frame: 0, example: 0, backward: false, at: null };
const $ = (id) => document.getElementById(id);

function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

class Numbers {
  constructor(key, found) {
    Object.assign(this, found, { key });
    this.unpacked = [];
  }
  array(frame = state.frame) {
    const k = this.frames.length === 1 ? 0 : frame;
    return (this.unpacked[k] ??= unpacked(this.frames[k]));
  }
  at(row, col, frame = state.frame) {
    return this.array(frame)[row * this.cols + col];
  }
  largest(frame = state.frame) {
    let found = 0;
    for (const v of this.array(frame)) if (Math.abs(v) > found && Number.isFinite(v)) found = Math.abs(v);
    return found;
  }
  // The row of the chosen example; of a layer with several rows for each, the first of them.
  rowOfExample() {
    const each = Math.max(1, Math.round(this.of[0] / (DATA.tables.output ? DATA.tables.output.of[0] : 1)));
    return Math.min(this.rows - 1, state.example * each);
  }
  get whole() {
    return this.rows === this.of[0] && this.cols === this.of[1];
  }
}
const TABLES = Object.fromEntries(Object.entries(DATA.tables).map(([key, t]) => [key, new Numbers(key, t)]));
const table = (key) => TABLES[key];

function shown(v, digits = 4) {
  if (v === null || v === undefined) return 'not finite';
  if (!Number.isFinite(v)) return String(v).replace('-', '−');
  if (v === 0) return '0';
  const size = Math.abs(v);
  const text =
    size >= 1e-3 && size < 1e5
      ? String(Number(v.toPrecision(digits)))
      : v.toExponential(Math.max(1, digits - 2)).replace('e+', 'e');
  return text.replaceAll('-', '−');
}
const escaped = (text) =>
  String(text).replace(/[&<>"]/g, (c) => ({ '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;' })[c]);
const datum = (v, digits) => `<data value="${v}">${shown(v, digits)}</data>`;

// Colours: zero fades into the ground, plus and minus have a hue each.
let palette = {};
function readPalette() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ['zero', 'plus', 'minus'])
    palette[name] = style.getPropertyValue(`--${name}`).split(',').map(Number);
  for (const name of ['text', 'muted', 'ground', 'accent', 'warn', 'line'])
    palette[name] = style.getPropertyValue(`--${name}`).trim();
}
function colour(v, largest) {
  if (!Number.isFinite(v)) return [160, 0, 160];
  const share = largest ? Math.min(1, Math.abs(v) / largest) ** 0.6 : 0;
  const hue = v < 0 ? palette.minus : palette.plus;
  return palette.zero.map((z, k) => Math.round(z + share * (hue[k] - z)));
}
const css = (rgb) => `rgb(${rgb.join(' ')})`;
function luminance(rgb) {
  const [r, g, b] = rgb.map((c) => {
    c /= 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
// Black or white, whichever is easier to read on a colour: one of the two always has a contrast above 4.5.
const ink = (rgb) => (luminance(rgb) > 0.179 ? '#000000' : '#ffffff');

// What the printed functions use beside Math.
const each = (f, ...values) => {
  const row = values.find(Array.isArray);
  if (!row) return f(...values);
  return row.map((_, k) => f(...values.map((v) => (Array.isArray(v) ? v[k] : v))));
};
const largest = (v) => (Array.isArray(v) ? Math.max(...v) : v);
const total = (v) => (Array.isArray(v) ? v.reduce((a, b) => a + b, 0) : v);
function erf(x) {
  // the series near 0, where it converges fast; 1 - erfc beyond
  if (Math.abs(x) > 2.5) return x > 0 ? 1 - erfc(x) : erfc(-x) - 1;
  let term = x,
    sum = x;
  for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum) && n < 200; n++) {
    term *= (-x * x) / n;
    sum += term / (2 * n + 1);
  }
  return (2 / Math.sqrt(Math.PI)) * sum;
}
function erfc(x) {
  // the continued fraction far out, which keeps the tail
  if (x < 2.5) return 1 - erf(x);
  let fraction = 0;
  for (let n = 60; n > 0; n--) fraction = n / 2 / (x + fraction);
  return Math.exp(-x * x) / Math.sqrt(Math.PI) / (x + fraction);
}

const watchers = [];
function changed() {
  for (const watch of watchers) watch();
}
