// The network: a column of units for its input and for the output of each layer, edges for what flows between them.
const UNITS = 12,
  APART = 20,
  TOP = 46,
  RADIUS = 8;
const between = () => (window.innerWidth < 600 ? 88 : 130);

// Units spread evenly over a layer: the first pixels of an image are most often empty.
function chosen(cols) {
  const count = Math.min(cols, UNITS);
  return Array.from({ length: count }, (_, k) => Math.floor(((k + 0.5) * cols) / count));
}
function columns() {
  const found = [
    { title: 'input', kind: '', key: 'x', gradient: DATA.layers.length ? DATA.layers[0].dx : '' },
  ];
  DATA.layers.forEach((layer, i) =>
    found.push({ title: layer.path, kind: layer.name, key: `y:${i}`, gradient: `g:${i}`, layer }),
  );
  return found
    .filter((column) => table(column.key))
    .map((column) => ({ ...column, units: chosen(table(column.key).cols) }));
}
const COLUMNS = columns();

function drawNetwork() {
  const BETWEEN = between();
  const tallest = Math.max(...COLUMNS.map((c) => c.units.length));
  const width = BETWEEN * COLUMNS.length + 20,
    height = TOP + tallest * APART + 34;
  const place = (k, j) => [
    60 + k * BETWEEN,
    TOP + ((tallest - COLUMNS[k].units.length) * APART) / 2 + (j + 0.5) * APART,
  ];
  const parts = [];
  COLUMNS.forEach((column, k) => {
    if (k) parts.push(edges(COLUMNS[k - 1], column, k, place));
  });
  COLUMNS.forEach((column, k) => parts.push(units(column, k, place, height)));
  parts.push(lossUnit(COLUMNS.length, height));
  const told = `${COLUMNS.map((c) => `${c.title}, ${table(c.key).of[1]} numbers`).join('; ')}. Loss ${shown(DATA.frameLosses[state.frame])}.`;
  $('network').innerHTML =
    `<svg viewBox="0 0 ${width + 60} ${height}" style="min-width:${Math.round(0.8 * (width + 60))}px" role="img" aria-label="${escaped(told)}">${parts.join('')}</svg>`;
  $('legend').textContent = state.backward
    ? 'Units: gradient of the loss with respect to their output. Edges: gradient times weight, what each hands back. Blue is plus, orange is minus.'
    : 'Units: their output for the chosen example. Edges: weight times input, what each adds. Blue is plus, orange is minus.';
}
function valueOf(column, unit) {
  const numbers = table(state.backward ? column.gradient : column.key);
  return numbers && unit < numbers.cols ? numbers.at(numbers.rowOfExample(), unit) : NaN;
}
function edges(from, to, k, place) {
  const layer = to.layer,
    lines = [];
  const follows = layer.x === from.key;
  const W = layer.kind === 'affine' && follows ? table(layer.W) : null;
  if (!W && !(follows && (layer.kind === 'activation' || layer.kind === 'same'))) return arrow(k, place);
  to.units.forEach((o, j) =>
    from.units.forEach((i, h) => {
      if (!W && i !== o) return;
      const flow = W
        ? o < W.rows && i < W.cols
          ? W.at(o, i) * (state.backward ? valueOf(to, o) : valueOf(from, i))
          : 0
        : valueOf(state.backward ? to : from, i);
      lines.push({ a: place(k - 1, h), b: place(k, j), flow });
    }),
  );
  const top = Math.max(...lines.map((l) => Math.abs(l.flow) || 0), 1e-300);
  return lines
    .map(({ a, b, flow }) => {
      const share = Math.min(1, Math.abs(flow) / top);
      if (!(share > 0.02)) return '';
      return `<line x1="${a[0] + RADIUS}" y1="${a[1]}" x2="${b[0] - RADIUS}" y2="${b[1]}" stroke="${css(flow < 0 ? palette.minus : palette.plus)}" stroke-width="${(0.5 + 2.5 * share).toFixed(2)}" opacity="${(0.15 + 0.85 * share).toFixed(2)}"/>`;
    })
    .join('');
}
// Between layers whose numbers are no plain sum of the ones before.
function arrow(k, place) {
  const [x] = place(k, 0),
    y = (TOP + (Math.max(...COLUMNS.map((c) => c.units.length)) * APART) / 2).toFixed(0),
    from = x - between() + 3 * RADIUS,
    to = x - 3 * RADIUS;
  const [a, b] = state.backward ? [to, from] : [from, to],
    back = state.backward ? 7 : -7;
  return `<path d="M${a} ${y}H${b}M${b + back} ${y - 5}L${b} ${y}L${b + back} ${+y + 5}" fill="none" stroke="${palette.muted}" stroke-width="2"/>`;
}
function units(column, k, place, height) {
  const BETWEEN = between();
  const numbers = table(state.backward && table(column.gradient) ? column.gradient : column.key),
    top = numbers.largest();
  const absent = state.backward && !table(column.gradient);
  const dots = column.units.map((unit, j) => {
    const [x, y] = place(k, j),
      v = absent ? 0 : valueOf(column, unit);
    return `<circle class="unit" data-column="${k}" data-unit="${unit}" cx="${x}" cy="${y}" r="${RADIUS}" fill="${css(colour(v, top))}"><title>${escaped(column.title)} ${unit}: ${absent ? 'no gradient is needed' : shown(v)}</title></circle>`;
  });
  const x = 60 + k * BETWEEN,
    of = table(column.key).of[1];
  return (
    `<text x="${x}" y="16" text-anchor="middle">${escaped(column.title)}</text><text class="quiet" x="${x}" y="32" text-anchor="middle">${escaped(column.kind)}</text>${dots.join('')}` +
    `<text class="quiet" x="${x}" y="${height - 10}" text-anchor="middle">${column.units.length < of ? `${column.units.length} of ${of}` : of}</text>`
  );
}
function lossUnit(k, height) {
  const x = 60 + (k - 1) * between() + 70,
    y = (TOP + height - 34) / 2;
  const losses = table('loss:l'),
    own =
      losses && losses.cols === 1
        ? `<text class="quiet" x="${x}" y="${y + 34}" text-anchor="middle">here ${shown(losses.at(losses.rowOfExample(), 0), 3)}</text>`
        : '';
  return `<text x="${x}" y="${y - 18}" text-anchor="middle">loss</text><text x="${x}" y="${y + 4}" text-anchor="middle" style="font-weight:700">${shown(DATA.frameLosses[state.frame], 3)}</text>${own}`;
}
$('network').addEventListener('click', ({ target }) => {
  if (!target.dataset || target.dataset.unit === undefined) return;
  const column = COLUMNS[Number(target.dataset.column)],
    key = state.backward && table(column.gradient) ? column.gradient : column.key;
  const grid = GRIDS.find((g) => g.grid.key === key);
  if (grid) grid.go(grid.numbers.rowOfExample(), Number(target.dataset.unit), true);
});
watchers.push(drawNetwork);
