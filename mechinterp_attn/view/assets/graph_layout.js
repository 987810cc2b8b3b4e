/* Where the nodes of a graph stand, and the window through which they are seen. Units: one node is one wide. */
const GRAPH_ACROSS = 8, GRAPH_GAP = 1.6; // nodes side by side in a cell; between columns and rows

/* One column per position, one row per sublayer that has nodes; nodes of one cell stand side by side. */
function graphLayout(model) {
  const rowOf = (node) => (node.kind === "logit" ? Infinity : node.row === null ? -1 : node.row);
  const columnOf = (node) => (node.kind === "bias" ? -1 : node.position);
  const rows = [...new Set(model.nodes.map(rowOf))].sort((a, b) => a - b);
  const columns = [...new Set([...model.nodes.map(columnOf), ...model.columns])].sort((a, b) => a - b);
  const cells = new Map();
  for (const node of model.nodes) {
    const key = `${columnOf(node)}:${rowOf(node)}`;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(node);
  }
  const wide = new Map(columns.map((c) => [c, 1])), tall = new Map(rows.map((r) => [r, 1]));
  for (const list of cells.values()) {
    const [c, r] = [columnOf(list[0]), rowOf(list[0])];
    wide.set(c, Math.max(wide.get(c), Math.min(list.length, GRAPH_ACROSS)));
    tall.set(r, Math.max(tall.get(r), Math.ceil(list.length / GRAPH_ACROSS)));
  }
  const along = (keys, size) => {
    let end = 0;
    return new Map(keys.map((key) => { const start = end; end += size.get(key) + GRAPH_GAP; return [key, start]; }));
  };
  const x0 = along(columns, wide), y0 = along([...rows].reverse(), tall); // the target on top
  const x = new Float64Array(model.nodes.length), y = new Float64Array(model.nodes.length);
  for (const list of cells.values()) {
    const [c, r] = [columnOf(list[0]), rowOf(list[0])];
    list.sort((a, b) => (b.influence || 0) - (a.influence || 0)).forEach((node, k) => { // the strongest first
      const line = Math.floor(k / GRAPH_ACROSS), inLine = Math.min(GRAPH_ACROSS, list.length - line * GRAPH_ACROSS);
      x[node.i] = x0.get(c) + (wide.get(c) + GRAPH_GAP - inLine + 1) / 2 + (k % GRAPH_ACROSS);
      y[node.i] = y0.get(r) + (GRAPH_GAP + 1) / 2 + line;
    });
  }
  const sum = (sizes) => [...sizes.values()].reduce((a, b) => a + b + GRAPH_GAP, 0);
  const rowName = (r) => (r === -1 ? "tokens" : r === Infinity ? "target" : model.rows[String(r)]);
  return {
    x, y, width: sum(wide), height: sum(tall),
    rows: rows.map((r) => ({ name: rowName(r), y: y0.get(r) + (GRAPH_GAP + tall.get(r)) / 2, height: tall.get(r) + GRAPH_GAP })),
    columns: columns.map((c) => ({ position: c, x: x0.get(c) + (GRAPH_GAP + wide.get(c)) / 2, width: wide.get(c) + GRAPH_GAP })),
  };
}

/* A window is what is looked at: the point in its middle, and how much larger than the whole graph it shows.
   `area` is the place on the screen that it fills, in pixels. Either axis fits by itself. */
const wholeGraph = (layout) => ({ x: layout.width / 2, y: layout.height / 2, zoom: 1 });

function scales(layout, area, zoom) {
  const fit = (length, pixels) => Math.min(pixels / length, 44);
  return [fit(layout.width, area.width) * zoom, fit(layout.height, area.height) * zoom];
}

function clampWindow(layout, area, { x, y, zoom }) {
  const most = Math.max(1, 48 / Math.min(...scales(layout, area, 1)));
  zoom = Math.min(most, Math.max(1, zoom));
  const [sx, sy] = scales(layout, area, zoom);
  const inside = (at, length, half) => (2 * half >= length ? length / 2 : Math.min(length - half, Math.max(half, at)));
  return { x: inside(x, layout.width, area.width / 2 / sx), y: inside(y, layout.height, area.height / 2 / sy), zoom };
}

const toScreen = (layout, area, view, x, y) => {
  const [sx, sy] = scales(layout, area, view.zoom);
  return [area.left + area.width / 2 + (x - view.x) * sx, area.top + area.height / 2 + (y - view.y) * sy];
};

/* Zoom so that the point under the pointer stays under it. */
function zoomed(layout, area, view, factor, px, py) {
  const [sx, sy] = scales(layout, area, view.zoom);
  const [dx, dy] = [px - area.left - area.width / 2, py - area.top - area.height / 2];
  const at = { x: view.x + dx / sx, y: view.y + dy / sy };
  const { zoom } = clampWindow(layout, area, { ...view, zoom: view.zoom * factor });
  const by = view.zoom / zoom;
  return clampWindow(layout, area, { x: at.x - (dx / sx) * by, y: at.y - (dy / sy) * by, zoom });
}

function panned(layout, area, view, dx, dy) {
  const [sx, sy] = scales(layout, area, view.zoom);
  return clampWindow(layout, area, { x: view.x - dx / sx, y: view.y - dy / sy, zoom: view.zoom });
}

/* The window moves just so far that a node stands in it, a little off the edge. */
function intoSight(layout, area, view, node) {
  const [px, py] = toScreen(layout, area, view, layout.x[node.i], layout.y[node.i]);
  const off = (at, start, length) => Math.min(0, at - start - 24) + Math.max(0, at - start - length + 24);
  const [dx, dy] = [off(px, area.left, area.width), off(py, area.top, area.height)];
  return dx || dy ? panned(layout, area, view, -dx, -dy) : view;
}

/* The node at a place on the screen, among some, not further than `reach` pixels. */
function nodeAt(layout, area, view, nodes, px, py, reach = 14) {
  let best = null, least = reach ** 2;
  for (const node of nodes) {
    const [x, y] = toScreen(layout, area, view, layout.x[node.i], layout.y[node.i]);
    const far = (x - px) ** 2 + (y - py) ** 2;
    if (far <= least) { least = far; best = node; }
  }
  return best;
}

/* The closest node in a direction; what stands off the line counts three times as far. */
function nextNode(layout, nodes, from, [right, down]) {
  let best = null, least = Infinity;
  for (const node of nodes) {
    const [dx, dy] = [layout.x[node.i] - layout.x[from.i], layout.y[node.i] - layout.y[from.i]];
    const along = dx * right + dy * down, off = Math.abs(right ? dy : dx);
    if (along > 0.4 && along + 3 * off < least) { least = along + 3 * off; best = node; }
  }
  return best;
}
