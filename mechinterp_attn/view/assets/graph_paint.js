/* One frame of a graph: edges, the chosen node's own edges, nodes, names, and beside them the names of rows and
   columns, which stay in sight wherever the window goes. */
const GRAPH_GUTTER = { left: 66, top: 6, right: 6, bottom: 44 };
const LIT_EDGES = 200; // of the chosen node, the strongest

const plotArea = (width, height) => ({
  left: GRAPH_GUTTER.left, top: GRAPH_GUTTER.top,
  width: Math.max(40, width - GRAPH_GUTTER.left - GRAPH_GUTTER.right), height: Math.max(40, height - GRAPH_GUTTER.top - GRAPH_GUTTER.bottom),
});

function nodeRadius(layout, area, view, node) {
  const slot = Math.min(...scales(layout, area, view.zoom));
  return Math.min(9, Math.max(1.6, 0.5 * slot)) * (0.6 + 0.4 * Math.sqrt(Math.min(1, Math.abs(node.share || 0))));
}

/* Heads are round, MLP-derived ones diamonds, tokens and biases square; a pool has a dot in it. */
function nodeShape(context, node, x, y, r) {
  if (node.kind === "mlp" || node.kind === "feature") {
    context.moveTo(x, y - r - 1);
    context.lineTo(x + r + 1, y);
    context.lineTo(x, y + r + 1);
    context.lineTo(x - r - 1, y);
    context.closePath();
  } else if (node.kind === "attention" || node.kind === "logit") {
    context.moveTo(x + r, y);
    context.arc(x, y, r, 0, 2 * Math.PI);
  } else context.rect(x - r, y - r, 2 * r, 2 * r);
}

/* Names go where no stronger name stands yet; `placed` are boxes already taken. */
function roomFor(taken, x, y, half) {
  if (taken.some((box) => Math.abs(box.y - y) < 12 && Math.abs(box.x - x) < box.half + half)) return false;
  taken.push({ x, y, half });
  return true;
}

function graphPainter(canvas, model, layout) {
  const context = canvas.getContext("2d"), picture = edgePicture(model, layout);
  const strongest = model.nodes.filter((node) => node.row !== null).sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const font = (size, weight = "") => { context.font = `${weight} ${size}px system-ui, sans-serif`; };

  function halo(text, x, y, colours) {
    context.lineWidth = 3;
    context.strokeStyle = colours.panel;
    context.strokeText(text, x, y);
    context.fillStyle = colours.ink;
    context.fillText(text, x, y);
  }

  function ownEdges(at, { chosen, seen, colours }) {
    const own = [...model.into[chosen.i], ...model.outOf[chosen.i]].sort((a, b) => a - b); // strongest first
    for (const e of own.filter((e) => seen(model.nodes[model.source[e]]) && seen(model.nodes[model.target[e]])).slice(0, LIT_EDGES)) {
      context.strokeStyle = model.weight[e] < 0 ? colours.minus : colours.plus;
      context.lineWidth = edgeWidth(model.weight[e], model.biggest);
      context.setLineDash(model.weight[e] < 0 ? [5, 3] : []);
      context.globalAlpha = 0.75;
      strokeEdge(context, at[model.source[e]], at[model.target[e]]);
    }
    context.setLineDash([]);
    context.globalAlpha = 1;
  }

  function nodes(at, { view, area, chosen, pinned, found, near, seen, colours }) {
    for (const node of model.nodes) {
      if (!seen(node)) continue;
      const [x, y] = at[node.i];
      if (x < area.left - 12 || x > area.left + area.width + 12 || y < -12 || y > area.top + area.height + 12) continue;
      const r = nodeRadius(layout, area, view, node);
      context.beginPath();
      nodeShape(context, node, x, y, r);
      context.globalAlpha = near.has(node.i) || found.has(node.i) ? 1 : 0.6;
      context.fillStyle = colours[node.kind] || colours.ink;
      context.fill();
      context.globalAlpha = 1;
      if (node.group === "pool" && r > 3) { context.beginPath(); context.arc(x, y, r / 3, 0, 2 * Math.PI); context.fillStyle = colours.panel; context.fill(); }
      const ring = node === chosen ? colours.ink : pinned.has(node.id) ? colours.link : found.has(node.i) ? colours.ink : null;
      if (!ring) continue;
      context.beginPath();
      context.arc(x, y, r + 3, 0, 2 * Math.PI);
      context.strokeStyle = ring;
      context.lineWidth = node === chosen ? 2.5 : 2;
      context.stroke();
    }
  }

  function names(at, { area, view, chosen, hovered, pinned, found, seen, colours }) {
    font(11);
    context.textAlign = "center";
    const taken = [], first = [chosen, hovered, ...model.nodes.filter((node) => pinned.has(node.id) || found.has(node.i))].filter(Boolean);
    const most = first.length + Math.round(12 * view.zoom);
    for (const node of [...new Set([...first, ...strongest])]) {
      if (taken.length >= most) break;
      const [x, y] = at[node.i];
      if (!seen(node) || x < area.left || x > area.left + area.width || y < area.top || y > area.top + area.height) continue;
      const half = context.measureText(node.label).width / 2 + 2;
      const inX = Math.min(area.left + area.width - half, Math.max(area.left + half, x)), inY = Math.max(area.top + 10, y - nodeRadius(layout, area, view, node) - 5);
      if (roomFor(taken, inX, inY, half)) halo(node.label, inX, inY, colours);
    }
  }

  function gutters({ area, view, colours, width, height }) {
    const [bottom, right] = [area.top + area.height, area.left + area.width];
    context.fillStyle = colours.panel;
    context.fillRect(0, 0, area.left, height);
    context.fillRect(0, bottom, width, height - bottom);
    context.strokeStyle = colours.rule;
    context.lineWidth = 1;
    context.strokeRect(area.left - 0.5, -1, width, bottom + 1.5);
    const [sx] = scales(layout, area, view.zoom);
    context.textAlign = "left";
    context.fillStyle = colours.quiet;
    font(10.5);
    let above = Infinity;
    for (const row of layout.rows) { // from the bottom up: those that fit
      const y = toScreen(layout, area, view, 0, row.y)[1];
      if (y < area.top + 4 || y > bottom - 2 || above - y < 11) continue;
      context.fillText(row.name, 4, y + 4);
      above = y;
    }
    context.textAlign = "center";
    let before = -Infinity;
    for (const column of layout.columns) {
      const x = toScreen(layout, area, view, column.x, 0)[0], room = column.width * sx;
      if (x < area.left || x > right || x - before < 15) continue;
      const text = column.position < 0 ? "bias" : model.tokens[column.position], upright = room < 34;
      context.save();
      context.fillStyle = colours.ink;
      font(11);
      context.translate(x, bottom + 14);
      if (upright) { context.rotate(-Math.PI / 2); context.textAlign = "right"; context.translate(10, 4); }
      context.fillText(shorten(text, upright ? 7 : Math.max(4, Math.floor(room / 7))), 0, 0);
      context.restore();
      if (!upright && column.position >= 0) { context.fillStyle = colours.quiet; font(10); context.fillText(String(column.position), x, bottom + 30); }
      before = x;
    }
  }

  /* Paints a frame; true while edges are still on their way. `scene`: view, width, height, edges and their
     version, chosen and hovered node, ids of pinned ones, places of found and near ones, seen(node), colours. */
  return (scene) => {
    const { width, height, view, colours } = scene;
    const ratio = Math.min(2, globalThis.devicePixelRatio || 1);
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = colours.panel;
    context.fillRect(0, 0, width, height);
    const area = plotArea(width, height), full = { ...scene, area };
    const at = model.nodes.map((node) => toScreen(layout, area, view, layout.x[node.i], layout.y[node.i]));
    context.strokeStyle = colours.line;
    context.lineWidth = 1;
    for (const row of layout.rows) {
      const y = Math.round(toScreen(layout, area, view, 0, row.y)[1]) + 0.5;
      context.beginPath();
      context.moveTo(area.left, y);
      context.lineTo(width, y);
      context.stroke();
    }
    const coming = picture.draw(context, view, area, scene.edges, scene.version, colours);
    ownEdges(at, full);
    nodes(at, full);
    names(at, full);
    gutters(full);
    return coming;
  };
}
