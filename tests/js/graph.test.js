const assert = require("node:assert/strict");
const { test } = require("node:test");
const { load } = require("./load.js");

const FILES = ["element.js", "core.js", "figure.js", "graph_model.js", "graph_layout.js", "graph_paint.js", "graph_state.js", "graph_figure.js"];
const page = load(FILES, [
  "graphModel", "between", "edgesAt", "sliderFor", "graphLayout", "wholeGraph", "clampWindow", "zoomed", "panned", "toScreen",
  "intoSight", "nodeAt", "nextNode", "freshState", "toFragment", "fromFragment", "itemsOf", "pin", "unpin", "grouped", "ungroup",
  "toFile", "figureBoxes", "numberPlace", "arrowBetween", "plotArea",
], { URLSearchParams });
const plain = (x) => JSON.parse(JSON.stringify(x)); // objects of the page's context have prototypes of its own

/* Two tokens feed a head, it and a token feed a neuron and the target; a pool stands beside the head. */
const node = (id, kind, row, position, value, members = null) => ({ id, label: id.split("@")[0], kind, row, position, members, value, share: value / 6, influence: value / 6, rest: 0 });
const DATA = {
  title: "t", tokens: ["a", "b"], columns: [0, 1], rows: { 0: "L0 heads", 1: "L0 MLP" },
  nodes: [node("token@0", "token", null, 0, 4), node("token@1", "token", null, 1, 2), node("L0H0@1", "attention", 0, 1, 4, 1),
    node("L0H*@1", "attention", 0, 1, 1, 3), node("L0N5@1", "mlp", 1, 1, 3, 1), node("logit", "logit", null, 1, 6)],
  edges: { source: [0, 2, 4, 2, 1, 1, 3], target: [2, 4, 5, 5, 5, 3, 5], weight: [4, 3, 3, 1, 1, 1, 1] },
};
const model = page.graphModel(DATA), layout = page.graphLayout(model), area = { left: 60, top: 0, width: 600, height: 400 };

test("a graph knows its kinds, and what feeds what, strongest first", () => {
  assert.deepEqual(plain(model.kinds), ["attention", "mlp", "pool", "token"]);
  assert.deepEqual(plain(model.into[5].map((e) => [model.nodes[model.source[e]].id, model.weight[e]])), [["L0N5@1", 3], ["L0H0@1", 1], ["token@1", 1], ["L0H*@1", 1]]);
  assert.deepEqual(plain(model.outOf[2].map((e) => model.nodes[model.target[e]].id)), ["L0N5@1", "logit"]);
});

test("edges between groups are summed, a step inside a group is none, and a group's number is what flows into it", () => {
  const [token, head, neuron, logit] = ["token@0", "L0H0@1", "L0N5@1", "logit"].map((id) => model.byId.get(id));
  const { value, fed, edges } = page.between(model, [{ nodes: [token] }, { nodes: [head, neuron] }, { nodes: [logit] }]);
  assert.deepEqual(plain(value), [4, 4, 6]); // 4 + 3 less the 3 that goes from one to the other
  assert.deepEqual(plain(fed), [0, 4, 4]);
  assert.deepEqual(plain(edges), [{ from: 0, to: 1, weight: 4 }, { from: 1, to: 2, weight: 4 }]);
});

test("the slider goes from all edges to one and back to where it stood", () => {
  assert.deepEqual([page.edgesAt(0, 96000), page.edgesAt(100, 96000), page.edgesAt(50, 10000)], [96000, 1, 100]);
  assert.equal(page.edgesAt(0, 0), 0);
  for (const position of [0, 30, 77, 100]) assert.equal(page.sliderFor(page.edgesAt(position, 96000), 96000), position);
});

test("earlier layers stand lower, positions from left to right, and no two nodes on one place", () => {
  const at = (id) => [layout.x[model.byId.get(id).i], layout.y[model.byId.get(id).i]];
  assert.ok(at("token@0")[0] < at("token@1")[0]);
  assert.ok(at("logit")[1] < at("L0N5@1")[1] && at("L0N5@1")[1] < at("L0H0@1")[1] && at("L0H0@1")[1] < at("token@1")[1]);
  assert.equal(new Set(model.nodes.map((n) => `${layout.x[n.i]},${layout.y[n.i]}`)).size, model.nodes.length);
});

test("at first everything is in the window; zooming keeps the point under the pointer, panning stops at the border", () => {
  const whole = page.clampWindow(layout, area, page.wholeGraph(layout));
  for (const n of model.nodes) {
    const [x, y] = page.toScreen(layout, area, whole, layout.x[n.i], layout.y[n.i]);
    assert.ok(x > area.left && x < area.left + area.width && y > area.top && y < area.top + area.height, n.id);
  }
  const wide = { left: 0, top: 0, width: layout.width * 20, height: layout.height * 20 };
  const before = page.clampWindow(layout, wide, page.wholeGraph(layout)), [x, y] = page.toScreen(layout, wide, before, layout.x[2], layout.y[2]);
  const after = page.zoomed(layout, wide, before, 2, x, y);
  const [px, py] = page.toScreen(layout, wide, after, layout.x[2], layout.y[2]);
  assert.ok(after.zoom === 2 && Math.abs(px - x) < 1e-6 && Math.abs(py - y) < 1e-6);
  const far = page.panned(layout, wide, after, 1e6, 1e6);
  assert.deepEqual(plain(page.toScreen(layout, wide, far, 0, 0).map(Math.round)), [0, 0]);
  assert.equal(page.clampWindow(layout, wide, { ...before, zoom: 1e9 }).zoom, 48 / 20);
  const [qx] = page.toScreen(layout, wide, page.intoSight(layout, wide, far, model.byId.get("logit")), layout.x[5], layout.y[5]);
  assert.ok(qx <= wide.width);
});

test("a press takes the nearest node in reach, arrows the nearest that way", () => {
  const view = page.wholeGraph(layout), [x, y] = page.toScreen(layout, area, view, layout.x[4], layout.y[4]);
  assert.equal(page.nodeAt(layout, area, view, model.nodes, x + 3, y).id, "L0N5@1");
  assert.equal(page.nodeAt(layout, area, view, model.nodes, x + 300, y), null);
  assert.equal(page.nextNode(layout, model.nodes, model.byId.get("logit"), [0, 1]).id, "L0N5@1");
  assert.equal(page.nextNode(layout, model.nodes, model.byId.get("logit"), [0, -1]), null);
});

test("the address holds the state and gives it back", () => {
  const standard = page.freshState(DATA, model);
  let state = page.pin(page.pin(page.pin(standard, "L0H0@1"), "L0N5@1"), "logit");
  state = page.grouped(state, ["L0H0@1", "L0N5@1"], 'copies <b>"&?#~');
  state = { ...state, chosen: "L0N5@1", hidden: new Set(["pool"]), edges: 3, window: { x: 1, y: 2, zoom: 1.5 } };
  const hash = page.toFragment(state, standard, "graph");
  assert.ok(hash.startsWith("#graph?") && !/[<>"\s]/.test(hash));
  const back = page.fromFragment(hash, standard, "graph", model);
  assert.deepEqual(plain({ ...back, hidden: [...back.hidden] }), plain({ ...state, hidden: ["pool"] }));
  assert.equal(page.toFragment(standard, standard, "graph"), "");
  assert.equal(page.fromFragment("#graph", standard, "graph", model), null);
  assert.equal(page.fromFragment(hash, standard, "other", model), null);
});

test("an address from a stranger lets in only nodes that exist", () => {
  const standard = page.freshState(DATA, model);
  const read = (text) => page.fromFragment(`#graph?${text}`, standard, "graph", model);
  const state = read('pinned=["nobody","logit",3]&pinned={&group=["g","__proto__","L0H0@1","L0H0@1"]&group=["h","L0H0@1"]&group=[]&node=constructor&hidden=pool%20x&edges=-5&window=a%20b');
  assert.deepEqual(plain(state.pinned), ["L0H0@1"]); // a list with a number in it is no list of ids
  assert.deepEqual(plain(state.groups), [["g", ["L0H0@1"]]]);
  assert.deepEqual([state.chosen, [...state.hidden].join(), state.edges, state.window], ["logit", "pool", standard.edges, null]);
  assert.equal(page.grouped(standard, ["logit"], "x".repeat(500)).groups[0][0].length, 80);
});

test("pins come as items; groups dissolve; a file has a name for each group", () => {
  let state = { pinned: ["token@0", "L0H0@1", "L0N5@1", "logit"], groups: [] };
  state = page.grouped(state, ["L0H0@1", "L0N5@1"], "own");
  assert.deepEqual(plain(page.itemsOf(model, state).map((item) => [item.name, item.ids])), [[null, ["token@0"]], ["own", ["L0H0@1", "L0N5@1"]], [null, ["logit"]]]);
  assert.deepEqual(plain(page.unpin(state, ["L0H0@1"]).groups), [["own", ["L0N5@1"]]]);
  assert.deepEqual(plain(page.ungroup(state, ["L0N5@1"]).groups), []);
  state = page.grouped(state, ["logit"], "own");
  state = page.grouped(state, ["token@0"], "__proto__");
  const file = page.toFile(state);
  assert.deepEqual(Object.keys(file.supernodes), ["own", "own (2)", "__proto__"]);
  assert.equal(page.pin(state, "logit").pinned.includes("logit"), false);
});

test("boxes of the figure do not overlap, and numbers stand beside them", () => {
  const items = model.nodes.map((n) => ({ name: null, ids: [n.id], nodes: [n] }));
  const { boxes, width, height } = page.figureBoxes(model, items, items.map(() => 1));
  boxes.forEach((a, i) => {
    assert.ok(a.x >= 0 && a.x + a.width <= width && a.y + 36 <= height);
    boxes.slice(i + 1).forEach((b) => assert.ok(a.y !== b.y || a.x + a.width <= b.x || b.x + b.width <= a.x, `${a.name} ${b.name}`));
  });
  const arrow = page.arrowBetween(boxes[0], boxes[5]), [x, y] = page.numberPlace(arrow, boxes, []);
  assert.ok(!boxes.some((box) => x > box.x && x < box.x + box.width && y > box.y && y < box.y + 36));
});
