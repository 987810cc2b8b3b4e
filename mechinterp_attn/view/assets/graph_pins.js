/* The pane of pinned nodes: their picture, their list, groups under names of the reader's own, files. */
const SUGGESTED = 12;

/* Before anything is pinned: the target and the most influential single nodes. */
const suggested = (model) => [model.goal, ...model.nodes.filter((node) => node.row !== null && node.group !== "pool")
  .sort((a, b) => (b.influence || 0) - (a.influence || 0)).slice(0, SUGGESTED)].map((node) => node.id);

function graphPins(model, place, { choose, change }) {
  let state = null, items = [];
  const ticked = new Set(); // ids of nodes; a group is ticked by its first
  const figure = el("div", { class: "graph-figure", tabindex: "0", role: "region", "aria-label": "picture of the pinned nodes" }), list = el("ul", { class: "graph-pinned" });
  const said = el("p", { class: "graph-more" }), actions = el("div", { class: "graph-actions" });
  const button = (text, onclick, more) => el("button", { type: "button", onclick, ...more }, text);
  const join = () => {
    const ids = items.filter((item) => ticked.has(item.ids[0])).flatMap((item) => item.ids);
    ticked.clear();
    change(grouped(state, ids, items.find((item) => item.ids[0] === ids[0])?.name || "group"));
    const field = [...list.querySelectorAll("input[type=text]")].find((input) => input.dataset.first === ids[0]);
    field?.focus();
    field?.select();
  };
  const joined = button("Group the ticked", join);
  const saved = button("Pins as file", () => download(`${place}-pins.json`, JSON.stringify(toFile(state), null, 1), "application/json"));
  const tick = (id, on) => { ticked[on ? "add" : "delete"](id); joined.disabled = ticked.size === 0; };

  function row(item, value, fed) {
    const id = item.ids[0], title = item.name ?? placed(model, item.nodes[0]);
    const box = el("input", { type: "checkbox", "aria-label": `tick ${title}`, checked: ticked.has(id), onchange: () => tick(id, box.checked) });
    const name = item.name === null ? el("button", { type: "button", onclick: () => choose(id) }, title)
      : el("input", { type: "text", "aria-label": "name of the group", maxlength: NAME_LENGTH, value: item.name, "data-first": id, onchange: (event) => change(grouped(state, item.ids, event.target.value)) });
    const members = item.name === null ? null : el("span", { class: "graph-more" }, ...item.nodes.flatMap((node) => [el("button", { type: "button", onclick: () => choose(node.id) }, placed(model, node)), " "]));
    return el("li", {}, box, signedSpan(value), el("span", { class: "graph-item" }, name, members,
      el("span", { class: "graph-more" }, items.length > 1 ? ` ${formatNumber(fed, true)} of it from the others here ` : ""),
      item.name === null ? null : button("ungroup", () => change(ungroup(state, item.ids))),
      button("unpin", () => change(unpin(state, item.ids)), { "aria-label": `unpin ${title}` })));
  }

  const root = el("section", { class: "graph-pins", "aria-label": "Pinned nodes" }, el("h3", {}, "Pinned nodes"), said, actions, figure,
    figureTools(() => `${place}-pinned`, () => "the pinned nodes of the graph", () => figureFile(model, items)), list);
  return {
    root,
    show(next, colours) {
      state = next;
      const own = state.pinned.length > 0, shown = own ? state : { pinned: suggested(model), groups: [] };
      items = itemsOf(model, shown);
      for (const id of ticked) if (!items.some((item) => item.ids[0] === id)) ticked.delete(id);
      const { value, fed } = between(model, items);
      said.textContent = own ? "Edges between groups are sums over their members; a group's number is what flows into it from outside it."
        : `Nothing is pinned yet: these are the target and the ${items.length - 1} most influential nodes. Pin nodes from their card or with the key P.`;
      joined.disabled = ticked.size === 0;
      actions.replaceChildren(...(own ? [joined, saved, button("Unpin all", () => change({ ...state, pinned: [], groups: [] }))]
        : [button("Pin these", () => change({ ...state, pinned: shown.pinned }))]));
      figure.replaceChildren(graphFigure(model, items, colours));
      list.replaceChildren(...(own ? items.map((item, k) => row(item, value[k], fed[k])) : []));
    },
  };
}
