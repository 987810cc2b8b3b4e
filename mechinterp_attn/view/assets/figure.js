/* Figures: what every picture shares. Heatmaps are drawn once, as SVG, for the page and for the file. */
const SCALE = 252, BELOW = 253, ABOVE = 254, NOT_A_NUMBER = 255;
const SVG = "http://www.w3.org/2000/svg";
const MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace", SANS = "system-ui, sans-serif";

function svgEl(name, attributes, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) if (value !== undefined) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/* Colours for codes 0..252, then for what is no such number. With power 1/2 faint weights stay visible. */
function ramp(kind, power) {
  const low = rgb(colour("panel")), high = rgb(colour(kind)), bad = rgb(colour("bad"));
  return Array.from({ length: 256 }, (_, i) => (i <= SCALE ? mix(low, high, (i / SCALE) ** power) : bad));
}

function bitmap(codes, width, height, colours) {
  const canvas = el("canvas", { width, height });
  const image = new ImageData(width, height);
  const packed = new Uint32Array(image.data.buffer), table = Uint32Array.from(colours, ([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r);
  for (let i = 0; i < codes.length; i++) packed[i] = table[codes[i]];
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

const shorten = (text, most) => ([...text].length > most ? [...text].slice(0, most - 1).join("") + "…" : text);

/* A heatmap with its axes and its colour scale. Cells are one image, stretched; the names that fit stand
   beside it. `move(row, column)` puts the frames; `onpoint(row, column)` hears of pointer and arrow keys. */
function heatmap({ rows, columns, axes, top, power, width, label, onpoint, onleave, rowFrame }) {
  const [n, m] = [rows.length, columns.length];
  const longest = (names) => Math.min(11, names.reduce((most, name) => Math.max(most, [...name].length), 0));
  const left = 26 + 6.4 * longest(rows), over = 24 + 6.4 * longest(columns);
  const cell = Math.min(52, (width - left - 8) / m), [w, h] = [cell * m, cell * n];
  const [totalWidth, totalHeight] = [Math.max(left + w + 8, 240), over + h + 44];
  const every = Math.ceil(12 / cell); // names that would overlap are left out
  const image = svgEl("image", { x: left, y: over, width: w, height: h, preserveAspectRatio: "none" });
  const text = (content, attributes) => svgEl("text", { "font-family": MONO, "font-size": 10.5, "xml:space": "preserve", class: "ink", ...attributes }, content);
  const names = svgEl("g", { "aria-hidden": "true" });
  rows.forEach((name, q) => {
    if (q % every === 0) names.append(text(shorten(name, 11), { x: left - 5, y: over + (q + 0.5) * cell + 3.5, "text-anchor": "end" }));
  });
  columns.forEach((name, k) => {
    const [x, y] = [left + (k + 0.5) * cell + 3.5, over - 5];
    if (k % every === 0 || k === m - 1 && name === "⟨bias⟩") names.append(text(shorten(name, 11), { x, y, transform: `rotate(-90 ${x} ${y})` }));
  });
  names.append(
    text(axes[0], { x: 11, y: over + h / 2, "text-anchor": "middle", class: "quiet", "font-family": SANS, "font-size": 11, transform: `rotate(-90 11 ${over + h / 2})` }),
    text(axes[1], { x: left + w / 2, y: 11, "text-anchor": "middle", class: "quiet", "font-family": SANS, "font-size": 11 }));
  const lines = svgEl("path", { class: "cells", d: cell < 9 ? "" :
    rows.slice(1).map((_, q) => `M${left},${over + (q + 1) * cell}h${w}`).join("") + columns.slice(1).map((_, k) => `M${left + (k + 1) * cell},${over}v${h}`).join("") });
  const marks = svgEl("g", { "aria-hidden": "true" }), key = svgEl("g", { "aria-hidden": "true" });
  const across = svgEl("rect", { class: "frame", x: left, width: w, height: Math.max(cell, 2), visibility: "hidden" });
  const one = svgEl("rect", { class: "frame", width: Math.max(cell, 3), height: Math.max(cell, 3), visibility: "hidden" });
  const svg = svgEl("svg", { viewBox: `0 0 ${totalWidth} ${totalHeight}`, class: "heatmap", role: "application", tabindex: 0,
    "aria-roledescription": "heatmap, arrow keys move" },
    svgEl("title", {}, label), image, lines, svgEl("rect", { class: "edge", x: left, y: over, width: w, height: h }), names, marks, key, across, one);
  svg.style.maxWidth = totalWidth + "px";
  const it = { svg, at: [0, 0] };

  it.name = (text) => { svg.setAttribute("aria-label", text); svg.querySelector("title").textContent = text; };
  it.name(label);
  it.paint = (codes, colours, blank) => {
    const shades = blank ? colours.with(NOT_A_NUMBER, rgb(colour("tint"))) : colours;
    image.setAttribute("href", bitmap(codes, m, n, shades).toDataURL());
    const odd = [];
    codes.forEach((c, i) => { if (c > SCALE && !(blank && c === NOT_A_NUMBER) && odd.length < 2000) odd.push([c, i]); });
    marks.replaceChildren(...odd.map(([c, i]) => text(c === NOT_A_NUMBER ? "×" : c === ABOVE ? "+" : "−", {
      class: "odd", x: left + ((i % m) + 0.5) * cell, y: over + (Math.floor(i / m) + 0.8) * cell, "text-anchor": "middle", "font-size": 0.85 * cell })));
    const y = over + h + 14, step = 5;
    key.replaceChildren(
      ...Array.from({ length: 24 }, (_, i) => svgEl("rect", { x: left + i * step, y, width: step + 0.3, height: 9, fill: `rgb(${colours[Math.round((i / 23) ** (1 / power) * SCALE)]})` })),
      svgEl("rect", { class: "edge", x: left, y, width: 24 * step, height: 9 }),
      ...[0, 0.25, 1].map((t) => text(formatNumber(t * top), { x: left + 24 * step * t ** power, y: y + 22, "text-anchor": t ? "middle" : "start", class: "quiet", "font-size": 10 })));
  };
  it.move = (q, k) => {
    it.at = [q, k === null ? it.at[1] : k];
    across.setAttribute("visibility", rowFrame ? "visible" : "hidden");
    across.setAttribute("y", over + q * cell);
    one.setAttribute("visibility", k === null ? "hidden" : "visible");
    if (k !== null) { one.setAttribute("x", left + k * cell); one.setAttribute("y", over + q * cell); }
  };
  const clamp = (x, most) => Math.max(0, Math.min(most - 1, Math.floor(x)));
  svg.addEventListener("pointermove", (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const [q, k] = [(point.y - over) / cell, (point.x - left) / cell];
    if (q >= 0 && k >= 0 && q < n && k < m) onpoint(clamp(q, n), clamp(k, m));
  });
  svg.addEventListener("pointerleave", () => onleave());
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0], Home: [0, -m], End: [0, m], PageUp: [-n, 0], PageDown: [n, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    onpoint(clamp(it.at[0] + step[0], n), clamp(it.at[1] + step[1], m));
  });
  return it;
}

/* An SVG of the page as a file of its own: colours written in, on the page's ground. */
const WRITTEN = ["image-rendering", "fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "display", "visibility", "paint-order", "font-size", "font-family", "font-weight", "text-anchor"];
function standalone(picture) {
  const copy = picture.cloneNode(true);
  const [from, to] = [picture, copy].map((svg) => [svg, ...svg.querySelectorAll("*")]);
  from.forEach((node, i) => {
    const style = getComputedStyle(node);
    for (const name of WRITTEN) to[i].setAttribute(name, style.getPropertyValue(name));
  });
  const { width, height } = picture.viewBox.baseVal;
  for (const name of ["class", "tabindex", "role", "style"]) copy.removeAttribute(name);
  copy.setAttribute("xmlns", SVG);
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.prepend(svgEl("rect", { width, height, fill: colour("panel") }));
  return { text: new XMLSerializer().serializeToString(copy), width, height };
}

/* A PNG waits for nothing but the load of its own image. `decode` waits for a frame and `toBlob` for an idle
   moment: a busy or covered page has neither, and a download that comes late counts as nobody's click. */
async function toPng({ text, width, height }) {
  const image = new Image();
  await new Promise((done, failed) => {
    image.onload = done;
    image.onerror = () => failed(new Error("the picture cannot be read"));
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
  });
  const scale = Math.min(2, 8192 / Math.max(width, height));
  const canvas = el("canvas", { width: Math.round(scale * width), height: Math.round(scale * height) });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  const bytes = atob(canvas.toDataURL("image/png").split(",")[1]);
  return new Blob([Uint8Array.from(bytes, (c) => c.charCodeAt(0))], { type: "image/png" });
}

/* The buttons below a picture: SVG, PNG, and the numbers where they are not in a table of the page.
   `picture` is an SVG of the page, or makes a file of its own. */
function figureTools(name, caption, picture, csv) {
  const drawn = () => (typeof picture === "function" ? picture() : standalone(picture));
  const said = el("span", { class: "quiet", role: "status" });
  const button = (kind, make) => el("button", { type: "button", class: "plain", "aria-label": `Download as ${kind}: ${caption()}`, onclick: async () => {
    said.textContent = "";
    try {
      const file = name() + "." + kind.toLowerCase(); // as things are at the click
      download(file, await make());
    } catch (error) {
      said.textContent = `No ${kind} could be made: ${error.message}`;
    }
  } }, kind);
  const file = (text, type) => new Blob([text], { type });
  return el("div", { class: "tools" },
    button("SVG", () => file(drawn().text, "image/svg+xml")),
    button("PNG", () => toPng(drawn())),
    csv ? button("CSV", () => file(csv(), "text/csv")) : null,
    said);
}
