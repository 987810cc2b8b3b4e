"use strict";
// An attribution graph: tokens across, layers up, the target on top. Needs nothing but the DOM.
// Text from the model only ever becomes textContent or an attribute value.
function drawAttributionGraph(host, data) {
  const SVG = "http://www.w3.org/2000/svg";
  const SLOT = 17, PAD = 8, ROW = 46, LEFT = 64, ACROSS = 5, NAMES = 12;
  const byId = new Map(data.nodes.map((n) => [n.id, n]));
  const drawn = data.nodes.filter((n) => n.kind !== "score");
  const edges = data.edges.filter((e) => e.kind === "value" && byId.has(e.source) && byId.has(e.target));
  const biggest = Math.max(1e-12, ...edges.map((e) => Math.abs(e.weight)));
  let chosen = "logit";

  function make(tag, attributes, parent, text) {
    const svg = ["svg", "g", "path", "circle", "rect", "text", "line", "title", "polygon"].includes(tag);
    const el = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) el.setAttribute(name, value);
    if (text !== undefined) el.textContent = text;
    if (parent) parent.appendChild(el);
    return el;
  }
  const fixed = (x, d) => (x === null || x === undefined ? "" : Number(x).toFixed(d));
  const signed = (x) => (x < 0 ? "\u2212" : "+") + Math.abs(x).toFixed(3);

  // Where everything stands: one column per position, one row per sublayer that has nodes.
  const rowKey = (n) => (n.kind === "token" || n.kind === "bias" ? -1 : n.kind === "logit" ? 1e9 : n.row);
  const rows = [...new Set(drawn.map(rowKey))].sort((a, b) => a - b);
  const column = (n) => (n.kind === "bias" ? -1 : n.position);
  const cells = new Map();
  for (const n of drawn) {
    const key = column(n) + ":" + rowKey(n);
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(n);
  }
  const columns = [-1, ...data.columns]; // positions; long prompts show those that matter
  const wide = new Map(columns.map((c) => [c, 34]));
  for (const [key, list] of cells) {
    const c = Number(key.split(":")[0]);
    wide.set(c, Math.max(wide.get(c), Math.min(list.length, ACROSS) * SLOT + 2 * PAD));
  }
  const x0 = new Map();
  let x = LEFT;
  for (const c of columns) { x0.set(c, x); x += wide.get(c); }
  const tall = rows.map((r) => {
    const most = Math.max(1, ...[...cells].filter(([k]) => Number(k.split(":")[1]) === r).map(([, l]) => l.length));
    return ROW + (Math.ceil(most / ACROSS) - 1) * SLOT;
  });
  const height = tall.reduce((a, b) => a + b, 0) + 70;
  const y0 = new Map();
  let y = height - 40;
  rows.forEach((r, i) => { y -= tall[i]; y0.set(r, y + tall[i] - ROW / 2); });
  for (const [key, list] of cells) {
    const [c, r] = key.split(":").map(Number);
    list.forEach((n, i) => {
      const line = Math.floor(i / ACROSS), inLine = Math.min(ACROSS, list.length - line * ACROSS);
      n.x = x0.get(c) + wide.get(c) / 2 + ((i % ACROSS) - (inLine - 1) / 2) * SLOT;
      n.y = y0.get(r) - line * SLOT;
    });
  }

  host.classList.add("attribution-graph");
  const bar = make("div", { class: "graph-bar" }, host);
  const label = make("label", {}, bar, "Hide edges below ");
  const slider = make("input", { type: "range", min: "0", max: "100", value: "0", "aria-label": "smallest edge shown" }, label);
  const shownAt = make("span", {}, label, "");
  const finder = make("label", {}, bar, "Find ");
  const search = make("input", { type: "search", placeholder: "such as L1H3", "aria-label": "find a node" }, finder);
  const matches = make("span", { role: "status" }, finder, "");
  make("span", { class: "graph-key" }, bar, "\u25cf attention head  \u25c6 MLP-derived head  \u25a0 token or bias; blue adds, red and dashed takes away; arrow keys walk");
  const stage = make("div", { class: "graph-stage" }, host);
  const scroll = make("div", { class: "graph-scroll" }, stage);
  const svg = make("svg", { width: x + 20, height, viewBox: `0 0 ${x + 20} ${height}`, role: "group", "aria-label": data.title }, scroll);
  const panel = make("div", { class: "graph-panel", "aria-live": "polite" }, stage);

  rows.forEach((r) => {
    const name = r === -1 ? "tokens" : r === 1e9 ? "target" : data.rows[String(r)];
    make("text", { x: 4, y: y0.get(r) + 4, class: "graph-row" }, svg, name);
    make("line", { x1: LEFT, x2: x, y1: y0.get(r), y2: y0.get(r), class: "graph-line" }, svg);
  });
  for (const c of columns) {
    const text = c === -1 ? "bias" : data.tokens[c];
    const most = Math.max(5, Math.floor(wide.get(c) / 7)); // characters that fit the column
    const short = text.length > most ? text.slice(0, most - 1) + "\u2026" : text;
    const t = make("text", { x: x0.get(c) + wide.get(c) / 2, y: height - 22, class: "graph-token" }, svg, short);
    make("title", {}, t, c === -1 ? "biases" : `${text} (position ${c})`);
    if (c >= 0) make("text", { x: x0.get(c) + wide.get(c) / 2, y: height - 8, class: "graph-row middle" }, svg, String(c));
  }

  const edgeLayer = make("g", {}, svg);
  for (const e of edges) {
    const a = byId.get(e.source), b = byId.get(e.target);
    const my = (a.y + b.y) / 2;
    e.el = make("path", {
      d: `M${a.x},${a.y}C${a.x},${my} ${b.x},${my} ${b.x},${b.y}`,
      class: "graph-edge " + (e.weight < 0 ? "minus" : "plus"),
      "stroke-width": 0.4 + 5 * Math.sqrt(Math.abs(e.weight) / biggest),
    }, edgeLayer);
  }
  for (const n of drawn) {
    const g = make("g", { class: "graph-node " + n.kind, tabindex: "-1", role: "button", "aria-label": `${n.label}, ${signed(n.value)}` }, svg);
    const s = 3.5 + 5 * Math.sqrt(Math.min(1, Math.abs(n.share || 0)));
    if (n.kind === "mlp") make("polygon", { points: `${n.x},${n.y - s - 1} ${n.x + s + 1},${n.y} ${n.x},${n.y + s + 1} ${n.x - s - 1},${n.y}` }, g);
    else if (n.kind === "attention" || n.kind === "logit") make("circle", { cx: n.x, cy: n.y, r: s }, g);
    else make("rect", { x: n.x - s, y: n.y - s, width: 2 * s, height: 2 * s }, g);
    make("title", {}, g, `${n.label}  ${signed(n.value)}`);
    n.el = g;
    g.addEventListener("click", () => select(n.id));
    g.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); select(n.id); }
      const way = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
      if (!way) return;
      event.preventDefault();
      const next = nearest(n, way);
      if (next) { select(next.id); next.el.focus(); }
    });
  }
  // Names on the strongest nodes, where no stronger name stands yet; they are in the file that is saved too.
  const named = [];
  const heads = drawn.filter((n) => n.kind === "attention" || n.kind === "mlp");
  for (const n of heads.sort((a, b) => Math.abs(b.value) - Math.abs(a.value))) {
    if (named.length >= NAMES) break;
    const half = 3.2 * n.label.length;
    if (named.some((m) => Math.abs(m.y - n.y) < 12 && Math.abs(m.x - n.x) < m.half + half)) continue;
    named.push({ x: n.x, y: n.y, half });
    make("text", { x: n.x, y: n.y - 12, class: "graph-name" }, svg, n.label);
  }
  search.addEventListener("input", () => {
    const wanted = search.value.trim().toLowerCase();
    const found = wanted === "" ? [] : drawn.filter((n) => n.label.toLowerCase().includes(wanted));
    for (const n of drawn) n.el.classList.toggle("found", found.includes(n));
    matches.textContent = wanted === "" ? "" : ` ${found.length} found`;
    if (found.length) select(found.find((n) => n.label.toLowerCase() === wanted)?.id || found[0].id);
  });
  // The closest node that way; what stands off the line counts three times as far.
  function nearest(n, [right, down]) {
    let best = null, least = Infinity;
    for (const m of drawn) {
      const [dx, dy] = [m.x - n.x, m.y - n.y];
      const along = dx * right + dy * down, off = Math.abs(right ? dy : dx);
      if (along > 0.5 && along + 3 * off < least) { least = along + 3 * off; best = m; }
    }
    return best;
  }

  function list(title, found, other) {
    if (!found.length) return;
    make("h4", {}, panel, title);
    const ul = make("ul", {}, panel);
    found.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
    for (const e of found.slice(0, 14)) {
      const n = byId.get(e[other]);
      const li = make("li", {}, ul);
      make("span", { class: "graph-weight " + (e.weight < 0 ? "minus" : "plus") }, li, signed(e.weight));
      const b = make("button", { type: "button" }, li, place(n));
      b.addEventListener("click", () => select(n.kind === "score" ? n.head : n.id));
    }
    if (found.length > 14) make("li", { class: "graph-more" }, ul, `and ${found.length - 14} more`);
  }
  function place(n) {
    if (n.kind === "token") return `${n.label} (${n.position})`;
    return n.kind === "attention" || n.kind === "mlp" ? `${n.label} at ${data.tokens[n.position]} (${n.position})` : n.label;
  }
  function select(id) {
    chosen = id;
    const n = byId.get(id);
    panel.textContent = "";
    make("h3", {}, panel, place(n));
    const share = n.share === null ? "" : ` \u00b7 ${(100 * n.share).toFixed(1)} % of the target`;
    make("p", {}, panel, `${signed(n.value)} logits over all paths${share}`);
    list("comes in from", edges.filter((e) => e.target === id), "source");
    if (Math.abs(n.rest || 0) > 1e-9) make("p", { class: "graph-more" }, panel, `${signed(n.rest)} from what is not drawn`);
    list("goes out to", edges.filter((e) => e.source === id), "target");
    for (const s of data.nodes.filter((m) => m.kind === "score" && m.head === id)) {
      make("h4", {}, panel, `${s.label}: score ${signed(s.value)} over its other keys`);
      list("moved by, on the query side", data.edges.filter((e) => e.target === s.id && e.kind === "query"), "source");
      list("moved by, on the key side", data.edges.filter((e) => e.target === s.id && e.kind === "key"), "source");
    }
    paint();
    const away = n.x - scroll.scrollLeft;
    if (away < 0 || away > scroll.clientWidth) scroll.scrollLeft = n.x - scroll.clientWidth / 2; // into sight
  }
  function paint() {
    const floor = biggest * (Number(slider.value) / 100) ** 2;
    shownAt.textContent = ` ${fixed(floor, 3)}`;
    const near = new Set([chosen]);
    for (const e of edges) {
      const touches = e.source === chosen || e.target === chosen;
      if (touches) { near.add(e.source); near.add(e.target); }
      e.el.classList.toggle("lit", touches);
      e.el.classList.toggle("hidden", Math.abs(e.weight) < floor && !touches);
    }
    for (const n of drawn) {
      n.el.classList.toggle("chosen", n.id === chosen);
      n.el.classList.toggle("near", near.has(n.id));
      n.el.setAttribute("tabindex", n.id === chosen ? "0" : "-1"); // one stop for the tab key; arrows go on
    }
  }
  slider.addEventListener("input", paint);
  select("logit");
}
