// The nudge: a weight changes, the loss is computed anew, and the gradient's prediction stands beside it.
function nudgeScale(key) {
  const values = table(key).array(nudged());
  return Math.max(0.5, 4 * Math.sqrt(values.reduce((a, v) => a + v * v, 0) / values.length));
}
// The loss along the nudge; kept while the slider moves, because it takes many evaluations of the loss.
const REACH = DATA.multiplications > 2e6 ? 4 : 12, // evaluations to each side
  ALL = 2 * REACH + 1;
let along = { name: '', points: [] };
function curveAlong(key, row, col, reach) {
  const name = [key, row, col, nudged()].join();
  if (along.name !== name) {
    const at = Array.from({ length: ALL }, (_, k) => (k / REACH - 1) * reach);
    along = { name, points: at.map((d) => [d, lossWith(key, row, col, d)]) };
  }
  return along.points;
}
function drawNudge() {
  const key = $('nudge-layer').value,
    W = table(key),
    [row, col] = ['nudge-row', 'nudge-col'].map((id) => Number($(id).value));
  $('nudge-row').max = W.rows - 1;
  $('nudge-col').max = W.cols - 1;
  if (![row, col].every((k) => Number.isInteger(k) && k >= 0) || row >= W.rows || col >= W.cols) return;
  const reach = nudgeScale(key),
    by = (Number($('nudge-by').value) / 100) * reach,
    points = curveAlong(key, row, col, reach),
    before = points[REACH][1],
    slope = table(key.replace('p:', 'd:')).at(row, col, nudged()),
    real = lossWith(key, row, col, by) - before;
  const name = W.shape.length === 1 ? `W[${col}]` : `W${numbered({ key }, row, col)}`;
  nameNumbers(W);
  tellNudge(name, W.at(row, col, nudged()), by, { slope, real });
  drawNudgeCurve(name, points, slope, by, before + real);
}
// What the two numbers of a weight count; a batch norm has one for each channel.
function nameNumbers({ shape }) {
  const [row, col] = shape.length === 2 ? ['unit', 'input'] : shape.length > 2 ? ['channel', 'of its weights'] : ['', 'channel'];
  $('nudge-row-name').textContent = row;
  $('nudge-col-name').textContent = col;
  $('nudge-row').closest('label').hidden = !row;
}
function tellNudge(name, value, by, { slope, real }) {
  $('nudge-value').textContent = `${name} = ${shown(value)} ${by < 0 ? '−' : '+'} ${shown(Math.abs(by), 3)}`;
  const told = { predicted: slope * by, recomputed: real, missed: real - slope * by };
  for (const [id, v] of Object.entries(told)) {
    $(id).value = v;
    $(id).textContent = shown(v);
  }
}
function drawNudgeCurve(name, points, slope, by, loss) {
  const reach = points.at(-1)[0],
    straight = points.map(([d]) => [d, points[REACH][1] + slope * d]);
  const lines = [
    { points, kind: 'drawn' },
    { points: straight, kind: 'straight' },
  ];
  $('nudge-curve').innerHTML = chart(lines, [[by, loss, true]], {
    label:
      `The loss as ${name} changes, and the straight line that the gradient draws; ` +
      `at ${shown(by, 3)} the loss is ${shown(loss)}`,
    left: shown(-reach, 3),
    right: `+${shown(reach, 3)}`,
    caption: 'Line: the loss, computed anew. Dashes: what the gradient predicts.',
    height: 150,
  });
}
function nudgeThis(key, row, col) {
  $('nudge-layer').value = key;
  $('nudge-row').value = row;
  $('nudge-col').value = col;
  if (Number($('nudge-by').value) === 0) $('nudge-by').value = 40;
  drawNudge();
  $('nudge').scrollIntoView();
  $('nudge-by').focus();
}
if (DATA.nudge) {
  $('nudge-layer').innerHTML = DATA.nudged
    .map((i) => `<option value="${DATA.layers[i].W}">${escaped(DATA.layers[i].path)}</option>`)
    .join('');
  const last = DATA.layers[DATA.nudged.at(-1)].W,
    d = table(last.replace('p:', 'd:'));
  let best = 0;
  d.array().forEach((v, k, all) => {
    if (Math.abs(v) > Math.abs(all[best])) best = k;
  });
  $('nudge-layer').value = last;
  $('nudge-row').value = Math.floor(best / d.cols);
  $('nudge-col').value = best % d.cols;
  $('nudge-by').value = 40;
  for (const id of ['nudge-layer', 'nudge-row', 'nudge-col', 'nudge-by'])
    $(id).addEventListener('input', drawNudge);
  watchers.push(drawNudge);
}
