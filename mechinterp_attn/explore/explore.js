/* The explorer: a prompt, its prediction, edits of heads, and the story in a frame of its own. */

const $ = (id) => document.getElementById(id);
const state = { prompt: "", tokens: [], rows: [], edits: [], atOnce: true };
const asked = { predict: 0, edit: 0, story: 0 }, wrong = {};

/* Ask the server; of several questions of a kind only the last one is answered. */
async function ask(kind, question) {
  const turn = ++asked[kind];
  let answer;
  try {
    const response = await fetch(kind, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question) });
    answer = await response.json();
  } catch {
    answer = { error: "The explorer does not answer: has it been stopped?" };
  }
  if (turn !== asked[kind]) return null;
  say(kind, answer.error);
  return answer.error ? null : answer;
}

/* An error stays until the same is asked again. */
function say(kind, error) {
  wrong[kind] = error;
  $("error").textContent = Object.values(wrong).filter(Boolean).join(" ");
}

const tokenCode = (text) => el("code", { class: "token", dir: "auto" }, text);
const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(1) : p >= 1e-5 ? (100 * p).toPrecision(2) : (100 * p).toExponential(0)) + " %";
const position = () => Number($("at").value || -1);

async function run() {
  state.prompt = $("prompt").value;
  $("wait").textContent = "Running the model…";
  const answer = await ask("predict", { prompt: state.prompt, position: -1 });
  $("wait").textContent = "";
  if (!answer) return;
  Object.assign(state, { tokens: answer.tokens, rows: answer.rows, atOnce: answer.at_once });
  $("at").replaceChildren(...state.tokens.map((token, i) => el("option", { value: i, selected: i === answer.position }, `${i} ${token}`)));
  drawHeads(answer.heads);
  for (const edit of state.edits) if (edit.position >= state.tokens.length) edit.position = null;
  drawEdits();
  await edited();
  if (state.atOnce) story();
  else $("write").hidden = false;
}

/* Another position is read: the prediction and direct effects there, the same edits. */
async function readAt() {
  const answer = await ask("predict", { prompt: state.prompt, position: position() });
  if (!answer) return;
  state.rows = answer.rows;
  drawHeads(answer.heads);
  await edited();
}

async function edited() {
  $("clear").hidden = state.edits.length === 0;
  if (state.edits.length === 0) {
    asked.edit++; // an answer on its way is too late
    say("edit");
    drawPrediction(state.rows, null);
    return;
  }
  const edits = state.edits.map(({ heads, scale, source, position }) => ({ heads, scale, source, position }));
  const answer = await ask("edit", { prompt: state.prompt, position: position(), edits });
  if (answer) drawPrediction(answer.rows, answer);
}

async function story() {
  $("write").hidden = true;
  $("frame").hidden = true;
  $("wait").textContent = "Cutting heads and writing the story…";
  const answer = await ask("story", { prompt: state.prompt, position: position() });
  if (!answer) { $("wait").textContent = ""; return; }
  $("wait").textContent = "";
  $("frame").src = `story/${answer.id}`;
  $("frame").hidden = false;
}

function drawPrediction(rows, answer) {
  const likeliest = rows.reduce((a, b) => (b.before > a.before ? b : a));
  const now = answer && rows.reduce((a, b) => (b.after > a.after ? b : a));
  $("said").replaceChildren(tokenCode(likeliest.token), " ", el("strong", {}, percent(likeliest.before)),
    ...(answer ? [" → ", el("strong", { class: likeliest.after < likeliest.before ? "down" : "up" }, percent(likeliest.after)),
      ...(now.token_id === likeliest.token_id ? [] : ["; now ", tokenCode(now.token), " ", el("strong", {}, percent(now.after))])] : []));
  const names = answer ? ["token", "", "before", "after"] : ["token", "", "probability"];
  $("prediction").tHead.replaceChildren(el("tr", {}, ...names.map((name, i) => el("th", { scope: "col", class: i ? "" : "left" }, name))));
  $("prediction").tBodies[0].replaceChildren(...rows.map((row) => el("tr", {},
    el("th", { scope: "row", class: "left" }, tokenCode(row.token)),
    el("td", { class: "bars" }, bar(row.before, answer ? "was" : "is"), answer ? bar(row.after, "is") : null),
    el("td", {}, percent(row.before)),
    answer ? el("td", { class: row.after < row.before ? "down" : "up" }, percent(row.after)) : null)));
  $("receipt").textContent = answer ? answer.receipt : "";
  $("receipt").className = answer && !answer.ok ? "failed" : "quiet";
}

function bar(p, kind) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), rect = document.createElementNS(svg.namespaceURI, "rect");
  for (const [name, value] of [["width", `${100 * p}%`], ["height", "100%"], ["class", kind]]) rect.setAttribute(name, value);
  svg.setAttribute("aria-hidden", "true");
  svg.append(rect);
  return el("span", { class: "pair" }, svg);
}

function drawHeads(heads) {
  $("known").replaceChildren(...heads.map(({ head }) => el("option", { value: head })));
  $("heads").replaceChildren(...heads.map(({ head, kind, value }) => el("li", {},
    el("button", { type: "button", class: "kind-" + kind, title: `cut ${head}`, onclick: () => add(head) }, head, el("span", { class: "value" }, formatNumber(value, true))))));
}

function add(heads) {
  state.edits.push({ heads, scale: 0, source: null, position: null });
  drawEdits();
  edited();
}

function drawEdits() {
  $("edits").replaceChildren(...state.edits.map(editRow));
}

function editRow(edit) {
  const change = (values) => { Object.assign(edit, values); edited(); };
  const name = `of ${edit.heads}`;
  const shown = el("output", {}, said(edit));
  const scale = el("input", { type: "range", min: -3, max: 5, step: 0.25, value: edit.scale, "aria-label": `Scale ${name}`,
    oninput: () => { change({ scale: Number(scale.value) }); shown.textContent = said(edit); } });
  const where = el("select", { "aria-label": `Position ${name}`, onchange: () => change({ position: where.value === "" ? null : Number(where.value) }) },
    el("option", { value: "" }, "everywhere"),
    ...state.tokens.map((token, i) => el("option", { value: i, selected: i === edit.position }, `at ${i} ${token}`)));
  const source = el("input", { class: "source", type: "text", spellcheck: "false", value: edit.source ?? "", placeholder: "another prompt of as many tokens", "aria-label": `Prompt to take values ${name} from`,
    onchange: () => change({ source: source.value === "" ? null : source.value }) });
  const from = el("select", { "aria-label": `What to do ${name}`, onchange: () => {
    const patched = from.value === "source";
    source.hidden = !patched;
    scale.value = patched ? 1 : 0;
    shown.textContent = said({ scale: Number(scale.value) });
    change({ scale: Number(scale.value), source: patched && source.value !== "" ? source.value : null });
  } }, el("option", { value: "own" }, "scale"), el("option", { value: "source", selected: edit.source !== null }, "patch from"));
  source.hidden = edit.source === null;
  const remove = el("button", { type: "button", class: "remove", "aria-label": `Undo the edit ${name}`, onclick: () => {
    state.edits.splice(state.edits.indexOf(edit), 1);
    drawEdits();
    edited();
  } }, "✕");
  return el("li", {}, el("div", { class: "row" }, el("span", { class: "head" }, edit.heads), from, where, remove), el("div", { class: "row" }, scale, shown, source));
}

const said = ({ scale }) => (scale === 0 ? "cut" : `× ${scale}`);

$("ask").addEventListener("submit", (event) => { event.preventDefault(); run(); });
$("prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); } });
$("at").addEventListener("change", readAt);
$("add").addEventListener("submit", (event) => {
  event.preventDefault();
  const heads = $("head").value.trim();
  if (heads) add(heads);
  $("head").value = "";
});
$("clear").addEventListener("click", () => { state.edits = []; drawEdits(); edited(); });
$("write").addEventListener("click", story);
/* A card in the story has a button that asks to cut its head. The frame has no origin: only a label counts. */
addEventListener("message", (event) => {
  if (event.source === $("frame").contentWindow && typeof event.data?.head === "string") add(event.data.head.slice(0, 200));
});
run();
