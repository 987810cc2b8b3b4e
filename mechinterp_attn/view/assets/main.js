const DRAW = { table: drawTable, patterns: drawPatterns, matrix: drawMatrix, graph: drawGraph };

function drawGraph(host, block) {
  drawAttributionGraph(host, block.graph);
  const stage = host.querySelector(".graph-scroll");
  stage.scrollLeft = stage.scrollWidth; // the target stands at the last token
}

for (const host of document.querySelectorAll("[data-block]")) {
  const block = report.sections.find((s) => s.id === host.dataset.section).blocks[host.dataset.block];
  DRAW[block.type](host, block);
}

/* Charts download with their colours written into them. */
for (const figure of document.querySelectorAll("[data-chart]")) {
  const picture = figure.querySelector("svg");
  function standalone() {
    const copy = picture.cloneNode(true);
    const [from, to] = [picture, copy].map((svg) => [svg, ...svg.querySelectorAll("*")]);
    from.forEach((node, i) => {
      const style = getComputedStyle(node);
      for (const name of ["fill", "stroke", "stroke-width", "stroke-dasharray", "paint-order", "font-size", "font-family"])
        to[i].setAttribute(name, style.getPropertyValue(name));
    });
    const { width, height } = picture.viewBox.baseVal;
    copy.setAttribute("width", width);
    copy.setAttribute("height", height);
    return new XMLSerializer().serializeToString(copy);
  }
  async function png() {
    const { width, height } = picture.viewBox.baseVal;
    const image = new Image();
    image.src = "data:image/svg+xml;base64," + btoa(unescape(encodeURIComponent(standalone())));
    await image.decode();
    const canvas = el("canvas", { width: 2 * width, height: 2 * height });
    const context = canvas.getContext("2d");
    context.fillStyle = colour("panel");
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => download(figure.dataset.chart + ".png", blob));
  }
  const caption = figure.querySelector("figcaption").textContent;
  figure.append(el("div", { class: "tools" },
    el("button", { type: "button", class: "plain", "aria-label": "Download as SVG: " + caption, onclick: () => download(figure.dataset.chart + ".svg", standalone(), "image/svg+xml") }, "SVG"),
    el("button", { type: "button", class: "plain", "aria-label": "Download as PNG: " + caption, onclick: png }, "PNG")));
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
document.documentElement.dataset.ready = "";
