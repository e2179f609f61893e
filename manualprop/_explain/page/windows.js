// How one number of a convolution, a pool or another shape was made.  The letters are those of the rules: n an example, c and
// o a channel of the input and of the output, i and q a place in them, k a place in the window; one number for each axis.
function indexOf(t, row, col) {
  let flat = row * t.of[1] + col;
  return t.shape
    .map((_, axis) => t.shape.slice(axis + 1).reduce((a, b) => a * b, 1))
    .map((step) => {
      const at = Math.floor(flat / step);
      flat -= at * step;
      return at;
    });
}
// Undefined for what is not on this page.
function entry(t, index) {
  const flat = index.reduce((sum, at, axis) => sum * t.shape[axis] + at, 0),
    row = Math.floor(flat / t.of[1]),
    col = flat % t.of[1];
  return row < t.rows && col < t.cols ? t.at(row, col) : undefined;
}
const many = (count, what) => `${count} ${what}${count === 1 ? '' : 's'}`;
const named = (letter, index) => `${letter}[${index.join(',')}]`;
// Every choice of one element from each list.
const choices = (lists) => lists.reduce((all, list) => all.flatMap((one) => list.map((e) => [...one, e])), [[]]);
const counts = (size) => Array.from({ length: size }, (_, k) => k);

// The [k, i] of one axis of window q, without what lies outside of the input.
function windowAlong(made, axis, q, size, count) {
  if (made.adaptive) {
    const first = Math.floor((q * size) / count);
    return counts(Math.ceil(((q + 1) * size) / count) - first).map((k) => [k, first + k]);
  }
  return counts(made.kernel[axis])
    .map((k) => [k, q * made.stride[axis] + k * made.dilation[axis] - made.padding[axis]])
    .filter(([, i]) => i >= 0 && i < size);
}
// All (q, k, i) of each axis that meet, where one of the three letters is given.
function meeting(made, x, y, { q, k, i }) {
  return x.slice(2).map((size, axis) => {
    const all = q ? [q[axis]] : counts(y[2 + axis]);
    return all.flatMap((at) =>
      windowAlong(made, axis, at, size, y[2 + axis])
        .filter((pair) => (!k || pair[0] === k[axis]) && (!i || pair[1] === i[axis]))
        .map((pair) => ({ q: at, k: pair[0], i: pair[1] })),
    );
  });
}
const part = (met, letter) => met.map((one) => one[letter]);
// The products of two tensors, of which those that are on this page are terms.
function productsOf(pairs, a, A, b, B) {
  const terms = [];
  for (const [left, right] of pairs) {
    const v = entry(A, left),
      w = entry(B, right);
    if (v === undefined || w === undefined) continue;
    terms.push({ label: `${named(a, left)} ${named(b, right)}`, text: `${shown(v)} × ${shown(w)}`, value: v * w });
  }
  return { terms, whole: terms.length === pairs.length };
}
// What the mean of window q divides by.
function divisorOf(made, q, x, y) {
  if (made.divisor) return made.divisor;
  return q.reduce((product, at, axis) => {
    const size = x[2 + axis],
      covered = windowAlong(made, axis, at, size, y[2 + axis]).length;
    if (!made.include) return product * covered;
    const begin = at * made.stride[axis] - made.padding[axis];
    return product * (Math.min(begin + made.kernel[axis], size + made.padding[axis]) - begin);
  }, 1);
}

// A sum over a window: Σ W[o,c,k] x[n,c,i], or g in the place of x.
function gathered(made, row, col, grid, letter) {
  const Y = table(grid.key),
    X = table(made[letter]),
    W = table(made.W),
    [n, o, ...q] = indexOf(Y, row, col);
  const each = W.shape[1],
    group = Math.floor(o / (W.shape[0] / made.groups));
  const places = choices(meeting(made, X.shape, Y.shape, { q }));
  const pairs = counts(each).flatMap((c) =>
    places.map((met) => [
      [o, c, ...part(met, 'k')],
      [n, group * each + c, ...part(met, 'i')],
    ]),
  );
  const rule = `Σ W[${o},c,k] ${letter}[${n},${group ? `${group * each}+c` : 'c'},i]`;
  return { at: [n, o, ...q], rule, over: `over a window of ${many(places.length, 'place')} in ${many(each, 'channel')}`, ...productsOf(pairs, 'W', W, letter, X) };
}
// The other way: Σ g[n,o,q] W[o,c,k] over the windows that cover a place, or y in the place of g.
function spread(made, row, col, grid, key, letter) {
  const D = table(grid.key),
    G = table(made[key]),
    W = table(made.W),
    [n, c, ...i] = indexOf(D, row, col);
  const each = W.shape[1],
    outputs = W.shape[0] / made.groups,
    group = Math.floor(c / each);
  const places = choices(meeting(made, D.shape, G.shape, { i }));
  const pairs = counts(outputs).flatMap((o) =>
    places.map((met) => [
      [n, group * outputs + o, ...part(met, 'q')],
      [group * outputs + o, c % each, ...part(met, 'k')],
    ]),
  );
  const over = `over ${many(outputs, 'channel')} and ${many(places.length, 'place')}`,
    channel = group ? `${group * outputs}+o` : 'o';
  return { at: [n, c, ...i], rule: `Σ ${letter}[${n},${channel},q] W[${channel},${c % each},k]`, over, ...productsOf(pairs, letter, G, 'W', W) };
}
// Over examples and places: Σ g[n,o,q] x[n,c,i], or y and g in their places.
function correlated(made, row, col, grid, [first, G], [second, X]) {
  const D = table(grid.key),
    [o, c, ...k] = indexOf(D, row, col);
  const group = Math.floor(o / (D.shape[0] / made.groups)),
    channel = group * D.shape[1] + c;
  const places = choices(meeting(made, X.shape, G.shape, { k }));
  const pairs = counts(G.shape[0]).flatMap((n) =>
    places.map((met) => [
      [n, o, ...part(met, 'q')],
      [n, channel, ...part(met, 'i')],
    ]),
  );
  const head = `dW[${o},${c},${k}] = Σ ${first}[n,${o},q] ${second}[n,${channel},i], over ${many(G.shape[0], 'example')} and ${many(places.length, 'place')}`;
  return { head, ...productsOf(pairs, first, G, second, X) };
}
function withBias(found, name, made, channel) {
  if (made.b)
    found.terms.push({ label: `b[${channel}]`, text: 'bias', value: entry(table(made.b), [channel]), keep: true });
  return { ...found, head: `${named(name, found.at)} = ${found.rule}${made.b ? ` + b[${channel}]` : ''}, ${found.over}` };
}
// Of a gradient other layers may have a part.
const handedBack = (found, made, head) => ({ ...found, head, others: found.whole && made.shared, whole: found.whole && !made.shared });

Object.assign(MAKERS, {
  convolution(made, row, col, value, grid) {
    const found = gathered(made, row, col, grid, 'x');
    return withBias(found, 'y', made, found.at[1]);
  },
  convolution_input(made, row, col, value, grid) {
    const found = spread(made, row, col, grid, 'g', 'g');
    return handedBack(found, made, `${named('dL/dx', found.at)} = ${found.rule}, ${found.over} q that ${named('x', found.at)} went to`);
  },
  convolution_weight(made, row, col, value, grid) {
    return correlated(made, row, col, grid, ['g', table(made.g)], ['x', table(made.x)]);
  },
  transposed(made, row, col, value, grid) {
    const found = spread(made, row, col, grid, 'x', 'y');
    return withBias(found, 'x', made, found.at[1]);
  },
  transposed_input(made, row, col, value, grid) {
    const found = gathered(made, row, col, grid, 'g');
    return handedBack(found, made, `${named('dL/dy', found.at)} = ${found.rule}, ${found.over}`);
  },
  transposed_weight(made, row, col, value, grid) {
    return correlated(made, row, col, grid, ['y', table(made.x)], ['g', table(made.g)]);
  },
  convolution_bias({ g }, _, o) {
    const G = table(g),
      places = choices(G.shape.slice(2).map(counts)),
      terms = [];
    for (const n of counts(G.shape[0])) {
      const numbers = places.map((q) => entry(G, [n, o, ...q])).filter((v) => v !== undefined);
      if (numbers.length === places.length)
        terms.push({ label: `example ${n}`, text: `${many(places.length, 'place')}`, value: numbers.reduce((a, b) => a + b, 0) });
    }
    const head = `db[${o}] = Σ g[n,${o},q], over ${many(G.shape[0], 'example')} and ${many(places.length, 'place')}`;
    return { head, terms, whole: terms.length === G.shape[0] };
  },
  maximum(made, row, col, value, grid) {
    const Y = table(grid.key),
      X = table(made.x),
      [n, c, ...q] = indexOf(Y, row, col);
    const place = entry(table(made.i), [n, c, ...q]),
      chosen = unravelled(place, X.shape.slice(2));
    const numbers = choices(meeting(made, X.shape, Y.shape, { q })).map((met) => {
      const i = part(met, 'i'),
        v = entry(X, [n, c, ...i]);
      const text = `${named('x', [n, c, ...i])} = ${v === undefined ? 'not on this page' : datum(v)}`;
      return String(i) === String(chosen) ? `<b>${text}</b>` : text;
    });
    return {
      head: `y[${n},${c},${q}] = x[${n},${c},${chosen}], the largest of ${numbers.length} numbers`,
      terms: [],
      more: `<p>${numbers.join('; ')}. It is at place ${place} of its image.</p>`,
    };
  },
  chosen(made, row, col, value, grid) {
    const D = table(grid.key),
      G = table(made.g),
      I = table(made.i),
      [n, c, ...i] = indexOf(D, row, col);
    const place = i.reduce((sum, at, axis) => sum * D.shape[2 + axis] + at, 0);
    const covering = choices(meeting(made, D.shape, G.shape, { i })).map((met) => [n, c, ...part(met, 'q')]),
      onPage = covering.filter((q) => entry(G, q) !== undefined && entry(I, q) !== undefined);
    const terms = onPage
      .filter((q) => entry(I, q) === place)
      .map((q) => ({ label: named('g', q), text: 'chose this place', value: entry(G, q) }));
    const whole = onPage.length === covering.length;
    return {
      head: `dL/dx[${n},${c},${i}] = Σ g[${n},${c},q], over the windows q that chose this place`,
      terms,
      others: whole && made.shared,
      whole: whole && !made.shared,
      more: terms.length || !whole || made.shared ? '' : `<p>${covering.length ? 'Each window that covers it chose another place' : 'No window covers it'}, so it gets nothing.</p>`,
    };
  },
  mean(made, row, col, value, grid) {
    const Y = table(grid.key),
      X = table(made.x),
      [n, c, ...q] = indexOf(Y, row, col),
      over = divisorOf(made, q, X.shape, Y.shape);
    const window = choices(meeting(made, X.shape, Y.shape, { q })).map((met) => [n, c, ...part(met, 'i')]);
    return { head: `y[${n},${c},${q}] = 1/${over} Σ x[${n},${c},i], over its window`, ...sharesOf(window, 'x', X, () => over) };
  },
  mean_input(made, row, col, value, grid) {
    const D = table(grid.key),
      G = table(made.g),
      [n, c, ...i] = indexOf(D, row, col);
    const windows = choices(meeting(made, D.shape, G.shape, { i })).map((met) => [n, c, ...part(met, 'q')]);
    const found = sharesOf(windows, 'g', G, (at) => divisorOf(made, at.slice(2), D.shape, G.shape));
    const head = `dL/dx[${n},${c},${i}] = Σ g[${n},${c},q] / d, over the windows q that cover this place`;
    return { head, ...found, others: found.whole && made.shared, whole: found.whole && !made.shared };
  },
  place(_, row, col, value, grid) {
    return {
      head: `i${named('', indexOf(table(grid.key), row, col))}`,
      terms: [],
      more: `<p>The maximum of this window is at place ${value}, counted row by row through its image.</p>`,
    };
  },
  moved({ from, letter }, row, col, value, grid) {
    const t = table(grid.key),
      source = table(from),
      at = indexOf(t, row, col),
      flat = row * t.of[1] + col;
    const before = indexOf(source, Math.floor(flat / source.of[1]), flat % source.of[1]);
    return {
      head: named(grid.symbol, at),
      terms: [],
      more: `<p>${named(letter, before)} in another shape: ${datum(value, 6)}.</p>`,
    };
  },
});

function unravelled(flat, shape) {
  return shape
    .map((_, axis) => shape.slice(axis + 1).reduce((a, b) => a * b, 1))
    .map((step, axis) => Math.floor(flat / step) % shape[axis]);
}
function sharesOf(places, letter, t, over) {
  const terms = [];
  for (const at of places) {
    const v = entry(t, at);
    if (v !== undefined)
      terms.push({ label: named(letter, at), text: `${shown(v)} / ${over(at)}`, value: v / over(at) });
  }
  return { terms, whole: terms.length === places.length };
}
