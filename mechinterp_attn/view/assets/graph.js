/* The viewer of an attribution graph: tokens across, layers up, the target on top. */
const GRAPH_COLOURS = ["ink", "quiet", "panel", "rule", "line", "link", "attention", "mlp", "feature", "error", "skip", "token", "bias", "plus", "minus"];
const ARROWS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };

function drawAttributionGraph(host, data, place = "graph") {
  const model = graphModel(data), layout = graphLayout(model), n = model.weight.length;
  const standard = freshState(data, model);
  let state = fromFragment(location.hash, standard, place, model) || standard;
  let view = state.window || wholeGraph(layout);
  let scene = null, hovered = null, found = new Set(), version = 0, waiting = false;

  const canvas = el("canvas", { class: "graph-over" }), holder = el("div", { class: "graph-sheets", "aria-hidden": "true" });
  const stage = el("div", { class: "graph-stage", tabindex: "0", role: "application", "aria-roledescription": "graph, arrow keys walk", "aria-label": data.title }, holder, canvas);
  const panel = el("div", { class: "graph-panel", "aria-live": "polite" });
  const paint = graphPainter(holder, canvas, model, layout);
  const size = () => ({ width: stage.clientWidth, height: stage.clientHeight });
  const area = () => plotArea(stage.clientWidth, stage.clientHeight);
  const seen = (node) => !state.hidden.has(node.group);

  function redraw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame((now) => {
      waiting = false;
      if (stage.clientWidth && paint({ ...scene, ...size(), view, hovered, found, version, seen }, now)) redraw();
      else stage.dataset.painted = version;
    });
  }
  function look(next) {
    view = clampWindow(layout, area(), next);
    stage.style.touchAction = view.zoom > 1 ? "none" : "pan-y"; // one finger scrolls the page until the graph is larger than its window
    redraw();
    remember();
  }

  /* Everything that follows from the state: what is painted, the card, the pins, the address. */
  function update(next) {
    state = next;
    version += 1;
    const chosen = model.byId.get(state.chosen), near = new Set([chosen.i]);
    for (const e of model.into[chosen.i]) near.add(model.source[e]);
    for (const e of model.outOf[chosen.i]) near.add(model.target[e]);
    const edges = [];
    for (let e = 0; e < state.edges; e++) if (seen(model.nodes[model.source[e]]) && seen(model.nodes[model.target[e]])) edges.push(e);
    scene = { edges, chosen, near, pinned: new Set(state.pinned), colours: colours() };
    graphCard(panel, model, data, chosen, { seen, pinned: scene.pinned.has(chosen.id), choose, onpin: () => update(pin(state, chosen.id)) });
    bar.show(state, edges.length);
    pins.show(state, scene.colours);
    redraw();
    remember();
  }
  function colours() {
    const style = getComputedStyle(host);
    return Object.fromEntries(GRAPH_COLOURS.map((name) => [name, style.getPropertyValue("--g-" + name).trim()]));
  }
  function choose(id) {
    view = intoSight(layout, area(), view, model.byId.get(id));
    update({ ...state, chosen: id });
  }
  function find(text) {
    const wanted = text.trim().toLowerCase();
    const matching = wanted === "" ? [] : model.nodes.filter((node) => seen(node) && node.label.toLowerCase().includes(wanted));
    found = new Set(matching.map((node) => node.i));
    const first = matching.find((node) => node.label.toLowerCase() === wanted) || matching[0];
    if (first) choose(first.id);
    else update(state);
    return wanted === "" ? "" : ` ${matching.length} found`;
  }

  let later = null;
  function remember() { // one entry of the history for all of it, and no more than a few writes a second
    clearTimeout(later);
    later = setTimeout(() => {
      const hash = toFragment({ ...state, window: view }, standard, place);
      if (hash === "" && !location.hash.startsWith(`#${place}?`)) return;
      try { history.replaceState(null, "", hash || `#${place}`); } catch { /* a frame without an address of its own */ }
    }, 250);
  }
  addEventListener("hashchange", () => {
    const next = fromFragment(location.hash, standard, place, model);
    if (!next) return;
    view = clampWindow(layout, area(), next.window || wholeGraph(layout));
    update(next);
  });

  const middle = () => { const a = area(); return [a.left + a.width / 2, a.top + a.height / 2]; };
  const zoomBy = (factor) => look(zoomed(layout, area(), view, factor, ...middle()));
  const bar = graphBar(model, {
    zoomBy, whole: () => look(wholeGraph(layout)), find,
    edges: (position) => update({ ...state, edges: edgesAt(position, n) }),
    kind: (kind, on) => { const hidden = new Set(state.hidden); hidden[on ? "delete" : "add"](kind); update({ ...state, hidden }); },
  });
  const pins = graphPins(model, place, { choose, change: update });
  onGestures(stage, {
    panBy: (dx, dy) => look(panned(layout, area(), view, dx, dy)),
    zoomAt: (factor, x, y) => look(zoomed(layout, area(), view, factor, x, y)),
    click: (x, y) => { const node = at(x, y); if (node) choose(node.id); },
    hover: (x, y) => { const node = x === null ? null : at(x, y); if (node !== hovered) { hovered = node; stage.style.cursor = node ? "pointer" : ""; redraw(); } },
  });
  const at = (x, y) => nodeAt(layout, area(), view, model.nodes.filter(seen), x, y);
  stage.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const way = ARROWS[event.key], chosen = model.byId.get(state.chosen);
    const does = way && event.shiftKey ? () => look(panned(layout, area(), view, -60 * way[0], -60 * way[1]))
      : way ? () => { const next = nextNode(layout, model.nodes.filter(seen), chosen, way); if (next) choose(next.id); }
      : { "+": () => zoomBy(1.4), "=": () => zoomBy(1.4), "-": () => zoomBy(1 / 1.4), 0: () => look(wholeGraph(layout)), p: () => update(pin(state, chosen.id)), Escape: () => choose("logit") }[event.key];
    if (!does) return;
    event.preventDefault();
    does();
  });

  host.classList.add("attribution-graph");
  host.append(bar.root, el("div", { class: "graph-main" }, stage, panel), pins.root);
  new ResizeObserver(() => { if (stage.clientWidth) look(view); }).observe(stage);
  onColours(() => update(state));
  update(state);
  host.viewer = { // for scripts that look on or drive it: where a node stands on the stage, what is seen, what is pinned
    place: (id) => toScreen(layout, area(), view, layout.x[model.byId.get(id).i], layout.y[model.byId.get(id).i]),
    window: () => view, state: () => state, nodes: model.nodes, zoomBy, panBy: (dx, dy) => look(panned(layout, area(), view, dx, dy)),
    painted: () => !waiting && stage.dataset.painted === String(version), // with the edges as they are now
  };
}
