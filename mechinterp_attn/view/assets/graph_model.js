/* An attribution graph without its picture: nodes, what feeds what, and sums over groups of nodes.
   Edges are three lists, the strongest first; nodes are known by their place in the list. */
const KIND_WORDS = {
  attention: "attention heads", mlp: "MLP-derived heads", feature: "features", error: "errors", skip: "skips",
  pool: "pools", token: "tokens", bias: "biases", logit: "target",
};

function graphModel(data) {
  const nodes = data.nodes.map((node, i) => ({ ...node, i, group: node.members > 1 ? "pool" : node.kind }));
  const byId = new Map(nodes.map((node) => [node.id, node]));
  const { source, target, weight } = data.edges;
  const into = nodes.map(() => []), outOf = nodes.map(() => []); // numbers of edges
  for (let e = 0; e < weight.length; e++) {
    into[target[e]].push(e);
    outOf[source[e]].push(e);
  }
  const kinds = Object.keys(KIND_WORDS).filter((kind) => kind !== "logit" && nodes.some((node) => node.group === kind));
  return { nodes, byId, source, target, weight, into, outOf, kinds, biggest: Math.abs(weight[0] || 1), goal: byId.get("logit"), tokens: data.tokens, rows: data.rows, columns: data.columns };
}

/* What a slider at 0..100 draws of n edges: all at 0, one at 100, and as many more at every step. */
const edgesAt = (position, n) => (n === 0 ? 0 : Math.round(n ** (1 - position / 100)));
const sliderFor = (count, n) => (n < 2 ? 0 : Math.round(100 * (1 - Math.log(Math.max(1, count)) / Math.log(n))));

/* A node's name, with the token that it stands at. */
function placed(model, node) {
  if (node.kind === "token") return `${node.label} (${node.position})`;
  return node.row === null ? node.label : `${node.label} at ${model.tokens[node.position]} (${node.position})`;
}

/* Items are pinned nodes and groups of them: what flows into each from outside it, how much of that comes from
   other items, and the edges between them. A step inside a group is no edge; edges between groups are summed. */
function between(model, items) {
  const owner = new Map();
  items.forEach((item, k) => { for (const node of item.nodes) owner.set(node.i, k); });
  const sums = new Map(), inside = items.map(() => 0), fed = items.map(() => 0);
  for (const [i, k] of owner) {
    for (const e of model.into[i]) {
      const from = owner.get(model.source[e]);
      if (from === undefined) continue;
      if (from === k) { inside[k] += model.weight[e]; continue; }
      fed[k] += model.weight[e];
      const key = from * items.length + k;
      sums.set(key, (sums.get(key) || 0) + model.weight[e]);
    }
  }
  const value = items.map((item, k) => item.nodes.reduce((sum, node) => sum + node.value, 0) - inside[k]);
  const edges = [...sums].map(([key, weight]) => ({ from: Math.floor(key / items.length), to: key % items.length, weight }));
  return { value, fed, edges: edges.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)) };
}
