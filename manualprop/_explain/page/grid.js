// A tensor as a table: of numbers where it is small, of colours where it is large, of images where its rows are images.
const FEW_COLUMNS = 10,
  FEW = 120;

class Grid {
  constructor(element, grid) {
    this.element = element;
    this.grid = grid;
    this.numbers = table(grid.key);
    this.row = 0;
    this.col = 0;
    const { rows, cols } = this.numbers;
    this.image = this.imageOfRow();
    this.lying = cols === 1 && rows > 1; // one number for each example: side by side
    this.small = !this.image && cols > 1 && cols <= FEW_COLUMNS && rows * cols <= FEW;
    element.innerHTML = `<div class="grid-head"><b>${escaped(grid.symbol)}</b><span>${escaped(grid.what)}</span><span class="muted"></span></div><div class="scroll"></div>`;
    this.told = element.querySelector('.muted');
    this.body = element.querySelector('.scroll');
    if (this.small) this.makeTable();
    else this.makeCanvas();
    this.reserve();
    this.target.addEventListener('keydown', (event) => this.key(event));
    this.target.addEventListener('focus', () => {
      if (this.target.matches(':focus-visible')) this.go(this.row, this.col, true);
    });
  }
  // Height and width, where a row of the table is one image or, with channels, several: an input, what multiplies one, a
  // kernel, what a convolution makes.
  imageOfRow() {
    const { key } = this.grid,
      { cols, shape } = this.numbers,
      isWeight = /^[pdu]:/.test(key);
    if (shape.length > 3 && shape[2] > 1 && cols === shape.slice(1).reduce((a, b) => a * b, 1)) {
      const width = shape[shape.length - 1];
      return [cols / shape[1] / width, width];
    }
    if (!DATA.image || cols !== DATA.image[0] * DATA.image[1]) return null;
    const at = DATA.layers.findIndex((layer) => layer.W),
      first = DATA.layers.slice(0, at).every((layer) => layer.kind === 'same') ? DATA.layers[at] : null;
    return key === 'x' || (isWeight && first && key.slice(1) === first.W.slice(1)) ? DATA.image : null;
  }
  get label() {
    const { rows, cols, of } = this.numbers,
      part = this.numbers.whole ? '' : `, the first ${rows} by ${cols} of ${of[0]} by ${of[1]}`;
    return `${this.grid.symbol}, ${this.grid.what}: ${rows} rows, ${cols} columns${part}`;
  }
  makeTable() {
    const { rows, cols } = this.numbers;
    const head = `<tr><th></th>${Array.from({ length: cols }, (_, c) => `<th scope="col">${c}</th>`).join('')}</tr>`;
    const body = Array.from(
      { length: rows },
      (_, r) =>
        `<tr><th scope="row">${r}</th>${Array.from({ length: cols }, (_, c) => `<td data-row="${r}" data-col="${c}"></td>`).join('')}</tr>`,
    );
    this.body.innerHTML = `<table class="numbers" tabindex="0"><caption class="sr">${escaped(this.label)}</caption>${cols > 1 ? `<thead>${head}</thead>` : ''}<tbody>${body.join('')}</tbody></table>`;
    this.target = this.body.firstElementChild;
    this.cells = [...this.target.querySelectorAll('td[data-row]')];
    for (const [event, aloud] of [
      ['pointerover', false],
      ['click', true],
    ]) {
      this.target.addEventListener(event, ({ target }) => {
        const cell = target.closest('td[data-row]');
        if (cell) this.go(Number(cell.dataset.row), Number(cell.dataset.col), aloud);
      });
    }
  }
  makeCanvas() {
    this.body.innerHTML = '<canvas tabindex="0" role="application" aria-roledescription="heat map"></canvas>';
    this.target = this.canvas = this.body.firstElementChild;
    this.canvas.setAttribute('aria-label', `${this.label}. Arrow keys go from number to number.`);
    for (const [event, aloud] of [
      ['pointermove', false],
      ['click', true],
    ]) {
      this.canvas.addEventListener(event, (e) => {
        const cell = this.under(e.offsetX, e.offsetY);
        if (cell) this.go(...cell, aloud);
      });
    }
  }
  // A small table as it is, and the place of a picture that is not drawn yet, so that what comes after it does not move when it is.
  reserve() {
    if (this.small) return this.draw();
    this.tell();
    const [width, height] = this.layout();
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
  }
  // Scroll a tall picture to the number.
  reveal() {
    const [, y, , high] = this.place(this.row, this.col),
      { scrollTop, clientHeight } = this.body;
    if (y < scrollTop || y + high > scrollTop + clientHeight) this.body.scrollTop = y - clientHeight / 2;
  }
  layout() {
    const { rows, cols } = this.numbers,
      width = Math.max(200, this.body.clientWidth - 6);
    if (this.image) {
      const [h, w] = this.image,
        tiles = rows * this.channels,
        across = Math.max(1, Math.min(tiles, Math.floor(width / Math.max(36, 2 * w + 4))));
      this.size = Math.max(2, Math.min(10, Math.floor((width / across - 4) / w)));
      this.across = Math.max(1, Math.min(tiles, Math.floor(width / (this.size * w + 4))));
      if (this.across > this.channels) this.across -= this.across % this.channels; // an example is not torn apart
      return [this.across * (this.size * w + 4), Math.ceil(tiles / this.across) * (this.size * h + 4)];
    }
    const across = this.lying ? rows : cols,
      down = this.lying ? 1 : rows;
    this.size = Math.max(4, Math.min(46, Math.floor(width / across)));
    const room =
      down === 1 ? 20 : this.size >= 40 && down <= 40 ? 16 : Math.min(this.size, Math.floor(340 / down));
    this.high = Math.min(22, Math.max(5, room));
    return [across * this.size, down * this.high];
  }
  place(row, col) {
    if (this.lying) return [row * this.size, 0, this.size, this.high];
    if (!this.image) return [col * this.size, row * this.high, this.size, this.high];
    const [h, w] = this.image,
      s = this.size,
      tile = row * this.channels + Math.floor(col / (h * w)),
      within = col % (h * w);
    return [
      (tile % this.across) * (s * w + 4) + (within % w) * s,
      Math.floor(tile / this.across) * (s * h + 4) + Math.floor(within / w) * s,
      s,
      s,
    ];
  }
  under(x, y) {
    const { rows, cols } = this.numbers;
    if (!this.image) {
      let r = Math.floor(y / this.high),
        c = Math.floor(x / this.size);
      if (this.lying) [r, c] = [c, r];
      return r >= 0 && c >= 0 && r < rows && c < cols ? [r, c] : null;
    }
    const [h, w] = this.image,
      s = this.size,
      tx = Math.floor(x / (s * w + 4)),
      ty = Math.floor(y / (s * h + 4)),
      tile = ty * this.across + tx,
      row = Math.floor(tile / this.channels),
      first = (tile % this.channels) * h * w;
    const c = Math.floor((x - tx * (s * w + 4)) / s),
      r = Math.floor((y - ty * (s * h + 4)) / s);
    return tx >= 0 && tx < this.across && row < rows && c < w && r < h && c >= 0 && r >= 0
      ? [row, first + r * w + c]
      : null;
  }
  // How many images a row has.
  get channels() {
    return this.image ? this.numbers.cols / (this.image[0] * this.image[1]) : 1;
  }
  tell() {
    const { norm, spread, shape, frames } = this.numbers,
      k = Math.min(state.frame, norm.length - 1);
    const size = this.grid.key.startsWith('i:') ? '' : `, norm ${shown(norm[k], 3)}, spread ${shown(spread[k], 3)}`; // of places there is none
    this.told.textContent = `${shape.join(' × ') || '1'}${size}${this.numbers.whole ? '' : `; here ${this.numbers.rows} × ${this.numbers.cols} of ${this.numbers.of.join(' × ')}`}`;
  }
  draw() {
    this.tell();
    const top = this.numbers.largest();
    if (this.small) return this.drawTable(top);
    const [width, height] = this.layout(),
      ratio = window.devicePixelRatio || 1,
      canvas = this.canvas;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const paint = canvas.getContext('2d'),
      { rows, cols } = this.numbers,
      values = this.numbers.array();
    paint.scale(ratio, ratio);
    paint.font = '11px system-ui, sans-serif';
    paint.textAlign = 'right';
    for (let r = 0; r < rows; r++)
      for (let c = 0; c < cols; c++) {
        const [x, y, w, h] = this.place(r, c);
        const v = values[r * cols + c],
          rgb = colour(v, top);
        paint.fillStyle = css(rgb);
        paint.fillRect(x, y, w + 0.3, h + 0.3);
        if (this.image || w < 14 || h < 14) continue;
        const text = [2, 1]
          .map((digits) => shown(v, digits))
          .find((one) => paint.measureText(one).width < w - 3);
        if (text) {
          paint.fillStyle = ink(rgb);
          paint.fillText(text, x + w - 3, y + h / 2 + 4);
        }
      }
    this.frameRow(paint);
    const at = state.at && state.at.grid === this.grid ? state.at : null;
    if (at) {
      const [x, y, w, h] = this.place(at.row, at.col);
      paint.lineWidth = 2;
      paint.strokeStyle = palette.ground;
      paint.strokeRect(x - 2, y - 2, w + 4, h + 4);
      paint.strokeStyle = palette.text;
      paint.strokeRect(x - 1, y - 1, w + 2, h + 2);
    }
  }
  // A line around the numbers of the chosen example.
  frameRow(paint) {
    if (/^[pdu]:/.test(this.grid.key) || this.numbers.rows < 2) return;
    const row = this.numbers.rowOfExample(),
      each = this.numbers.cols / this.channels;
    paint.lineWidth = 1.5;
    paint.strokeStyle = palette.text;
    for (let c = 0; c < this.channels; c++) {
      const [x, y, w, h] = this.place(row, c * each),
        [x2, y2] = this.place(row, (c + 1) * each - 1);
      paint.strokeRect(x + 0.75, y + 0.75, x2 - x + w - 1.5, y2 - y + h - 1.5);
    }
  }
  drawTable(top) {
    const values = this.numbers.array(),
      at = state.at && state.at.grid === this.grid ? state.at : null;
    this.cells.forEach((cell, k) => {
      const v = values[k],
        rgb = colour(v, top);
      cell.innerHTML = datum(v, 3);
      cell.style.background = css(rgb);
      cell.style.color = ink(rgb);
      cell.classList.toggle('here', at !== null && at.row * this.numbers.cols + at.col === k);
    });
  }
  go(row, col, aloud) {
    const before = state.at;
    if (!aloud && before && before.grid === this.grid && before.row === row && before.col === col) return;
    this.row = row;
    this.col = col;
    showSum(this.grid, row, col, aloud);
    this.draw();
    if (aloud && !this.small) this.reveal();
    if (before && before.grid !== this.grid) GRIDS[DATA.grids.indexOf(before.grid)].draw();
  }
  key(event) {
    if (event.key === 'Escape') return closeSum();
    if (this.move(event.key)) event.preventDefault();
  }
  // Whether the key, or the button of that name, led to another number.
  move(name) {
    const { rows, cols } = this.numbers,
      across = this.image ? this.image[1] : 1;
    const last = rows * cols - 1,
      moves = {
        ArrowLeft: () => [this.row, this.col - 1],
        ArrowRight: () => [this.row, this.col + 1],
        ArrowUp: () => (this.image ? [this.row, this.col - across] : [this.row - 1, this.col]),
        ArrowDown: () => (this.image ? [this.row, this.col + across] : [this.row + 1, this.col]),
        Home: () => [this.row, 0],
        End: () => [this.row, cols - 1],
        PageUp: () => [this.row - 1, this.col],
        PageDown: () => [this.row + 1, this.col],
      };
    if (!moves[name] || last < 0) return false;
    const [row, col] = moves[name]();
    this.go(Math.max(0, Math.min(rows - 1, row)), Math.max(0, Math.min(cols - 1, col)), true);
    return true;
  }
}
readPalette();
const GRIDS = [...document.querySelectorAll('.grid')].map(
  (element) => new Grid(element, DATA.grids[Number(element.dataset.grid)]),
);

// Only what is in sight is drawn anew at once; the rest when it comes into sight.
const inSight = new Set(),
  due = new Set(GRIDS);
const sight = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const grid = GRIDS[Number(target.dataset.grid)];
      if (!isIntersecting) {
        inSight.delete(grid);
        continue;
      }
      inSight.add(grid);
      if (due.delete(grid)) grid.draw();
    }
  },
  { rootMargin: '300px' },
);
GRIDS.forEach((grid) => sight.observe(grid.element));
function drawGrids() {
  for (const grid of GRIDS)
    if (inSight.has(grid)) grid.draw();
    else due.add(grid);
}
watchers.push(drawGrids);
