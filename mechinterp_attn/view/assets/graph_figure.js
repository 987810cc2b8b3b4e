/* Pinned nodes and groups as a picture of boxes and arrows, vector, for the page and for a paper. All its colours
   and fonts are written in it, and its fonts are those that every program has. */
const FIGURE_FONT = "Helvetica, Arial, sans-serif";
const PAPER = {
  ink: "#000000", quiet: "#444444", panel: "#ffffff", rule: "#bbbbbb", attention: "#6d3fa0", mlp: "#8a5a00", feature: "#0b6b78",
  error: "#8f3568", skip: "#7a4e3a", token: "#3f6a2e", bias: "#6b6b6b", plus: "#2a5d9f", minus: "#b3261e",
};
const BOX = { height: 36, gap: 22, between: 62, pad: 18, longest: 40 };
const MOST_ARROWS = 40, WITH_NUMBERS = 14; // the strongest ones

const textWidth = (text, size) => [...text].reduce((sum, c) => sum + (c.codePointAt(0) > 0x2e7f ? 1 : 0.57), 0) * size;
const inTwo = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);

/* Boxes with their places: earlier layers lower, positions from left to right, none on top of another. */
function figureBoxes(model, items, value) {
  const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
  const top = 1 + Math.max(0, ...model.nodes.map((node) => node.row ?? 0));
  const heightOf = (node) => (node.kind === "logit" ? top : node.row === null ? -1 : node.row);
  const boxes = items.map((item, k) => {
    const one = item.nodes.length === 1 && item.name === null ? item.nodes[0] : null;
    const kinds = new Set(item.nodes.map((node) => node.kind));
    const name = shorten(one ? placed(model, one) : item.name, BOX.longest);
    const below = one ? inTwo(value[k]) : `${item.nodes.length} node${item.nodes.length === 1 ? "" : "s"}, ${inTwo(value[k])}`;
    return {
      k, name, below, kind: kinds.size === 1 ? [...kinds][0] : "ink", group: !one,
      width: Math.max(textWidth(name, 12), textWidth(below, 10)) + 2 * 10,
      level: Math.round(mean(item.nodes.map(heightOf))), want: mean(item.nodes.map((node) => (node.position === null ? -1 : node.position))),
    };
  });
  const levels = [...new Set(boxes.map((box) => box.level))].sort((a, b) => b - a);
  const rows = levels.map((level) => boxes.filter((box) => box.level === level).sort((a, b) => a.want - b.want || a.k - b.k));
  const long = (row) => row.reduce((sum, box) => sum + box.width + BOX.gap, -BOX.gap);
  const width = Math.max(420, ...rows.map(long)) + 2 * BOX.pad, [least, most] = [Math.min(...boxes.map((b) => b.want)), Math.max(...boxes.map((b) => b.want))];
  rows.forEach((row, i) => {
    let from = BOX.pad, left = long(row);
    for (const box of row) {
      const middle = most > least ? BOX.pad + ((box.want - least) / (most - least)) * (width - 2 * BOX.pad) : width / 2;
      box.x = Math.min(Math.max(from, middle - box.width / 2), width - BOX.pad - left);
      box.y = BOX.pad + i * (BOX.height + BOX.between);
      from = box.x + box.width + BOX.gap;
      left -= box.width + BOX.gap;
    }
  });
  return { boxes, width, height: rows.length * (BOX.height + BOX.between) - BOX.between + 2 * BOX.pad };
}

/* An arrow from box to box, ending just before it; within one level it goes round below. `at(t)` is a point on it. */
function arrowBetween(from, to) {
  const [ax, bx] = [from.x + from.width / 2, to.x + to.width / 2], by = to.y + BOX.height + 5, up = from.y > to.y;
  const ay = up ? from.y : from.y + BOX.height, turn = up ? (ay + by) / 2 : Math.max(ay, by) + 26;
  const along = (t, a, b, c, d) => (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t ** 2 * c + t ** 3 * d;
  return { d: `M${ax},${ay}C${ax},${turn} ${bx},${turn} ${bx},${by}`, tip: [bx, by], at: (t) => [along(t, ax, ax, bx, bx), along(t, ay, turn, turn, by)] };
}

/* Where the number of an arrow stands: on it, beside every box and every stronger number; null where there is no room. */
function numberPlace(arrow, boxes, taken) {
  for (const t of [0.5, 0.62, 0.38, 0.74, 0.26]) {
    const [x, y] = arrow.at(t);
    if (!boxes.some((box) => x > box.x - 18 && x < box.x + box.width + 18 && y > box.y - 8 && y < box.y + BOX.height + 8) && roomFor(taken, x, y, 18)) return [x, y];
  }
  return null;
}

function graphFigure(model, items, colours) {
  const { value, edges } = between(model, items);
  const { boxes, width, height } = figureBoxes(model, items, value);
  const text = (content, x, y, size, fill, more) => svgEl("text", { x, y, "font-family": FIGURE_FONT, "font-size": size, fill, "text-anchor": "middle", "xml:space": "preserve", ...more }, content);
  const drawn = edges.slice(0, MOST_ARROWS), biggest = Math.abs(drawn[0]?.weight || 1), taken = [];
  const arrows = svgEl("g", {}), numbers = svgEl("g", {});
  drawn.forEach(({ from, to, weight }, rank) => {
    const colour = weight < 0 ? colours.minus : colours.plus, arrow = arrowBetween(boxes[from], boxes[to]), [x, y] = arrow.tip;
    const thick = 0.6 + 3.4 * Math.sqrt(Math.abs(weight) / biggest), wing = 2.5 + thick;
    arrows.append(
      svgEl("path", { d: arrow.d, fill: "none", stroke: colour, "stroke-width": thick.toFixed(2), "stroke-opacity": 0.75, "stroke-dasharray": weight < 0 ? "6 4" : undefined }),
      svgEl("path", { d: `M${x},${y - 5}L${x - wing},${y + wing}L${x + wing},${y + wing}Z`, fill: colour }));
    const free = rank < WITH_NUMBERS ? numberPlace(arrow, boxes, taken) : null;
    if (free) numbers.append(text(inTwo(weight), free[0], free[1] + 3, 10, colour, { stroke: colours.panel, "stroke-width": 3, "paint-order": "stroke" }));
  });
  const shapes = boxes.map((box) => svgEl("g", {},
    svgEl("rect", { x: box.x, y: box.y, width: box.width, height: BOX.height, rx: box.kind === "token" || box.kind === "bias" ? 2 : 9, fill: colours.panel, stroke: colours[box.kind] || colours.ink, "stroke-width": box.group ? 2.5 : 1.4 }),
    text(box.name, box.x + box.width / 2, box.y + 15, 12, colours.ink, { "font-weight": 600 }), text(box.below, box.x + box.width / 2, box.y + 28, 10, colours.quiet)));
  const said = `${boxes.length} nodes and groups, ${drawn.length} edges. ${drawn.slice(0, 5).map((e) => `${boxes[e.from].name} to ${boxes[e.to].name}: ${inTwo(e.weight)}`).join("; ")}`;
  return svgEl("svg", { xmlns: SVG, viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": said },
    svgEl("rect", { width, height, fill: colours.panel }), arrows, ...shapes, numbers);
}

/* The same as a file: on white, whatever the page's colours are. */
function figureFile(model, items) {
  const svg = graphFigure(model, items, PAPER), { width, height } = svg.viewBox.baseVal;
  return { text: new XMLSerializer().serializeToString(svg), width, height };
}
