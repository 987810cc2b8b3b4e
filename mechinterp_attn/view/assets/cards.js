/* Head cards: every name of a head on the page is a button that opens the same card. */
const KIND_NAMES = { attention: "attention head", mlp: "MLP-derived head", feature: "feature of a dictionary", error: "error of a dictionary", skip: "skip of a transcoder" };
const headName = (label) => el("button", { type: "button", class: "head", "data-head": label, "aria-haspopup": "dialog" }, label);

/* Heads without a card of their own, far down a large table, show what their row says. */
function rowOf(label) {
  for (const block of report.sections.flatMap((s) => s.blocks)) {
    if (block.type !== "table" || block.id !== "heads") continue;
    const i = block.data.head.indexOf(label);
    if (i < 0) return null;
    const row = Object.fromEntries(Object.entries(block.data).map(([key, values]) => [key, values[i]]));
    return { ...row, looks: [], raises: [], lowers: [], brief: true };
  }
  return null;
}
const cardOf = (label) => (Object.hasOwn(report.cards, label) ? report.cards[label] : rowOf(label));

const tokenCode = (text) => el("code", { class: "token", dir: "auto" }, text);
/* As people read it: 7.2 %, 0.013 %. */
const percent = (p) => `${p >= 0.1 ? (100 * p).toFixed(1) : Number((100 * p).toPrecision(2))} %`;

function cardFacts(card) {
  const item = (name, value, note) => el("div", {}, el("dt", {}, name), el("dd", {}, el("span", { class: "value" }, value), note ? el("span", { class: "note" }, note) : null));
  const facts = [item("Direct effect", formatNumber(asNumber(card.effect), true),
    card.rank ? `logits, written straight to the answer, which is number ${card.rank.toLocaleString("en")} of all it raises` : "logits")];
  const cut = asNumber(card.cut);
  if (cut !== null) facts.push(item("p when cut", percent(asNumber(card.p)), `the log-probability ${cut < 0 ? "gains" : "loses"} ${formatNumber(Math.abs(cut))} nats`));
  else if (card.estimate !== undefined) facts.push(item("When cut, estimated", formatNumber(asNumber(card.estimate), true), "nats of the log-probability; not run"));
  if (card.way) facts.push(item("Acts through", card.way, "its direct effect does not show what cutting does"));
  for (const [name, value] of card.scores || []) facts.push(item(name[0].toUpperCase() + name.slice(1), asNumber(value).toFixed(2), "mean attention on random tokens"));
  return el("dl", { class: "facts" }, ...facts);
}

function listed(title, head, rows) {
  return rows.length === 0 ? null : el("div", {}, el("h3", {}, title), el("table", {},
    el("thead", {}, el("tr", {}, ...head.map((text, i) => el("th", { class: i ? "" : "left", scope: "col" }, text)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((x, i) => el("td", { class: i ? "" : "left token-cell" }, x)))))));
}

function cardLists(card, data) {
  const at = (k) => tokenCode(`${data.prompt[k]} (${k})`);
  const signed = (x) => formatNumber(asNumber(x), true);
  return el("div", { class: "card-lists" },
    listed("Looks at, where the answer is predicted", ["Token", card.kind !== "attention" ? "Weight" : "Attention", "Brings (logits)"], card.looks.map(([k, weight, brought]) => [at(k), formatNumber(asNumber(weight)), signed(brought)])),
    listed("What it writes there raises", ["Token", "Logit"], card.raises.map(([text, value]) => [tokenCode(text), signed(value)])),
    listed("and lowers", ["Token", "Logit"], card.lowers.map(([text, value]) => [tokenCode(text), signed(value)])));
}

/* An attention head's pattern as a heatmap; a neuron's gate on the tokens themselves. */
async function cardPattern(label, card, data) {
  const codes = await inflate(card.weights), n = data.prompt.length;
  if (card.kind !== "attention") {
    const colours = ramp("mlp", 0.5);
    return el("div", {}, el("h3", {}, "How far it is on at each token"), el("ol", { class: "strip", tabindex: "0", "aria-label": "Tokens, shaded by the weight the neuron puts on each" },
      ...data.prompt.map((token, k) => {
        const piece = el("li", { title: `${token} (${k}): ${weightText(codes[k])}` }, el("bdi", {}, token));
        piece.style.backgroundColor = `rgb(${colours[codes[k]]})`;
        piece.style.color = readable(colours[codes[k]]);
        return piece;
      })));
  }
  const columns = [...data.prompt, "⟨bias⟩"];
  const readout = el("p", { class: "readout", "aria-live": "polite" }, "Point at a cell, or walk with the arrow keys.");
  const view = heatmap({ rows: data.prompt, columns, axes: ["token that looks", "token looked at"], top: 1, power: 0.5, width: 420, label: `Attention pattern of ${label}`,
    onpoint: (q, k) => { view.move(q, k); readout.replaceChildren(tokenCode(`${data.prompt[q]} (${q})`), " to ", tokenCode(`${columns[k]} (${k})`), ": ", el("strong", {}, weightText(codes[q * (n + 1) + k]))); },
    onleave: () => {} });
  view.paint(codes, ramp("attention", 0.5));
  return el("div", {}, el("h3", {}, `Its pattern on ${report.which_prompt}`), view.svg, readout);
}

function cardPartners(card) {
  if (!card.partners) return null;
  const rows = card.partners.map(([kind, side, other, z]) => el("li", {}, `${side} `, headName(other), ` (${kind}-composition, z ${asNumber(z).toFixed(1)})`));
  return el("div", {}, el("h3", {}, "Composes with, by weights"), el("ul", { class: "plain-list partners" }, ...rows));
}

function cardPassages(card) {
  if (!card.passages || card.passages.length === 0) return null;
  return el("div", {}, el("h3", {}, "Where it writes most in the corpus"), el("ul", { class: "plain-list passages" },
    ...card.passages.map((p) => el("li", {}, el("bdi", {}, p.before), el("mark", {}, p.token), el("bdi", {}, p.after)))));
}

/* Within the explorer, which named its frame so, a head can be cut from its card. */
function cutButton(label) {
  if (window.name !== "explorer") return null;
  return el("button", { type: "button", class: "cut", onclick: () => { cardDialog.close(); parent.postMessage({ head: label }, "*"); } }, "Cut it");
}

const cardDialog = el("dialog", { id: "card", "aria-labelledby": "card-title" });
document.body.append(cardDialog);
async function openCard(label) {
  const card = cardOf(label);
  const title = el("h2", { id: "card-title" }, el("span", { class: "head" }, label), card ? el("span", { class: "quiet kind-" + card.kind }, ` ${KIND_NAMES[card.kind]}, layer ${card.layer}`) : null);
  const close = el("button", { type: "button", class: "close", "aria-label": "Close", onclick: () => cardDialog.close() }, "✕");
  const picture = el("div", { class: "card-picture" });
  cardDialog.replaceChildren(el("div", { class: "card-top" }, title, cutButton(label), close));
  if (card) {
    cardDialog.append(cardFacts(card), el("div", { class: "card-body" }, picture, cardLists(card, report)));
    for (const part of [cardPartners(card), cardPassages(card)]) if (part) cardDialog.append(part);
    if (card.brief) cardDialog.append(el("p", { class: "quiet" }, "Far down the table of heads: patterns and tokens are kept for the heads that the page names first."));
  } else cardDialog.append(el("p", {}, "This page holds nothing more about this head."));
  if (!cardDialog.open) cardDialog.showModal();
  cardDialog.scrollTop = 0;
  close.focus();
  if (card?.weights) picture.replaceChildren(await cardPattern(label, card, report));
}
document.addEventListener("click", (event) => {
  const name = event.target.closest("[data-head]");
  if (name) { event.preventDefault(); openCard(name.dataset.head); }
  else if (event.target === cardDialog) cardDialog.close(); // a click beside the card
});
