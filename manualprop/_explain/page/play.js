// The slider over recorded updates, the three descents, the run's history.

// ----- a line of numbers, drawn -----

// lines: [{points: [[x, y]], kind}], marks: [[x, y]]; returns SVG.
function chart(lines, marks, { label, left, right, caption, height = 110 }) {
  const all = lines.flatMap((l) => l.points).filter(([, y]) => Number.isFinite(y));
  const xs = all.map((p) => p[0]),
    ys = all.map((p) => p[1]);
  const x0 = Math.min(...xs),
    x1 = Math.max(...xs),
    y0 = Math.min(...ys),
    y1 = Math.max(...ys),
    W = window.innerWidth < 600 ? 340 : 640,
    L = 62,
    R = 12,
    T = 10,
    B = 24;
  const X = (x) => L + ((x - x0) / (x1 - x0 || 1)) * (W - L - R),
    Y = (y) => height - B - ((y - y0) / (y1 - y0 || 1)) * (height - T - B);
  const drawn = lines.map(
    ({ points, kind }) =>
      `<polyline class="${kind}" points="${points
        .filter(([, y]) => Number.isFinite(y))
        .map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`)
        .join(' ')}"/>`,
  );
  const dots = marks
    .filter(([, y]) => Number.isFinite(y))
    .map(
      ([x, y, big]) =>
        `<circle class="mark" cx="${X(x).toFixed(1)}" cy="${Y(y).toFixed(1)}" r="${big ? 6 : 2.5}"/>`,
    );
  return (
    `<svg viewBox="0 0 ${W} ${height}" role="img" aria-label="${escaped(label)}"><path class="axis" d="M${L} ${T}V${height - B}H${W - R}"/>` +
    `<text class="quiet" x="${L - 6}" y="${T + 8}" text-anchor="end">${shown(y1, 3)}</text><text class="quiet" x="${L - 6}" y="${height - B}" text-anchor="end">${shown(y0, 3)}</text>` +
    `<text class="quiet" x="${L}" y="${height - 6}">${escaped(left)}</text><text class="quiet" x="${W - R}" y="${height - 6}" text-anchor="end">${escaped(right)}</text>${drawn.join('')}${dots.join('')}</svg><p class="muted caption">${escaped(caption)}</p>`
  );
}

// ----- the recorded updates -----

const losses = DATA.losses.map((v, k) => [k, v]).filter(([, v]) => v !== null);
function drawCurve() {
  const own = DATA.at
    .map((update, k) => [update, DATA.frameLosses[k], k === state.frame])
    .filter(([, v]) => v !== null);
  $('when').textContent =
    `update ${DATA.at[state.frame]} of ${DATA.losses.length}, loss ${shown(DATA.frameLosses[state.frame])}`;
  if (!losses.length && own.length < 2) return;
  const told = `Loss of each update's own examples, from ${shown(losses[0]?.[1])} to ${shown(losses.at(-1)?.[1])}; dots: loss of the explained examples`;
  $('curve').innerHTML = chart([{ points: losses.length ? losses : own, kind: 'drawn' }], own, {
    label: told,
    left: 'update 0',
    right: String(DATA.losses.length),
    caption: `${DATA.stopped ? `${DATA.stopped}. ` : ''}Line: the loss of each update, before it. Dots: that of the explained examples.`,
  });
}
watchers.push(drawCurve);

const slider = $('frame');
slider.addEventListener('input', () => {
  state.frame = Number(slider.value);
  changed();
});
let playing = 0;
function play(on) {
  clearInterval(playing);
  playing = 0;
  $('play').textContent = on ? 'Pause' : 'Play';
  $('play').setAttribute('aria-pressed', String(on));
  if (!on) return;
  if (state.frame >= DATA.at.length - 1) {
    state.frame = 0;
  }
  playing = setInterval(() => {
    if (state.frame >= DATA.at.length - 1) return play(false);
    state.frame += 1;
    slider.value = state.frame;
    changed();
  }, 900);
}
$('play').addEventListener('click', () => play(!playing));
if (DATA.at.length < 2) {
  $('play').disabled = true;
  slider.disabled = true;
}
$('example').addEventListener('change', () => {
  state.example = Number($('example').value);
  changed();
});
for (const radio of document.querySelectorAll('input[name="direction"]')) {
  radio.addEventListener('change', () => {
    state.backward = radio.value === 'backward' && radio.checked;
    changed();
  });
}

// ----- the three descents -----

function drawPath(canvas) {
  const { grid, across, down, paths } = DATA.slice,
    path = paths[Number(canvas.dataset.path)];
  const side = Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)) || 300,
    paint = canvas.getContext('2d');
  canvas.width = canvas.height = side;
  const flat = grid
      .flat()
      .filter((v) => v !== null)
      .sort((a, b) => a - b),
    low = flat[0],
    n = grid.length,
    m = grid[0].length;
  const level = (v) => Math.log((v === null ? flat.at(-1) : v) - low + 0.02 * (flat.at(-1) - low) + 1e-30);
  const bottom = level(low),
    top = level(flat.at(-1)),
    picture = paint.createImageData(side, side);
  for (let py = 0; py < side; py++)
    for (let px = 0; px < side; px++) {
      const fy = (py / (side - 1)) * (n - 1),
        fx = (px / (side - 1)) * (m - 1),
        r = Math.min(n - 2, Math.floor(fy)),
        c = Math.min(m - 2, Math.floor(fx)),
        a = fy - r,
        b = fx - c;
      const v =
        (1 - a) * ((1 - b) * level(grid[r][c]) + b * level(grid[r][c + 1])) +
        a * ((1 - b) * level(grid[r + 1][c]) + b * level(grid[r + 1][c + 1]));
      const band = Math.floor((14 * (v - bottom)) / (top - bottom || 1)) / 14,
        rgb = palette.zero.map((z, k) => z + band * 0.75 * (palette.plus[k] - z));
      picture.data.set([...rgb, 255], 4 * (py * side + px));
    }
  paint.putImageData(picture, 0, 0);
  if (!path.length) return;
  const X = ([x]) => ((x - across[0]) / (across[1] - across[0])) * side,
    Y = ([, y]) => ((y - down[0]) / (down[1] - down[0])) * side;
  for (const [stroke, width] of [
    [palette.ground, 4],
    [css(palette.minus), 2],
  ]) {
    paint.strokeStyle = stroke;
    paint.lineWidth = (width * side) / 300;
    paint.beginPath();
    path.forEach((p, k) => (k ? paint.lineTo(X(p), Y(p)) : paint.moveTo(X(p), Y(p))));
    paint.stroke();
  }
  path.forEach((p, k) => {
    const start = k === 0,
      end = k === path.length - 1;
    paint.fillStyle = start ? palette.ground : end ? palette.text : css(palette.minus);
    paint.beginPath();
    paint.arc(X(p), Y(p), ((start || end ? 5.5 : 2.2) * side) / 300, 0, 7);
    paint.fill();
    if (start) {
      paint.strokeStyle = palette.text;
      paint.lineWidth = (2 * side) / 300;
      paint.stroke();
    }
  });
}
function drawPaths() {
  if (DATA.slice) document.querySelectorAll('canvas.path').forEach(drawPath);
}

// ----- the run -----

function drawHistory() {
  const rows = DATA.history.filter((row) => row.train_loss !== undefined);
  if (rows.length < 2) return;
  $('history').hidden = false;
  const line = (name) => rows.filter((row) => row[name] !== undefined).map((row) => [row.epoch, row[name]]),
    last = rows.at(-1);
  const lines = [
    { points: line('train_loss'), kind: 'drawn' },
    { points: line('val_loss'), kind: 'straight' },
  ].filter((l) => l.points.length);
  $('history-body').innerHTML = chart(lines, [], {
    label: `Loss of the run by epoch; at the end ${shown(last.train_loss)} in training`,
    left: `epoch ${rows[0].epoch}`,
    right: String(last.epoch),
    caption: 'Line: the training loss. Dashes: the validation loss.',
    height: 150,
  });
}

// What the numbers of each recorded update tell.
const REMARKS = [...document.querySelectorAll('.remarks')];
function drawRemarks() {
  for (const element of REMARKS) {
    const told = DATA.remarks[Number(element.dataset.remarks)],
      now = told[Math.min(state.frame, told.length - 1)];
    element.replaceChildren(
      ...now.map((text) =>
        Object.assign(document.createElement('p'), { className: 'remark', textContent: text }),
      ),
    );
  }
}
watchers.push(drawRemarks);

// ----- start, and whatever changes the look -----

changed();
drawPaths();
drawHistory();
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
  readPalette();
  changed();
  drawPaths();
});
let wide = window.innerWidth;
addEventListener('resize', () => {
  if (window.innerWidth !== wide) {
    wide = window.innerWidth;
    GRIDS.forEach((grid) => grid.reserve());
    changed();
    drawPaths();
  }
});
