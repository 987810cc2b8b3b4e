const DRAW = { table: drawTable, patterns: drawPatterns, matrix: drawMatrix, graph: drawGraph };

function drawGraph(host, block) {
  drawAttributionGraph(host, block.graph, block.id);
}

/* Words and charts are on the screen before this runs; then block after block, each in a turn of its own,
   so that the page scrolls and answers meanwhile. What stands in a fold is drawn when the fold opens. */
const turn = () => new Promise((done) => setTimeout(done));
const report = JSON.parse(document.getElementById("data").textContent);
const drawn = new Map(); // by place on the page: when it is drawn
function drawBlock(host) {
  if (!drawn.has(host)) {
    const block = report.sections.find((s) => s.id === host.dataset.section).blocks[host.dataset.block];
    drawn.set(host, turn().then(() => DRAW[block.type](host, block)));
  }
  return drawn.get(host);
}
async function drawIn(place) {
  for (const host of place.querySelectorAll("[data-block]")) await drawBlock(host);
}
for (const fold of document.querySelectorAll(".fold")) fold.addEventListener("toggle", () => fold.open && drawIn(fold));

/* A link to a section or a block opens the fold that it stands in, and arrives there once all is drawn. */
async function arrive() {
  const name = location.hash.slice(1).split("?")[0]; // behind it, the state of what stands there
  const place = name !== "" && document.getElementById(decodeURIComponent(name));
  if (!place) return;
  const fold = place.closest(".fold") || place.querySelector(":scope > .fold");
  if (fold) {
    fold.open = true;
    await drawIn(fold);
  }
  place.scrollIntoView();
}
async function drawAll() {
  await new Promise((done) => { requestAnimationFrame(done); setTimeout(done, 300); }); // a hidden page has no frames
  for (const host of document.querySelectorAll("[data-block]")) {
    if (!host.closest(".fold:not([open])")) await drawBlock(host);
  }
  await arrive();
  document.documentElement.dataset.ready = "";
}
drawAll();
addEventListener("hashchange", arrive);
document.addEventListener("click", (event) => { // the same link once more
  const link = event.target.closest('a[href^="#"]');
  if (link && link.hash === location.hash) arrive();
});
const unfold = document.getElementById("unfold");
unfold.addEventListener("click", () => {
  const folds = [...document.querySelectorAll(".fold")], open = folds.some((fold) => !fold.open);
  for (const fold of folds) fold.open = open;
  unfold.textContent = open ? "Close all" : "Open all";
});

/* Charts come as SVG in the page; here they get their buttons. */
for (const figure of document.querySelectorAll("[data-chart]")) {
  const caption = figure.querySelector("figcaption").textContent;
  const pictures = [...figure.querySelectorAll("svg")]; // of a picture in two widths, the one that is shown
  const shown = pictures.find((svg) => svg.getClientRects().length) || pictures[0];
  figure.append(figureTools(() => figure.dataset.chart, () => caption, shown));
}

/* The section in view is marked in the table of contents. */
const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
const sections = [...document.querySelectorAll("main section")], inView = new Set();
const spy = new IntersectionObserver((entries) => {
  for (const entry of entries) inView[entry.isIntersecting ? "add" : "delete"](entry.target);
  const first = sections.find((section) => inView.has(section));
  if (!first) return;
  for (const a of links.values()) a.removeAttribute("aria-current");
  links.get(first.id).setAttribute("aria-current", "true");
}, { rootMargin: "-2% 0px -80% 0px" });
for (const section of sections) spy.observe(section);
