/* The card beside a graph: what comes into a node and where it goes, strongest first; for a head, where it looks
   and what moved its score there; for a pool, who is in it. */
const LISTED = 12; // of a list, before "more"

const signedSpan = (x) => el("span", { class: "graph-weight " + (x < 0 ? "minus" : "plus") }, formatNumber(x, true));

/* rows: [weight, node]; a node's name chooses it. */
function weighed(model, title, rows, choose) {
  if (!rows.length) return null;
  const item = ([weight, node]) => el("li", {}, signedSpan(weight), el("button", { type: "button", onclick: () => choose(node.id) }, placed(model, node)));
  const list = el("ul", {}, ...rows.slice(0, LISTED).map(item));
  if (rows.length > LISTED) {
    const more = el("button", { type: "button", onclick: () => more.closest("li").replaceWith(...rows.slice(LISTED).map(item)) }, `and ${rows.length - LISTED} more`);
    list.append(el("li", {}, more));
  }
  return el("div", {}, el("h4", {}, title), list);
}

function scoreParts(model, data, node, choose) {
  return (data.scores || []).filter((score) => score.head === node.id).flatMap((score) => {
    const rows = (side) => score[side].map(([i, weight]) => [weight, model.nodes[i]]);
    return [
      el("h4", {}, `${score.label}: score ${formatNumber(score.value, true)} over its other keys`),
      score.moves === null ? null : el("p", { class: "graph-more" }, "it moves ", signedSpan(score.moves), " logits from there"),
      weighed(model, "Q: the query is moved by", rows("query"), choose), weighed(model, "K: the key is moved by", rows("key"), choose),
    ];
  });
}

function memberParts(data, node) {
  const strongest = data.members?.[node.id];
  if (!strongest) return [];
  const rest = node.value - strongest.reduce((sum, [, value]) => sum + value, 0), others = node.members - strongest.length;
  const rows = strongest.map(([label, value]) => el("li", {}, signedSpan(value), cardButton(label)));
  if (others > 0) rows.push(el("li", { class: "graph-more" }, signedSpan(rest), ` the ${others.toLocaleString("en")} others`));
  return [el("details", { class: "graph-members", open: true }, el("summary", {}, `Open: its ${node.members.toLocaleString("en")} members`), el("ul", {}, ...rows))];
}

/* A head's name opens its card where the page has one. */
function cardButton(label) {
  const known = typeof cardOf === "function" && cardOf(label);
  return known ? headName(label) : el("span", {}, label);
}

function graphCard(panel, model, data, node, { seen, pinned, choose, onpin }) {
  const rows = (numbers, ends) => numbers.map((e) => [model.weight[e], model.nodes[ends[e]]]).filter(([, other]) => seen(other));
  const share = node.share === null ? "" : ` · ${(100 * node.share).toFixed(1)} % of the target`;
  const single = node.row !== null && node.group !== "pool";
  const known = single && typeof cardOf === "function" && cardOf(node.label);
  panel.replaceChildren(
    el("h3", {}, placed(model, node)),
    el("p", {}, `${formatNumber(node.value, true)} logits over all paths${share}`),
    el("div", { class: "graph-actions" },
      el("button", { type: "button", class: "graph-pin", "aria-pressed": String(pinned), onclick: onpin }, pinned ? "Unpin" : "Pin"),
      known ? el("button", { type: "button", "data-head": node.label, "aria-haspopup": "dialog" }, "Head card") : null),
    ...memberParts(data, node),
    ...[weighed(model, "comes in from", rows(model.into[node.i], model.source), choose),
      Math.abs(node.rest || 0) > 1e-9 ? el("p", { class: "graph-more" }, `${formatNumber(node.rest, true)} from what is not drawn`) : null,
      weighed(model, "goes out to", rows(model.outOf[node.i], model.target), choose),
      ...scoreParts(model, data, node, choose)].filter(Boolean));
}
