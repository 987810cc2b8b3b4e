/* The edges of a graph as one picture, larger than what is seen of it. A frame only lays the picture down where
   it belongs; a new one is painted a few milliseconds a frame and takes its place when it is finished. So
   panning costs the same for a thousand edges as for a hundred thousand. */
const EDGE_MARGIN = 0.35, EDGE_BUDGET = 5; // of the window on each side; milliseconds of painting in a frame

const edgeWidth = (weight, biggest) => 0.5 + 4.5 * Math.sqrt(Math.abs(weight) / biggest);

function strokeEdge(context, [ax, ay], [bx, by]) {
  const middle = (ay + by) / 2;
  context.beginPath();
  context.moveTo(ax, ay);
  context.bezierCurveTo(ax, middle, bx, middle, bx, by);
  context.stroke();
}

function edgePicture(model, layout) {
  let shown = null, job = null; // pictures: { canvas, view, area, left, top, version }
  const ratio = () => Math.min(2, globalThis.devicePixelRatio || 1);

  function begin(view, area, edges, version, colours) {
    const margin = [EDGE_MARGIN * area.width, EDGE_MARGIN * area.height];
    const width = area.width + 2 * margin[0], height = area.height + 2 * margin[1];
    const canvas = document.createElement("canvas");
    canvas.width = Math.round(width * ratio());
    canvas.height = Math.round(height * ratio());
    const context = canvas.getContext("2d");
    context.scale(ratio(), ratio());
    context.globalAlpha = 0.16;
    job = { canvas, context, view, width, height, version, edges, colours, done: 0, margin, area: { left: margin[0], top: margin[1], width: area.width, height: area.height } };
  }

  function paintOne({ context, area, view, colours, width, height }, e) {
    const [a, b] = [model.source[e], model.target[e]];
    const from = toScreen(layout, area, view, layout.x[a], layout.y[a]), to = toScreen(layout, area, view, layout.x[b], layout.y[b]);
    if (Math.max(from[0], to[0]) < 0 || Math.min(from[0], to[0]) > width || Math.max(from[1], to[1]) < 0 || Math.min(from[1], to[1]) > height) return;
    context.strokeStyle = model.weight[e] < 0 ? colours.minus : colours.plus;
    context.lineWidth = edgeWidth(model.weight[e], model.biggest);
    context.setLineDash(model.weight[e] < 0 && context.lineWidth > 1 ? [5, 3] : []);
    strokeEdge(context, from, to);
  }

  function work() {
    const until = performance.now() + EDGE_BUDGET;
    while (job.done < job.edges.length && (job.done % 16 || performance.now() < until)) paintOne(job, job.edges[job.done++]);
    if (job.done < job.edges.length) return;
    shown = job;
    job = null;
  }

  /* Does a picture hold all that the window shows, as it is now? */
  function covers(picture, view, area, version) {
    if (!picture || picture.version !== version || picture.view.zoom !== view.zoom) return false;
    if (picture.area.width !== area.width || picture.area.height !== area.height) return false;
    const [x, y] = toScreen(layout, { ...area, left: 0, top: 0 }, view, picture.view.x, picture.view.y);
    return Math.abs(x - area.width / 2) <= picture.margin[0] && Math.abs(y - area.height / 2) <= picture.margin[1];
  }

  return {
    /* Lays the picture down; true while a better one is on its way. */
    draw(context, view, area, edges, version, colours) {
      if (!covers(shown, view, area, version) && !covers(job, view, area, version)) begin(view, area, edges, version, colours);
      if (job) work();
      if (shown) {
        const by = scales(layout, area, view.zoom)[0] / scales(layout, shown.area, shown.view.zoom)[0];
        const down = scales(layout, area, view.zoom)[1] / scales(layout, shown.area, shown.view.zoom)[1];
        const [x, y] = toScreen(layout, area, view, shown.view.x, shown.view.y);
        context.drawImage(shown.canvas, x - (shown.width / 2) * by, y - (shown.height / 2) * down, shown.width * by, shown.height * down);
      }
      return job !== null;
    },
  };
}
