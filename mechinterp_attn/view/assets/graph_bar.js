/* The controls above a graph, and what hands do on it. */
const GRAPH_SIGNS = "● attention head  ◆ MLP-derived head  ■ token or bias, a dot in it: a pool; blue adds, red and dashed takes away";
const GRAPH_KEYS = "Arrow keys walk, Shift and arrows move the window, + and − zoom, 0 shows all, P pins, Escape chooses the target. The wheel zooms once the graph is clicked, or with Ctrl.";

function graphBar(model, { zoomBy, whole, find, edges, kind }) {
  const n = model.weight.length;
  const button = (label, text, onclick) => el("button", { type: "button", "aria-label": label, title: label, onclick }, text);
  const slider = el("input", { type: "range", min: "0", max: "100", "aria-label": "smallest edge shown", oninput: () => edges(Number(slider.value)) });
  const drawnEdges = el("span", { class: "graph-count" });
  const matches = el("span", { role: "status" });
  const search = el("input", { type: "search", placeholder: "such as L1H3", "aria-label": "find a node", oninput: () => { matches.textContent = find(search.value); } });
  const boxes = new Map(model.kinds.map((name) => [name, el("input", { type: "checkbox", onchange: () => kind(name, boxes.get(name).checked) })]));
  return {
    root: el("div", { class: "graph-bar" },
      el("span", { class: "graph-buttons" }, button("zoom in", "+", () => zoomBy(1.4)), button("zoom out", "−", () => zoomBy(1 / 1.4)), button("show the whole graph", "Whole", whole)),
      el("label", {}, el("span", {}, "Hide small edges"), slider, drawnEdges),
      el("label", {}, "Find ", search, matches),
      el("fieldset", { class: "graph-kinds" }, el("legend", {}, "Show"), ...[...boxes].map(([name, box]) => el("label", {}, box, ` ${KIND_WORDS[name]}`))),
      el("p", { class: "graph-key" }, GRAPH_SIGNS),
      el("details", { class: "graph-keys" }, el("summary", {}, "Keys"), GRAPH_KEYS)),
    show(state, visible) {
      slider.value = sliderFor(state.edges, n);
      const least = state.edges ? formatNumber(Math.abs(model.weight[state.edges - 1])) : "–";
      drawnEdges.textContent = ` ${visible.toLocaleString("en")} of ${n.toLocaleString("en")}, from ${least}`;
      slider.setAttribute("aria-valuetext", drawnEdges.textContent.trim());
      for (const [name, box] of boxes) box.checked = !state.hidden.has(name);
    },
  };
}

/* One pointer moves the window, two pinch it, a short press chooses. The wheel belongs to the page until the
   graph has the focus; a pinch on a trackpad comes as a wheel with Ctrl. */
function onGestures(stage, { panBy, zoomAt, click, hover }) {
  const pointers = new Map();
  let moved = 0;
  const place = (event) => { const box = stage.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  const spread = () => { const [[ax, ay], [bx, by]] = pointers.values(); return [Math.hypot(ax - bx, ay - by), (ax + bx) / 2, (ay + by) / 2]; };
  stage.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    if (pointers.size === 0) moved = 0;
    pointers.set(event.pointerId, place(event));
    stage.setPointerCapture(event.pointerId);
  });
  stage.addEventListener("pointermove", (event) => {
    const last = pointers.get(event.pointerId), now = place(event);
    if (!last) { if (event.pointerType === "mouse") hover(...now); return; }
    const before = pointers.size === 2 ? spread() : null;
    moved += Math.hypot(now[0] - last[0], now[1] - last[1]);
    pointers.set(event.pointerId, now);
    if (before) {
      const [far, x, y] = spread();
      panBy(x - before[1], y - before[2]);
      zoomAt(far / Math.max(1, before[0]), x, y);
    } else if (moved > 4) panBy(now[0] - last[0], now[1] - last[1]);
  });
  const lift = (event) => {
    const pressed = pointers.delete(event.pointerId);
    if (pressed && event.type === "pointerup" && moved <= 4) click(...place(event));
  };
  stage.addEventListener("pointerup", lift);
  stage.addEventListener("pointercancel", lift);
  stage.addEventListener("pointerleave", () => hover(null));
  stage.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && document.activeElement !== stage) return;
    event.preventDefault();
    const pixels = event.deltaY * (event.deltaMode === 1 ? 16 : 1);
    zoomAt(Math.exp(-Math.max(-200, Math.min(200, pixels)) * (event.ctrlKey ? 0.01 : 0.003)), ...place(event));
  }, { passive: false });
}
