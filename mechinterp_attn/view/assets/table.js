/* Tables: sorted and filtered in place, a page of rows in the document at a time. */
function drawTable(host, block) {
  const numeric = (c) => ["number", "signed", "score", "layer", "id"].includes(c.kind);
  const data = {};
  for (const c of block.columns) data[c.key] = numeric(c) ? block.data[c.key].map(asNumber) : block.data[c.key];
  const total = block.data[block.columns[0].key].length;
  const all = Array.from({ length: total }, (_, i) => i);
  const largest = {};
  for (const c of block.columns) {
    if (c.kind === "signed")
      largest[c.key] = data[c.key].reduce((m, x) => (Number.isFinite(x) ? Math.max(m, Math.abs(x)) : m), 0) || 1;
  }
  const state = { sort: block.sort, down: true, page: 0, shown: all, tests: {} };

  /* What is no number sorts last, either way; signed values sort by value. */
  function order() {
    const kept = all.filter((i) => Object.values(state.tests).every((test) => test(i)));
    const column = block.columns.find((c) => c.key === state.sort);
    if (column) {
      const values = data[column.key];
      const sign = state.down ? -1 : 1;
      if (numeric(column)) {
        const missing = (x) => x === null || Number.isNaN(x);
        kept.sort((a, b) => missing(values[a]) - missing(values[b]) || sign * (values[a] - values[b]) || a - b);
      } else {
        const collator = new Intl.Collator("en", { numeric: true });
        kept.sort((a, b) => sign * collator.compare(values[a], values[b]) || a - b);
      }
    }
    state.shown = kept;
    state.page = 0;
    draw();
  }

  function cell(c, i) {
    const x = data[c.key][i];
    if (c.kind === "head") return el("td", { class: "left" }, headName(x));
    if (c.kind === "kind") {
      const name = x === "mlp" ? "MLP-derived" : x;
      return el("td", { class: "left kind-" + x }, name);
    }
    if (x === "") return el("td", { class: "left" }, "–");
    if (c.kind === "tokens") return el("td", { class: "left token-cell" }, ...x.flatMap((token) => [el("code", { class: "token", dir: "auto" }, token), " "]));
    if (c.kind === "token") return el("td", { class: "left token-cell" }, el("code", { class: "token", dir: "auto" }, x));
    if (c.kind === "badge") return el("td", { class: "left" }, el("span", { class: "badge" }, x));
    if (c.kind === "text") return el("td", { class: "left text-cell" }, x);
    if (c.kind === "id" || c.kind === "layer") return el("td", {}, x === null ? "–" : String(x));
    const text = formatNumber(x, c.kind === "signed");
    if (c.kind === "number" || x === null || !Number.isFinite(x)) return el("td", {}, text);
    const fill = el("i", { class: c.kind === "score" ? "" : x < 0 ? "minus" : "plus" }); // signed bars grow from the middle
    fill.style.width = (c.kind === "score" ? 100 : 50) * Math.min(1, Math.abs(x) / (largest[c.key] || 1)) + "%";
    return el("td", {}, el("span", { class: "bar " + c.kind, "aria-hidden": "true" }, fill), el("span", { class: "figure" }, text));
  }

  const left = (c) => ["head", "kind", "token", "tokens", "text", "badge"].includes(c.kind);
  const headers = block.columns.map((c) =>
    el("th", { scope: "col", class: left(c) ? "left" : "", "aria-sort": "none", title: c.help || undefined },
      el("button", { type: "button", onclick: () => {
        state.down = state.sort === c.key ? !state.down : !left(c);
        state.sort = c.key;
        order();
      } }, c.label)));
  const body = el("tbody");
  const count = el("span", { class: "count", "aria-live": "polite" });
  const back = el("button", { type: "button", onclick: () => { state.page--; draw(); } }, "Previous");
  const next = el("button", { type: "button", onclick: () => { state.page++; draw(); } }, "Next");

  function draw() {
    const start = state.page * block.rows;
    const rows = state.shown.slice(start, start + block.rows);
    body.replaceChildren(...rows.map((i) => el("tr", {}, ...block.columns.map((c) => cell(c, i)))));
    block.columns.forEach((c, k) =>
      headers[k].setAttribute("aria-sort", c.key !== state.sort ? "none" : state.down ? "descending" : "ascending"));
    const n = state.shown.length;
    count.textContent = n === 0 ? "no rows" : n <= block.rows && n === total ? n + " rows"
      : `${(start + 1).toLocaleString("en")}–${(start + rows.length).toLocaleString("en")} of ${n.toLocaleString("en")} rows`;
    back.disabled = start === 0;
    next.disabled = start + rows.length >= n;
  }

  function choice(key, label) {
    const values = [...new Set(data[key])].sort((a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(b)));
    const select = el("select", { "aria-label": label, onchange: () => {
      const wanted = select.value;
      if (wanted === "") delete state.tests[key];
      else state.tests[key] = (i) => String(data[key][i]) === wanted;
      order();
    } }, el("option", { value: "" }, "all"), ...values.map((v) => el("option", { value: String(v) }, v === "mlp" ? "MLP-derived" : String(v))));
    return el("label", {}, label, select);
  }

  function byLabel(key, label) {
    const input = el("input", { type: "search", "aria-label": label, placeholder: "such as L1H", oninput: () => {
      const wanted = input.value.trim().toLowerCase();
      if (wanted === "") delete state.tests[key];
      else state.tests[key] = (i) => data[key][i].toLowerCase().startsWith(wanted);
      order();
    } });
    return el("label", {}, label, input);
  }

  function threshold() {
    const columns = block.columns.filter((c) => c.kind === "score" || c.kind === "signed");
    const select = el("select", { "aria-label": "Column of the threshold", onchange: apply }, ...columns.map((c) => el("option", { value: c.key }, c.label)));
    const input = el("input", { type: "number", step: "any", "aria-label": "Least size of the value", oninput: apply });
    function apply() {
      const least = parseFloat(input.value);
      const values = data[select.value];
      if (Number.isNaN(least)) delete state.tests.threshold;
      else state.tests.threshold = (i) => Math.abs(values[i]) >= least;
      order();
    }
    return el("label", {}, select, "at least", input);
  }

  const tools = el("div", { class: "tools" });
  for (const name of block.filters) {
    const c = block.columns.find((column) => column.key === name);
    tools.append(name === "score" ? threshold() : c.kind === "head" ? byLabel(c.key, c.label) : choice(c.key, c.label));
  }
  tools.append(count);
  if (total > block.rows) tools.append(back, next);
  tools.append(el("button", { type: "button", class: "plain", "aria-label": "Download as CSV: " + block.caption, onclick: () => {
    const rows = state.shown.map((i) => block.columns.map((c) => block.data[c.key][i]));
    download(block.id + ".csv", toCsv(block.columns.map((c) => c.key), rows), "text/csv");
  } }, "CSV"));
  host.append(
    el("p", { class: "caption", id: "caption-" + block.id }, block.caption),
    tools,
    el("div", { class: "scroller", tabindex: "0", role: "region", "aria-labelledby": "caption-" + block.id },
      el("table", { id: "table-" + block.id, "aria-labelledby": "caption-" + block.id },
        el("thead", {}, el("tr", {}, ...headers)), body)));
  order();
}
