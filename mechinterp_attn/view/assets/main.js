const DRAW = { table: drawTable, patterns: drawPatterns, matrix: drawMatrix, graph: drawGraph };

function drawGraph(host, block) {
  const box = el("div");
  host.append(box);
  drawAttributionGraph(box, block.graph);
  const stage = box.querySelector(".graph-scroll");
  stage.scrollLeft = stage.scrollWidth; // the target stands at the last token
  host.append(figureTools(() => block.id, () => block.graph.title, stage.querySelector("svg")));
}

/* Words and charts are on the screen before this runs; then block after block, each in a turn of its own,
   so that the page scrolls and answers meanwhile. */
const turn = () => new Promise((done) => setTimeout(done));
async function drawAll() {
  await new Promise((done) => { requestAnimationFrame(done); setTimeout(done, 300); }); // a hidden page has no frames
  await turn();
  const report = JSON.parse(document.getElementById("data").textContent);
  for (const host of document.querySelectorAll("[data-block]")) {
    await turn();
    const block = report.sections.find((s) => s.id === host.dataset.section).blocks[host.dataset.block];
    await DRAW[block.type](host, block);
  }
  document.documentElement.dataset.ready = "";
}
drawAll();

/* Charts come as SVG in the page; here they get their buttons. */
for (const figure of document.querySelectorAll("[data-chart]")) {
  const caption = figure.querySelector("figcaption").textContent;
  const pictures = [...figure.querySelectorAll("svg")]; // of a picture in two widths, the one that is shown
  const shown = pictures.find((svg) => svg.getClientRects().length) || pictures[0];
  figure.append(figureTools(() => figure.dataset.chart, () => caption, shown));
}

/* The section in view is marked in the table of contents. */
const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
const spy = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    links.forEach((a) => a.removeAttribute("aria-current"));
    links.get(entry.target.id).setAttribute("aria-current", "true");
  }
}, { rootMargin: "-10% 0px -80% 0px" });
document.querySelectorAll("main section").forEach((section) => spy.observe(section));
