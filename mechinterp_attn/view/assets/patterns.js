/* Attention patterns: attention heads and MLP-derived heads side by side, one query for both. */
const SCALE = 252, BELOW = 253, ABOVE = 254, NOT_A_NUMBER = 255;

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function weightText(code) {
  if (code === NOT_A_NUMBER) return "× NaN";
  if (code === BELOW) return "< 0";
  if (code === ABOVE) return "> 1";
  return (code / SCALE).toFixed(2);
}

function ramp(kind) {
  const low = rgb(colour("panel")), high = rgb(colour(kind)), bad = rgb(colour("bad"));
  const colours = Array.from({ length: 256 }, (_, i) => (i <= SCALE ? mix(low, high, Math.sqrt(i / SCALE)) : bad));
  return colours;
}

/* The same heads in CircuitsVis, whose bundle runs only once somebody asks for it. Its AttentionHeads
   keeps tokens as text (AttentionPatterns reads them as markup and is not used). */
function inCircuitsVis(block) {
  const bundle = document.getElementById("circuitsvis");
  if (!bundle) return null;
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
  const name = (k) => (k === n ? "the bias token" : `${block.tokens[k]} (${k})`);
  const state = { query: n - 1 };
  const panels = [];

  function panel(group) {
    const it = { chosen: group.heads[0], key: null };
    const big = el("canvas", { class: "big", role: "img" });
    const readout = el("p", { class: "readout", "aria-live": "polite" });
    const strip = el("ol", { class: "strip", tabindex: "0", role: "listbox", "aria-label": "Tokens, shaded by how much the chosen one looks at them. Arrow keys choose the token that looks." });
    const pieces = Array.from({ length: width }, (_, k) =>
      el("li", { role: "option", id: `${group.kind}-token-${k}` }, el("bdi", {}, k === n ? "⟨bias⟩" : block.tokens[k])));
    strip.append(...pieces);
    const twin = el("tbody");
    const row = () => it.chosen.codes.subarray(state.query * width, (state.query + 1) * width);

    it.draw = () => {
      const colours = ramp(group.kind);
      paint(big, it.chosen.codes, colours);
      const weights = row();
      const ranked = Array.from(weights.keys()).sort((a, b) => weights[b] - weights[a]);
      pieces.forEach((piece, k) => {
        const back = colours[weights[k]];
        piece.style.backgroundColor = `rgb(${back})`;
        piece.style.color = readable(back);
        piece.classList.toggle("chosen", k === state.query);
        piece.setAttribute("aria-selected", k === state.query);
        piece.title = `${name(k)}: ${weightText(weights[k])}`;
      });
      strip.setAttribute("aria-activedescendant", pieces[state.query].id);
      const at = it.key === null ? ranked[0] : it.key;
      readout.replaceChildren(el("span", { class: "head" }, it.chosen.head), " from ", code(state.query), " to ", code(at),
        ": ", el("strong", {}, weightText(weights[at])), it.key === null ? " (where it looks most)" : "");
      big.setAttribute("aria-label", `Attention pattern of ${it.chosen.head}, ${it.chosen.why}; the table below lists the weights of the chosen token`);
      twin.replaceChildren(...ranked.slice(0, 12).map((k) => el("tr", {},
        el("td", { class: "left token-cell" }, code(k)), el("td", {}, weightText(weights[k])))));
    };
    const code = (k) => el("code", { class: "token", dir: "auto" }, name(k));

    /* The whole pattern at device resolution; the chosen row is framed. */
    function paint(canvas, codes, colours) {
      const cell = Math.max(1, Math.floor(1152 / width)), size = cell * width;
      canvas.width = size;
      canvas.height = cell * n;
      canvas.style.aspectRatio = `${width} / ${n}`;
      const context = canvas.getContext("2d");
      const image = small(codes, colours);
      context.imageSmoothingEnabled = false;
      context.drawImage(image, 0, 0, size, cell * n);
      context.fillStyle = colour("quiet");
      context.fillRect(cell * n - 1, 0, 2, cell * n); // the bias column stands apart
      if (cell >= 6) marks(context, codes, cell);
      context.strokeStyle = colour("ink");
      context.lineWidth = Math.max(2, cell / 12);
      context.strokeRect(1, cell * state.query + 1, size - 2, Math.max(cell - 2, 1));
    }

    /* What a colour cannot show is crossed out or marked. */
    function marks(context, codes, cell) {
      context.fillStyle = "#fff";
      context.font = `${Math.floor(cell * 0.8)}px sans-serif`;
      context.textAlign = "center";
      context.textBaseline = "middle";
      codes.forEach((c, i) => {
        if (c <= SCALE) return;
        const mark = c === NOT_A_NUMBER ? "×" : c === ABOVE ? "+" : "−";
        context.fillText(mark, ((i % width) + 0.5) * cell, (Math.floor(i / width) + 0.5) * cell);
      });
    }

    function small(codes, colours) {
      const canvas = el("canvas", { width, height: n });
      const image = new ImageData(width, n);
      codes.forEach((c, i) => image.data.set([...colours[c], 255], 4 * i));
      canvas.getContext("2d").putImageData(image, 0, 0);
      return canvas;
    }

    const cellAt = (event) => {
      const box = big.getBoundingClientRect();
      const limit = (x, top) => Math.max(0, Math.min(top - 1, Math.floor(x)));
      return [limit(((event.clientY - box.top) / box.height) * n, n), limit(((event.clientX - box.left) / box.width) * width, width)];
    };
    big.addEventListener("pointermove", (event) => { [state.query, it.key] = cellAt(event); redraw(); });
    big.addEventListener("pointerleave", () => { it.key = null; redraw(); });
    strip.addEventListener("pointerover", (event) => {
      const k = pieces.indexOf(event.target.closest("li"));
      if (k >= 0 && k < n) { state.query = k; redraw(); }
    });
    strip.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -n, End: n }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      state.query = Math.max(0, Math.min(n - 1, state.query + step));
      redraw();
    });

    const thumbs = el("fieldset", { class: "thumbs" }, el("legend", {}, el("h3", { class: "kind-" + group.kind }, group.title)));
    for (const [i, head] of group.heads.entries()) {
      const canvas = el("canvas", { width: 72, height: 72, "aria-hidden": "true" });
      const input = el("input", { type: "radio", name: "pattern-" + group.kind, value: head.head, checked: i === 0, onchange: () => { it.chosen = head; it.key = null; redraw(); } });
      head.thumb = () => {
        const context = canvas.getContext("2d");
        context.imageSmoothingEnabled = n > 72;
        context.drawImage(small(head.codes, ramp(group.kind)), 0, 0, 72, 72);
      };
      thumbs.append(el("label", {}, input, canvas, el("span", { class: "head" }, head.head), head.why));
    }
    const tools = el("div", { class: "tools" },
      el("button", { type: "button", class: "plain", "aria-label": "Download the pattern as PNG", onclick: () => big.toBlob((blob) => download(it.chosen.head + ".png", blob)) }, "PNG"),
      el("button", { type: "button", class: "plain", "aria-label": "Download the pattern as CSV", onclick: () => {
        const rows = Array.from({ length: n }, (_, q) => [name(q), ...Array.from(it.chosen.codes.subarray(q * width, (q + 1) * width), weightText)]);
        download(it.chosen.head + ".csv", toCsv(["query", ...Array.from({ length: width }, (_, k) => name(k))], rows), "text/csv");
      } }, "CSV"));
    it.root = el("div", { class: "panel" }, thumbs, big, readout, strip, tools,
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

  (async () => {
    for (const group of block.groups) for (const head of group.heads) head.codes = await inflate(head.weights);
    const row = el("div", { class: "panels" });
    for (const group of block.groups) { const it = panel(group); panels.push(it); row.append(it.root); }
    host.append(row, inCircuitsVis(block) || "");
    const everything = () => { panels.forEach((it) => it.draw()); block.groups.forEach((g) => g.heads.forEach((h) => h.thumb())); };
    everything();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", everything);
    host.dataset.ready = "";
  })();
}
