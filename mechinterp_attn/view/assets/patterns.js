/* Attention patterns: heads side by side, one query for all of them. */
function weightText(code) {
  if (code === NOT_A_NUMBER) return "× NaN";
  if (code === BELOW) return "< 0";
  if (code === ABOVE) return "> 1";
  return (code / SCALE).toFixed(2);
}

/* The same heads in CircuitsVis, whose bundle runs only once somebody asks for it. Its AttentionHeads
   keeps tokens as text (AttentionPatterns reads them as markup and is not used). */
function inCircuitsVis(block) {
  const bundle = document.getElementById("circuitsvis");
  if (!bundle || !block.circuitsvis) return null;
  const views = el("div", { class: "panels" });
  const box = el("details", { class: "twin", ontoggle: () => {
    if (!box.open || views.childElementCount) return;
    if (!window.CircuitsVis) {
      const script = el("script");
      script.textContent = bundle.textContent;
      document.head.append(script);
    }
    const n = block.tokens.length;
    for (const group of block.groups) {
      const mlp = group.kind === "mlp"; // the bias token joins as a last row that looks at itself
      const size = mlp ? n + 1 : n;
      const weight = (codes, q, k) => (q === n ? Number(k === n) : codes[q * (n + 1) + k] === NOT_A_NUMBER ? NaN : Math.min(1, codes[q * (n + 1) + k] / SCALE));
      const attention = group.heads.slice(0, 4).map((head) =>
        Array.from({ length: size }, (_, q) => Array.from({ length: size }, (_, k) => weight(head.codes, q, k))));
      const id = "circuitsvis-" + group.kind;
      views.append(el("div", { class: "panel circuitsvis", id }));
      CircuitsVis.render(id, CircuitsVis.AttentionHeads, {
        attention, tokens: mlp ? [...block.tokens, "⟨bias⟩"] : block.tokens,
        attentionHeadNames: group.heads.slice(0, 4).map((head) => head.head), maskUpperTri: !mlp,
      });
    }
  } }, el("summary", {}, "The first of these heads in CircuitsVis (takes a few seconds)"), views);
  return box;
}

function drawPatterns(host, block) {
  const n = block.tokens.length, width = n + 1;
  const tokens = [...block.tokens, "⟨bias⟩"];
  const name = (k) => (k === n ? "the bias token" : `${tokens[k]} (${k})`);
  const code = (k) => el("code", { class: "token", dir: "auto" }, name(k));
  const state = { query: n - 1 };
  const panels = [];

  function panel(group, place) {
    const it = { chosen: group.heads[0], key: null, painted: null };
    const title = () => `Attention pattern of ${it.chosen.head}, ${it.chosen.why}`;
    const view = heatmap({ rows: block.tokens, columns: tokens, axes: ["token that looks", "token looked at"], top: 1, power: 0.5, width: 460, rowFrame: true, label: "",
      onpoint: (q, k) => { [state.query, it.key] = [q, k]; redraw(); }, onleave: () => { it.key = null; redraw(); } });
    const readout = el("p", { class: "readout", "aria-live": "polite" });
    const strip = el("ol", { class: "strip", tabindex: "0", role: "listbox", "aria-label": "Tokens, shaded by how much the chosen one looks at them. Arrow keys choose the token that looks." });
    const pieces = tokens.map((token, k) => el("li", { role: "option", id: `${block.id}-${place}-token-${k}` }, el("bdi", {}, token)));
    strip.append(...pieces);
    const twin = el("tbody");
    const shade = []; // what each token's ground shows now: only changes are written

    it.draw = (fresh) => {
      if (fresh) { it.colours = ramp(group.kind, 0.5); it.painted = null; shade.length = 0; }
      if (it.painted !== it.chosen) { view.paint(it.chosen.codes, it.colours); view.name(`${title()}; the table below lists the weights of the chosen token`); it.painted = it.chosen; }
      const weights = it.chosen.codes.subarray(state.query * width, (state.query + 1) * width);
      pieces.forEach((piece, k) => {
        if (shade[k] === weights[k]) return;
        shade[k] = weights[k];
        const back = it.colours[weights[k]];
        piece.style.backgroundColor = `rgb(${back})`;
        piece.style.color = readable(back);
        piece.title = `${name(k)}: ${weightText(weights[k])}`;
      });
      if (it.query !== state.query) {
        if (it.query !== undefined) { pieces[it.query].classList.remove("chosen"); pieces[it.query].setAttribute("aria-selected", "false"); }
        pieces[state.query].classList.add("chosen");
        pieces[state.query].setAttribute("aria-selected", "true");
        strip.setAttribute("aria-activedescendant", pieces[state.query].id);
        it.query = state.query;
      }
      const ranked = Array.from(weights.keys()).sort((a, b) => weights[b] - weights[a]).slice(0, 12);
      const at = it.key === null ? ranked[0] : it.key;
      view.move(state.query, it.key);
      readout.replaceChildren(headName(it.chosen.head), " from ", code(state.query), " to ", code(at),
        ": ", el("strong", {}, weightText(weights[at])), it.key === null ? " (where it looks most)" : "");
      twin.replaceChildren(...ranked.map((k) => el("tr", {}, el("td", { class: "left token-cell" }, code(k)), el("td", {}, weightText(weights[k])))));
    };

    strip.addEventListener("pointerover", (event) => {
      const k = pieces.indexOf(event.target.closest("li"));
      if (k >= 0 && k < n) { state.query = k; redraw(); }
    });
    strip.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -n, End: n }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      state.query = Math.max(0, Math.min(n - 1, state.query + step));
      pieces[state.query].scrollIntoView({ block: "nearest" });
      redraw();
    });

    const thumbs = el("fieldset", { class: "thumbs" }, el("legend", {}, el("h3", { class: "kind-" + group.kind }, group.title)));
    for (const [i, head] of group.heads.entries()) {
      const canvas = el("canvas", { width: 72, height: 72, "aria-hidden": "true" });
      const input = el("input", { type: "radio", name: `${block.id}-${place}`, value: head.head, checked: i === 0, onchange: () => { it.chosen = head; it.key = null; redraw(); } });
      head.thumb = () => {
        const context = canvas.getContext("2d");
        context.imageSmoothingEnabled = n > 72;
        context.drawImage(bitmap(head.codes, width, n, ramp(group.kind, 0.5)), 0, 0, 72, 72);
      };
      thumbs.append(el("label", {}, input, canvas, el("span", { class: "head" }, head.head), head.why));
    }
    const csv = () => toCsv(["query", ...tokens.map((_, k) => name(k))],
      block.tokens.map((_, q) => [name(q), ...Array.from(it.chosen.codes.subarray(q * width, (q + 1) * width), weightText)]));
    it.root = el("div", { class: "panel" }, thumbs, view.svg, figureTools(() => it.chosen.head, () => `pattern, ${group.title}`, view.svg, csv), readout, strip,
      el("details", { class: "twin" }, el("summary", {}, "As a table: where the chosen token looks"),
        el("table", {}, el("thead", {}, el("tr", {}, el("th", { class: "left", scope: "col" }, "Token looked at"), el("th", { scope: "col" }, "Weight"))), twin)));
    return it;
  }

  let waiting = false;
  function redraw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; panels.forEach((it) => it.draw()); });
  }

  return (async () => {
    await Promise.all(block.groups.flatMap((group) => group.heads.map(async (head) => { head.codes = await inflate(head.weights); })));
    const row = el("div", { class: "panels" });
    block.groups.forEach((group, place) => { const it = panel(group, place); panels.push(it); row.append(it.root); });
    if (block.caption) host.append(el("p", { class: "caption" }, block.caption));
    host.append(row, inCircuitsVis(block) || "");
    const everything = () => { panels.forEach((it) => it.draw(true)); block.groups.forEach((g) => g.heads.forEach((h) => h.thumb())); };
    everything();
    onColours(everything);
    host.dataset.ready = "";
  })();
}
