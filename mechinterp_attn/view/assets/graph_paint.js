/* What is painted of a graph: edges, the chosen node's own edges, nodes and names, as one picture; beside it the
   names of rows and columns, which stay in sight wherever the window goes. */
const GRAPH_GUTTER = { left: 66, top: 6, right: 6, bottom: 44 };
const LIT_EDGES = 200; // of the chosen node, the strongest
const MOST_NAMES = 60;

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

const edgeWidth = (weight, biggest) => 0.5 + 4.5 * Math.sqrt(Math.abs(weight) / biggest);

function strokeEdge(context, [ax, ay], [bx, by]) {
  const middle = (ay + by) / 2;
  context.beginPath();
  context.moveTo(ax, ay);
  context.bezierCurveTo(ax, middle, bx, middle, bx, by);
  context.stroke();
}

/* Names go where no stronger name stands yet; `placed` are boxes already taken. */
function roomFor(taken, x, y, half) {
  if (taken.some((box) => Math.abs(box.y - y) < 12 && Math.abs(box.x - x) < box.half + half)) return false;
  taken.push({ x, y, half });
  return true;
}

/* The painter of the picture; see scenePicture. `scene`: view, edges to draw, the chosen node, ids of pinned ones,
   places of found and near ones, seen(node), colours. */
function graphScene(model, layout) {
  const strongest = model.nodes.filter((node) => node.row !== null).sort((a, b) => Math.abs(b.value) - Math.abs(a.value));

  function* edges(context, at, list, { colours }, alpha, width, height) {
    for (const e of list) {
      const [from, to] = [at[model.source[e]], at[model.target[e]]];
      if (Math.max(from[0], to[0]) < 0 || Math.min(from[0], to[0]) > width || Math.max(from[1], to[1]) < 0 || Math.min(from[1], to[1]) > height) continue;
      context.globalAlpha = alpha;
      context.strokeStyle = model.weight[e] < 0 ? colours.minus : colours.plus;
      context.lineWidth = edgeWidth(model.weight[e], model.biggest);
      context.setLineDash(model.weight[e] < 0 && context.lineWidth > 1 ? [5, 3] : []);
      strokeEdge(context, from, to);
      yield;
    }
    context.globalAlpha = 1;
    context.setLineDash([]);
  }

  function* nodes(context, at, { view, chosen, pinned, found, near, seen, colours }, area) {
    for (const node of model.nodes) {
      if (!seen(node)) continue;
      const [x, y] = at[node.i], r = nodeRadius(layout, area, view, node);
      context.beginPath();
      nodeShape(context, node, x, y, r);
      context.globalAlpha = near.has(node.i) || found.has(node.i) ? 1 : 0.6;
      context.fillStyle = colours[node.kind] || colours.ink;
      context.fill();
      context.globalAlpha = 1;
      if (node.group === "pool" && r > 3) { context.beginPath(); context.arc(x, y, r / 3, 0, 2 * Math.PI); context.fillStyle = colours.panel; context.fill(); }
      const ring = node === chosen || found.has(node.i) ? colours.ink : pinned.has(node.id) ? colours.link : null;
      if (ring) {
        context.beginPath();
        context.arc(x, y, r + 3, 0, 2 * Math.PI);
        context.strokeStyle = ring;
        context.lineWidth = node === chosen ? 2.5 : 2;
        context.stroke();
      }
      yield;
    }
  }

  function* names(context, at, { view, chosen, pinned, found, seen, colours }, area) {
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "center";
    const taken = [], first = [chosen, ...model.nodes.filter((node) => pinned.has(node.id) || found.has(node.i))];
    const most = Math.min(MOST_NAMES, first.length + Math.round(12 * view.zoom));
    const [left, top] = toScreen(layout, area, view, 0, 0), [right] = toScreen(layout, area, view, layout.width, 0);
    for (const node of new Set([...first, ...strongest])) {
      if (taken.length >= most) return;
      if (!seen(node)) continue;
      const half = context.measureText(node.label).width / 2 + 2, [x, y] = at[node.i];
      const inX = Math.min(right - half, Math.max(left + half, x)), away = nodeRadius(layout, area, view, node) + 5;
      const inY = y - away - 9 < top ? y + away + 8 : y - away; // below it where there is no room above
      if (roomFor(taken, inX, inY, half)) nameWithHalo(context, node.label, inX, inY, colours);
      for (let i = 0; i < 5; i++) yield; // letters cost more than a stroke
    }
  }

  return function* paintScene([below, above], scene, area, width, height) {
    const at = model.nodes.map((node) => toScreen(layout, area, scene.view, layout.x[node.i], layout.y[node.i]));
    const own = [...model.into[scene.chosen.i], ...model.outOf[scene.chosen.i]].sort((a, b) => a - b); // strongest first
    const lit = own.filter((e) => scene.seen(model.nodes[model.source[e]]) && scene.seen(model.nodes[model.target[e]]));
    below.strokeStyle = scene.colours.line;
    for (const row of layout.rows) {
      const y = Math.round(toScreen(layout, area, scene.view, 0, row.y)[1]) + 0.5;
      below.beginPath();
      below.moveTo(0, y);
      below.lineTo(width, y);
      below.stroke();
    }
    yield* edges(above, at, lit.slice(0, LIT_EDGES), scene, 0.75, width, height);
    yield* nodes(above, at, scene, area);
    yield* names(above, at, scene, area);
    yield true;
    yield* edges(below, at, scene.edges, scene, 0.16, width, height);
  };
}

function nameWithHalo(context, text, x, y, colours) {
  context.lineWidth = 3;
  context.strokeStyle = colours.panel;
  context.strokeText(text, x, y);
  context.fillStyle = colours.ink;
  context.fillText(text, x, y);
}

/* The names of rows on the left and of tokens below: those that fit. */
function paintGutters(context, model, layout, { view, colours, width, height }, area) {
  const [bottom, right] = [area.top + area.height, area.left + area.width];
  context.fillStyle = colours.panel;
  context.fillRect(0, 0, area.left, height);
  context.fillRect(0, bottom, width, height - bottom);
  context.strokeStyle = colours.rule;
  context.lineWidth = 1;
  context.strokeRect(area.left - 0.5, -1, width, bottom + 1.5);
  const [sx, sy] = scales(layout, area, view.zoom);
  /* In the middle of a row or column, or of what is seen of it; null where nothing is. */
  const within = (at, size, from, to) => {
    const [start, end] = [Math.max(from, at - size / 2), Math.min(to, at + size / 2)];
    return end - start < Math.min(size, 16) / 2 ? null : Math.min(end - 5, Math.max(start + 5, at));
  };
  context.textAlign = "left";
  context.fillStyle = colours.quiet;
  context.font = "10.5px system-ui, sans-serif";
  let above = Infinity;
  for (const row of layout.rows) { // from the bottom up: those that fit
    const y = within(toScreen(layout, area, view, 0, row.y)[1], row.height * sy, area.top, bottom);
    if (y === null || above - y < 11) continue;
    context.fillText(row.name, 4, y + 4);
    above = y;
  }
  context.textAlign = "center";
  let before = -Infinity;
  for (const column of layout.columns) {
    const room = column.width * sx, x = within(toScreen(layout, area, view, column.x, 0)[0], room, area.left, right);
    if (x === null || x - before < 15) continue;
    const text = column.position < 0 ? "bias" : model.tokens[column.position], upright = room < 34;
    context.save();
    context.fillStyle = colours.ink;
    context.font = "11px system-ui, sans-serif";
    context.translate(x, bottom + 14);
    if (upright) { context.rotate(-Math.PI / 2); context.textAlign = "right"; context.translate(10, 4); }
    context.fillText(shorten(text, upright ? 7 : Math.max(4, Math.floor(room / 7))), 0, 0);
    context.restore();
    if (!upright && column.position >= 0) { context.fillStyle = colours.quiet; context.font = "10px system-ui, sans-serif"; context.fillText(String(column.position), x, bottom + 30); }
    before = x;
  }
}

/* Paints a frame at a moment; true while a better picture is on its way. `holder` takes the picture, `canvas` lies
   on it and has what stays where it is. `scene` also has the window's width and height, the node under the pointer
   and the version of what is drawn. */
function graphPainter(holder, canvas, model, layout) {
  const context = canvas.getContext("2d"), picture = scenePicture(holder, layout, graphScene(model, layout));
  return (scene, now) => {
    const { width, height, view, colours, hovered } = scene;
    const ratio = Math.min(2, globalThis.devicePixelRatio || 1);
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const area = plotArea(width, height), coming = picture(scene, area, now);
    if (hovered) {
      const [x, y] = toScreen(layout, area, view, layout.x[hovered.i], layout.y[hovered.i]);
      context.font = "600 12px system-ui, sans-serif";
      context.textAlign = "center";
      const text = `${hovered.label}  ${formatNumber(hovered.value, true)}`, half = context.measureText(text).width / 2 + 4;
      nameWithHalo(context, text, Math.min(width - half, Math.max(area.left + half, x)), Math.max(14, y - 14), colours);
    }
    paintGutters(context, model, layout, scene, area);
    return coming;
  };
}
