/* Heatmaps of pairs: rows against columns; pairs that do not exist are left blank. */
async function drawMatrix(host, block) {
  const codes = await inflate(block.values);
  const [n, m] = [block.rows.length, block.columns.length];
  const cell = Math.min(56, Math.max(3, Math.floor(720 / Math.max(n, m))));
  const names = cell >= 16; // room for labels
  const margin = names ? 64 : 8;
  const canvas = el("canvas", { class: "matrix-picture", role: "img", width: margin + cell * m, height: margin + cell * n,
    "aria-label": `${block.caption}; the table below lists the strongest pairs` });
  const readout = el("p", { class: "readout", "aria-live": "polite" });
  const rest = `Point at a cell: rows are the ${block.axes[0]}, columns the ${block.axes[1]}. The darkest cell is ${formatNumber(block.top)}.`;

  function paint() {
    const context = canvas.getContext("2d"), colours = ramp("attention");
    context.fillStyle = colour("panel");
    context.fillRect(0, 0, canvas.width, canvas.height);
    codes.forEach((c, i) => {
      const exists = c !== NOT_A_NUMBER;
      context.fillStyle = exists ? `rgb(${mix(colours[0], colours[SCALE], Math.min(c, SCALE) / SCALE)})` : colour("tint");
      const gap = cell >= 8 ? 1 : 0;
      context.fillRect(margin + (i % m) * cell, margin + Math.floor(i / m) * cell, cell - gap, cell - gap);
    });
    if (!names) return;
    context.fillStyle = colour("ink");
    context.font = "12px ui-monospace, monospace";
    context.textBaseline = "middle";
    context.textAlign = "right";
    block.rows.forEach((name, q) => context.fillText(name, margin - 6, margin + (q + 0.5) * cell, margin - 8));
    context.textAlign = "left";
    block.columns.forEach((name, k) => {
      context.save();
      context.translate(margin + (k + 0.5) * cell, margin - 6);
      context.rotate(-Math.PI / 2);
      context.fillText(name, 0, 0, margin - 8);
      context.restore();
    });
  }

  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
    const q = Math.floor(((event.clientY - box.top) * scale - margin) / cell);
    const k = Math.floor(((event.clientX - box.left) * scale - margin) / cell);
    if (q < 0 || k < 0 || q >= n || k >= m) return;
    const c = codes[q * m + k];
    const value = c === NOT_A_NUMBER ? "does not compose" : formatNumber((c / SCALE) * block.top);
    readout.replaceChildren(el("span", { class: "head" }, `${block.rows[q]} → ${block.columns[k]}`), ": ", el("strong", {}, value));
  });
  canvas.addEventListener("pointerleave", () => { readout.textContent = rest; });
  readout.textContent = rest;
  host.append(el("p", { class: "caption" }, block.caption), canvas, readout,
    el("div", { class: "tools" }, el("button", { type: "button", class: "plain", "aria-label": "Download as PNG: " + block.caption,
      onclick: () => canvas.toBlob((blob) => download(block.id + ".png", blob)) }, "PNG")));
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
}
