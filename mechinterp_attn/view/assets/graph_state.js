/* What a reader made of a graph: which node is looked at, which are pinned and grouped under which names, what
   is hidden. It lives in the address (behind "?" in the fragment), and as a file that `save_json` and `view` take.
   Whatever comes from an address is a stranger's text: only nodes that exist get in, and names stay text. */
const NAME_LENGTH = 80, MOST_PINNED = 200;

const freshState = (data, model) => ({
  chosen: "logit", hidden: new Set(), edges: Math.min(800, model.weight.length), window: null,
  ...knownPins(model, data.pinned || [], Object.entries(data.supernodes || {})),
});

/* Pinned ids and groups `[name, ids]`, less what is not in the graph; every node in one group at most, and pinned. */
function knownPins(model, pinned, groups) {
  const grouped = new Set(), kept = [];
  for (const [name, ids] of groups) {
    const own = [...new Set(ids)].filter((id) => model.byId.has(id) && !grouped.has(id));
    for (const id of own) grouped.add(id);
    if (own.length) kept.push([String(name).slice(0, NAME_LENGTH), own]);
  }
  const all = [...new Set([...pinned, ...grouped])].filter((id) => model.byId.has(id));
  return { pinned: all.slice(0, MOST_PINNED), groups: kept };
}

function toFragment(state, standard, place) {
  const query = new URLSearchParams();
  if (state.chosen !== "logit") query.set("node", state.chosen);
  if (state.pinned.length) query.set("pinned", JSON.stringify(state.pinned));
  for (const [name, ids] of state.groups) query.append("group", JSON.stringify([name, ...ids]));
  if (state.hidden.size) query.set("hidden", [...state.hidden].join(" "));
  if (state.edges !== standard.edges) query.set("edges", state.edges);
  if (state.window && state.window.zoom > 1) query.set("window", [state.window.x, state.window.y, state.window.zoom].map((x) => x.toFixed(2)).join(" "));
  const text = query.toString();
  return text === "" ? "" : `#${place}?${text}`;
}

const strings = (text) => {
  try {
    const read = JSON.parse(text);
    return Array.isArray(read) && read.every((x) => typeof x === "string") ? read : [];
  } catch {
    return [];
  }
};

/* The state that an address holds for the graph at `place`; null where it holds none. */
function fromFragment(hash, standard, place, model) {
  const [id, text] = hash.slice(1).split(/\?(.*)/s);
  if (id !== place || !text) return null;
  const query = new URLSearchParams(text);
  const groups = query.getAll("group").map(strings).filter((group) => group.length > 1).map(([name, ...ids]) => [name, ids]);
  const edges = Math.round(Number(query.get("edges") || standard.edges)), chosen = query.get("node") || "logit";
  const [x, y, zoom] = (query.get("window") || "").split(" ").map(Number);
  return {
    chosen: model.byId.has(chosen) ? chosen : "logit",
    hidden: new Set((query.get("hidden") || "").split(" ").filter((kind) => model.kinds.includes(kind))),
    edges: edges >= 0 ? Math.min(edges, model.weight.length) : standard.edges,
    window: [x, y, zoom].every(Number.isFinite) && zoom >= 1 ? { x, y, zoom } : null,
    ...knownPins(model, strings(query.get("pinned")), groups),
  };
}

/* Pinned nodes as items: groups where the first of their nodes was pinned, other nodes by themselves. */
function itemsOf(model, { pinned, groups }) {
  const owner = new Map(groups.flatMap((one) => one[1].map((id) => [id, one]))), items = new Map();
  for (const id of pinned) {
    const own = owner.get(id), key = own || id;
    if (!items.has(key)) items.set(key, { name: own ? own[0] : null, ids: own ? own[1] : [id], nodes: [] });
    items.get(key).nodes.push(model.byId.get(id));
  }
  return [...items.values()];
}

function pin(state, id) {
  if (state.pinned.includes(id)) return unpin(state, [id]);
  return { ...state, pinned: [...state.pinned, id].slice(0, MOST_PINNED) };
}

const unpin = (state, ids) => ({
  ...state, pinned: state.pinned.filter((id) => !ids.includes(id)),
  groups: state.groups.map(([name, own]) => [name, own.filter((id) => !ids.includes(id))]).filter(([, own]) => own.length),
});

/* Puts nodes under one name; they leave the groups in which they were. */
function grouped(state, ids, name) {
  const rest = state.groups.map(([other, own]) => [other, own.filter((id) => !ids.includes(id))]).filter(([, own]) => own.length);
  return { ...state, groups: [...rest, [name.trim().slice(0, NAME_LENGTH) || "group", [...ids]]] };
}
const ungroup = (state, ids) => ({ ...state, groups: state.groups.filter(([, own]) => !own.some((id) => ids.includes(id))) });

/* As a file for Python: `graph.view(**pins)`, `graph.save_json(path, **pins)`. Names are keys there, so no two are alike. */
function toFile({ pinned, groups }) {
  const supernodes = Object.create(null);
  for (const [name, ids] of groups) {
    let free = name;
    for (let n = 2; free in supernodes; n++) free = `${name} (${n})`;
    supernodes[free] = ids;
  }
  return { pinned, supernodes };
}
