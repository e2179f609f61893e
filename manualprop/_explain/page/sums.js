// How one number was made: its terms, with the numbers that they are made of.
const MAX_TERMS = 6;

// Each maker returns {head, terms: [{label, text, value}], rest: name or '', more: html}; the terms add up to the number.
const MAKERS = {
  affine({ x, W, b }, n, o) {
    const X = table(x),
      w = table(W),
      B = b ? table(b) : null;
    const terms = products(Math.min(X.cols, w.cols), (i) => [
      `W[${o},${i}] x[${n},${i}]`,
      w.at(o, i),
      X.at(n, i),
    ]);
    if (B) terms.push({ label: `b[${o}]`, text: 'bias', value: B.at(0, o), keep: true });
    return {
      head: `y[${n},${o}] = Σᵢ W[${o},i] x[${n},i]${B ? ` + b[${o}]` : ''}`,
      terms,
      whole: X.cols === X.of[1] && w.cols === w.of[1],
    };
  },
  activation({ x, layer }, n, o, value, grid) {
    const X = table(x),
      printed = ACTIVATIONS[layer],
      v = X.at(n, o);
    const again = printed ? `, and computed anew ${datum(printed.f(v), 6)}` : '';
    return {
      head: `y${numbered(grid, n, o)} = f(x${numbered(grid, n, o)})`,
      terms: [],
      more: `<p>f is ${escaped(DATA.layers[layer].name)}: f(${datum(v)}) = ${datum(value, 6)}${again}.</p>`,
    };
  },
  slope({ g, s, layer }, n, o, value, grid) {
    const G = table(g).at(n, o),
      printed = ACTIVATIONS[layer],
      S = table(s).at(n, o);
    const slope = printed ? printed.df(S) : NaN,
      letter = printed && printed.saves === 'output' ? 'y' : 'x';
    return {
      head: `dL/dx${numbered(grid, n, o)} = g${numbered(grid, n, o)} f′`,
      terms: [],
      more: `<p>${datum(G)} × ${datum(slope)} = ${datum(value, 6)}. The slope f′ is taken at ${letter} = ${datum(S)}.</p>`,
    };
  },
  weight_gradient({ g, x }, o, i) {
    const G = table(g),
      X = table(x);
    const terms = products(Math.min(G.rows, X.rows), (n) => [
      `g[${n},${o}] x[${n},${i}]`,
      G.at(n, o),
      X.at(n, i),
    ]);
    return {
      head: `dW[${o},${i}] = Σₙ g[n,${o}] x[n,${i}], over the examples`,
      terms,
      whole: G.rows === G.of[0],
    };
  },
  bias_gradient({ g }, _, o) {
    const G = table(g),
      terms = [];
    for (let n = 0; n < G.rows; n++) terms.push({ label: `g[${n},${o}]`, text: '', value: G.at(n, o) });
    return { head: `db[${o}] = Σₙ g[n,${o}], over the examples`, terms, whole: G.rows === G.of[0] };
  },
  input_gradient({ g, W, shared }, n, i) {
    const G = table(g),
      w = table(W);
    const terms = products(Math.min(G.cols, w.rows), (o) => [
      `g[${n},${o}] W[${o},${i}]`,
      G.at(n, o),
      w.at(o, i),
    ]);
    return {
      head: `dL/dx[${n},${i}] = Σₒ g[${n},o] W[o,${i}], over the units that it feeds`,
      terms,
      others: shared,
      whole: !shared && G.cols === G.of[1] && w.rows === w.of[0],
    };
  },
  loss(_, n, o, value) {
    if (DATA.loss.kind !== 'cross entropy')
      return {
        head: `l[${n}]`,
        terms: [],
        more: `<p>${escaped(DATA.loss.kind)} of this example's output and target: ${datum(value, 6)}.</p>`,
      };
    const { p, t } = softmax(n);
    return {
      head: `l[${n}] = −log p[t]`,
      terms: [],
      more: `<p>The target is class t = ${t}. The network gives it p = ${datum(p[t])}, so the loss is −log ${datum(p[t])} = ${datum(value, 6)}.</p>`,
    };
  },
  loss_gradient(_, n, o, value) {
    const over = DATA.divisor;
    if (DATA.loss.kind === 'cross entropy') {
      const { p, t, z, sum } = softmax(n),
        hit = o === t ? 1 : 0;
      return {
        head: `g[${n},${o}] = (p[${o}] − y[${o}]) / ${over}`,
        terms: [],
        more:
          `<p>p[${o}] = e<sup>${shown(z[o])}</sup> / Σₖ e<sup>x[${n},k]</sup> = ${datum(Math.exp(z[o]))} / ${datum(sum)} = ${datum(p[o])}. ` +
          `The target is class ${t}, so y[${o}] = ${hit}. (${datum(p[o])} − ${hit}) / ${over} = ${datum(value, 6)}.</p>` +
          `<p>Why: log p[t] = x[t] − log Σₖ e<sup>x[k]</sup>. Its derivative in x[k] is 1[k = t] − p[k], and the loss is its negative. ${hit ? 'The right class is pushed up until p is 1.' : 'A wrong class is pushed down by as much as the network believes in it.'}</p>`,
      };
    }
    if (DATA.loss.kind === 'squared error') {
      const x = table('output').at(n, o),
        t = table('target').at(n, o);
      return {
        head: `g[${n},${o}] = 2 (x − t) / ${over}`,
        terms: [],
        more: `<p>2 (${datum(x)} − ${datum(t)}) / ${over} = ${datum(value, 6)}.</p>`,
      };
    }
    return {
      head: `g[${n},${o}]`,
      terms: [],
      more: `<p>The gradient of ${escaped(DATA.loss.kind)}: its formula stands above.</p>`,
    };
  },
  update({ value, gradient }, o, i, change, grid) {
    const w = table(value).at(o, i),
      d = table(gradient).at(o, i);
    const terms = [{ label: 'W', text: 'before', value: w, keep: true }];
    if (DATA.rate === null) terms.push({ label: 'ΔW', text: 'by the optimizer', value: change, keep: true });
    else {
      terms.push({
        label: '−η dW',
        text: `−${shown(DATA.rate)} × ${shown(d)}`,
        value: -DATA.rate * d,
        keep: true,
      });
      const other = change + DATA.rate * d;
      if (Math.abs(other) > 1e-5 * Math.abs(change) + 1e-7 * Math.abs(w))
        terms.push({ label: 'more', text: 'momentum, weight decay, clipping', value: other, keep: true });
    }
    return {
      head: `W${numbered(grid, o, i)} ← W${numbered(grid, o, i)} − η dW${numbered(grid, o, i)}`,
      terms,
      value: w + change,
      whole: true,
      exact: true,
    };
  },
  weight(_, o, i, value, grid) {
    const d = table(grid.key.replace('p:', 'd:'));
    const nudge =
      DATA.nudge && DATA.nudged.some((i) => DATA.layers[i].W === grid.key)
        ? ` <button type="button" data-nudge="${grid.key}|${o}|${i}">Nudge it</button>`
        : '';
    return {
      head: `${grid.symbol}${numbered(grid, o, i)}`,
      terms: [],
      more: `<p>A number that the network learns: ${datum(value, 6)}.${d ? ` Its gradient is ${datum(d.at(o, i))}.` : ''}${nudge}</p>`,
    };
  },
  input(_, n, i, value, grid) {
    return { head: `${grid.symbol}${numbered(grid, n, i)}`, terms: [], more: `<p>Given: ${datum(value, 6)}.</p>` };
  },
  same(_, n, i, value, grid) {
    return {
      head: `${grid.symbol}${numbered(grid, n, i)}`,
      terms: [],
      more: `<p>${datum(value, 6)}, made in a step before.</p>`,
    };
  },
  layer({ name }, n, i, value, grid) {
    return {
      head: `${grid.symbol}${numbered(grid, n, i)}`,
      terms: [],
      more: `<p>${datum(value, 6)}, made by ${escaped(name)}: its formula stands above.</p>`,
    };
  },
};

// The number at a row and column of a table, by the axes of the tensor.
function numbered(grid, row, col) {
  const t = table(grid.key);
  return named('', t.shape.length > 2 ? indexOf(t, row, col) : [row, col]);
}
function products(count, of) {
  const terms = [];
  for (let k = 0; k < count; k++) {
    const [label, a, b] = of(k);
    terms.push({ label, text: `${shown(a)} × ${shown(b)}`, value: a * b });
  }
  return terms;
}
function softmax(n) {
  const out = table('output'),
    z = Array.from({ length: out.cols }, (_, k) => out.at(n, k));
  const top = Math.max(...z),
    whole = z.map((v) => Math.exp(v - top)),
    sum = whole.reduce((a, b) => a + b, 0);
  return {
    p: whole.map((v) => v / sum),
    t: Math.round(table('target').at(n, 0)),
    z,
    sum: sum * Math.exp(top),
  };
}

function made(grid, row, col) {
  const value = table(grid.key).at(row, col);
  const found = MAKERS[grid.made.kind](grid.made, row, col, value, grid);
  found.value ??= value;
  return found;
}

// Show the sum; `aloud` tells it to a screen reader too.
function showSum(grid, row, col, aloud) {
  const found = made(grid, row, col),
    { terms } = found;
  const kept = terms.filter((t) => t.keep),
    others = terms.filter((t) => !t.keep).sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const rows = [...others.slice(0, MAX_TERMS)],
    left = others.slice(MAX_TERMS);
  if (left.length)
    rows.push({
      label: `${left.length} other terms`,
      text: '',
      value: left.reduce((a, t) => a + t.value, 0),
    });
  rows.push(...kept);
  const sum = terms.reduce((a, t) => a + t.value, 0);
  if (terms.length && !found.whole)
    rows.push({
      label: found.others ? 'from elsewhere' : 'not on this page',
      text: found.others ? 'other layers that take x' : 'the total less the terms shown',
      value: found.value - sum,
    });
  const longest = Math.max(...rows.map((t) => Math.abs(t.value)), 1e-300);
  const lines = rows.map(
    (t) =>
      `<tr><td>${escaped(t.label)}</td><td>${escaped(t.text)}</td><td class="value">${datum(t.value)}</td>` +
      `<td class="bar"><i style="width:${(100 * Math.abs(t.value)) / longest}%;background:${css(t.value < 0 ? palette.minus : palette.plus)}"></i></td></tr>`,
  );
  const body =
    (terms.length
      ? `<table><caption class="sr">The terms, the largest first</caption><tbody>${lines.join('')}</tbody></table>`
      : '') + (found.more ?? '');
  $('sum').hidden = false;
  document.body.classList.add('summing');
  $('sum-body').innerHTML =
    `<p class="total">${escaped(found.head)} = <data id="total" value="${found.value}">${shown(found.value, 6)}</data></p>${body}`;
  state.at = { grid, row, col };
  if (aloud)
    $('said').textContent =
      `${grid.what}, row ${row}, column ${col}: ${shown(found.value)}. ${terms.length ? `Sum of ${terms.length} terms, the largest ${rows[0].label} = ${shown(rows[0].value)}.` : ''}`;
}
function closeSum() {
  $('sum').hidden = true;
  document.body.classList.remove('summing');
  state.at = null;
}
$('close').addEventListener('click', closeSum);
for (const button of document.querySelectorAll('[data-move]')) {
  button.addEventListener('click', () => {
    if (state.at) GRIDS[DATA.grids.indexOf(state.at.grid)].move(button.dataset.move);
  });
}
$('sum-body').addEventListener('click', (event) => {
  const wanted = event.target.dataset.nudge;
  if (wanted) nudgeThis(...wanted.split('|'));
});
watchers.push(() => {
  if (state.at) showSum(state.at.grid, state.at.row, state.at.col, false);
});
