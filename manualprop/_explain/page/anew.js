// The network, computed anew from its input, layer by layer, for all examples of the update at once: batch norms want them all.
// Where the tables hold a part of the network, the whole of it is there as it was before the explained update.
const WHOLE = Object.fromEntries(Object.entries(DATA.whole).map(([key, t]) => [key, new Numbers(key, t)]));
const whole = (key) => WHOLE[key] ?? table(key);
const nudged = () => (WHOLE.x ? 0 : state.frame);


const product = (sizes) => sizes.reduce((a, b) => a * b, 1);
// All that does not depend on the numbers is worked out once for a layer.
const once = new Map();
function remembered(made, what) {
  if (!once.has(made)) once.set(made, what());
  return once.get(made);
}
const flattened = (at, sizes) => at.reduce((sum, k, axis) => sum * sizes[axis] + k, 0);
// For each place k of a kernel, the places q and i that it joins, along the flattened axes of positions.
function taps(made, x, y) {
  return remembered(made, () =>
    choices(made.kernel.map(counts)).map((k) => {
      const met = choices(meeting(made, [0, 0, ...x], [0, 0, ...y], { k }));
      return {
        q: Int32Array.from(met, (one) => flattened(part(one, 'q'), y)),
        i: Int32Array.from(met, (one) => flattened(part(one, 'i'), x)),
      };
    }),
  );
}
// For each window q of a pool, the places that it covers, and what their mean divides by.
function windowsOf(made, x, y) {
  const shapes = [
    [0, 0, ...x],
    [0, 0, ...y],
  ];
  return remembered(made, () =>
    choices(y.map(counts)).map((q) => ({
      places: choices(meeting(made, ...shapes, { q })).map((met) => flattened(part(met, 'i'), x)),
      divisor: made.kind === 'mean' ? divisorOf(made, q, ...shapes) : 1,
    })),
  );
}
function pooled(v, made, of) {
  const [channels, ...x] = made.from,
    y = made.to.slice(1),
    windows = windowsOf(made, x, y),
    X = product(x),
    Q = product(y);
  return v.map((one) => {
    const z = new Float64Array(channels * Q);
    for (let c = 0; c < channels; c++)
      for (let q = 0; q < Q; q++) z[c * Q + q] = of(one, c * X, windows[q]);
    return z;
  });
}
// A convolution reads at i and adds at q; a transposed one reads at q and adds at i.  W starts with the channels of q.
function kernelSums(v, { made, W, b }, read, transposed) {
  const w = read(W),
    bias = b ? read(b) : null,
    [inputs, ...from] = made.from,
    [outputs, ...to] = made.to,
    each = whole(W).shape[1],
    narrow = transposed ? inputs : outputs,
    joined = transposed ? taps(made, to, from) : taps(made, from, to),
    [source, target] = transposed ? ['q', 'i'] : ['i', 'q'],
    size = { from: product(from), to: product(to) };
  return v.map((one) => {
    const z = new Float64Array(outputs * size.to);
    if (bias) bias.forEach((number, c) => z.fill(number, c * size.to, (c + 1) * size.to));
    for (let o = 0; o < narrow; o++)
      for (let c = 0; c < each; c++) {
        const other = Math.floor(o / (narrow / made.groups)) * each + c,
          [input, output] = transposed ? [o, other] : [other, o];
        joined.forEach((tap, k) => {
          const weight = w[(o * each + c) * joined.length + k],
            [reads, adds] = [tap[source], tap[target]],
            [start, end] = [input * size.from, output * size.to];
          for (let j = 0; j < reads.length; j++) z[end + adds[j]] += weight * one[start + reads[j]];
        });
      }
    return z;
  });
}
// v[n] are the numbers of example n in a row; `read` gives those of a parameter.
const ANEW = {
  same: (v) => v,
  activation: (v, { place }) => v.map((one) => one.map((x) => ACTIVATIONS[place].f(x))),
  dropped: (v, { made }, read) => {
    const mask = read(made.m);
    return v.map((one, n) => one.map((x, j) => x * mask[n * one.length + j]));
  },
  affine(v, { W, b }, read) {
    const w = read(W),
      bias = b ? read(b) : null,
      outputs = whole(W).shape[0];
    return v.map((one) =>
      Float64Array.from({ length: outputs }, (_, o) => {
        let z = bias ? bias[o] : 0;
        for (let i = 0; i < one.length; i++) z += w[o * one.length + i] * one[i];
        return z;
      }),
    );
  },
  convolution: (v, layer, read) => kernelSums(v, layer, read, false),
  transposed: (v, layer, read) => kernelSums(v, layer, read, true),
  maximum: (v, { made }) => pooled(v, made, (one, from, { places }) => places.reduce((top, i) => Math.max(top, one[from + i]), -Infinity)),
  mean: (v, { made }) => pooled(v, made, (one, from, { places, divisor }) => places.reduce((sum, i) => sum + one[from + i], 0) / divisor),
  normalised(v, { made, W, b }, read) {
    const w = W ? read(W) : null,
      bias = b ? read(b) : null,
      size = v[0].length / made.channels;
    const all = counts(made.channels).map((c) => {
      const over = v.length * size,
        sum = (of) => v.reduce((a, one) => a + one.subarray(c * size, (c + 1) * size).reduce((s, x) => s + of(x), 0), 0);
      const mean = made.mean ? made.mean[c] : sum((x) => x) / over,
        variance = made.var ? made.var[c] : sum((x) => (x - mean) ** 2) / over;
      return { mean, scale: (w ? w[c] : 1) / Math.sqrt(variance + made.eps), bias: bias ? bias[c] : 0 };
    });
    return v.map((one) =>
      one.map((x, j) => {
        const { mean, scale, bias } = all[Math.floor(j / size)];
        return (x - mean) * scale + bias;
      }),
    );
  },
};

const COMPUTED = DATA.layers.map((layer, place) => ({ made: layer.anew, W: layer.W, b: layer.b, place }));
function inputs(frame) {
  const X = whole('x'),
    numbers = X.array(frame),
    size = numbers.length / X.shape[0];
  return counts(X.shape[0]).map((n) => Float64Array.from(numbers.subarray(n * size, (n + 1) * size)));
}
// The values of all layers as they are, which a nudge does not change before its layer.
let plain = { frame: -1, values: [] };
function plainValues(frame) {
  if (plain.frame !== frame) {
    plain = { frame, values: [inputs(frame)] };
    for (const layer of COMPUTED)
      plain.values.push(ANEW[layer.made.kind](plain.values.at(-1), layer, (key) => whole(key).array(frame)));
  }
  return plain.values;
}
// The outputs of the network for all examples, with `by` added to one number of a weight.
function outputsWith(key, row, col, by) {
  const frame = nudged(),
    first = COMPUTED.findIndex(({ W }) => W === key),
    changed = Float64Array.from(whole(key).array(frame));
  changed[row * whole(key).cols + col] += by;
  return COMPUTED.slice(first).reduce(
    (v, layer) => ANEW[layer.made.kind](v, layer, (name) => (name === key ? changed : whole(name).array(frame))),
    plainValues(frame)[first],
  );
}
// The loss of all examples of the update, with `by` added to one number of a weight.
function lossWith(key, row, col, by) {
  const T = whole('target'),
    frame = nudged();
  const each = outputsWith(key, row, col, by).map((values, n) => {
    const v = Array.from(values),
      one = T.cols === 1 && v.length > 1; // the number of a class
    return total(LOSS(v, one ? T.at(n, 0, frame) : Array.from({ length: T.cols }, (_, c) => T.at(n, c, frame))));
  });
  return total(each) / DATA.divisor;
}
