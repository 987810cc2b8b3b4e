/* Heatmaps of pairs: rows against columns; pairs that do not exist are left blank. */
async function drawMatrix(host, block) {
  const codes = await inflate(block.values);
  const m = block.columns.length;
  const value = (c) => (c === NOT_A_NUMBER ? null : (c / SCALE) * block.top);
  const readout = el("p", { class: "readout", "aria-live": "polite" });
  const rest = () => { readout.textContent = `Point at a cell, or walk with the arrow keys. The darkest cell is ${formatNumber(block.top)}.`; };
  const view = heatmap({
    rows: block.rows, columns: block.columns, axes: block.axes, top: block.top, power: 1, width: Math.max(300, Math.min(720, 90 + 26 * m)),
    label: `${block.caption}; the table beside it lists the strongest pairs`,
    onpoint: (q, k) => {
      view.move(q, k);
      const found = value(codes[q * m + k]);
      readout.replaceChildren(el("span", { class: "head" }, `${block.rows[q]} → ${block.columns[k]}`), ": ",
        el("strong", {}, found === null ? "does not compose" : formatNumber(found)));
    },
    onleave: rest,
  });
  const csv = () => toCsv(["", ...block.columns], block.rows.map((name, q) => [name, ...Array.from(codes.subarray(q * m, (q + 1) * m), (c) => value(c)?.toPrecision(3))]));
  const paint = () => view.paint(codes, ramp("attention", 1), true);
  rest();
  paint();
  host.append(el("p", { class: "caption" }, block.caption), view.svg, figureTools(() => block.id, () => block.caption, view.svg, csv), readout);
  onColours(paint);
  host.dataset.ready = "";
}
