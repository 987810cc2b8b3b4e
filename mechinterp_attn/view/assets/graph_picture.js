/* A graph as one picture, larger than what is seen of it. A frame only moves the picture to where it belongs, which
   browsers do without painting; a new one is painted little by little, out of sight, and takes its place when it is
   finished. So moving the window costs the same for a thousand edges as for a hundred thousand. */
const PICTURE_MARGIN = 0.4; // of the window, on each side
const ZOOM_RESTS = 120; // milliseconds without zooming before the picture is painted anew; it is stretched meanwhile
const FRAME_GOAL = 19; // milliseconds between frames while painting: more is painted at a time, or less

/* A picture has two layers: `paintScene([below, above], scene, area, width, height)` is a generator that pauses after
   every stroke or so, the most important ones first, and yields true where the picture can already be shown.
   `holder` is the element that the pictures lie in. */
function scenePicture(holder, layout, paintScene) {
  let shown = null, job = null, spare = null, chunk = 150, lastFrame = 0, lastZoom = 0, zoomedAt = 0;
  const ratio = () => Math.min(2, globalThis.devicePixelRatio || 1);
  const blank = () => {
    const sheet = el("div", { class: "graph-sheet", hidden: true }, el("canvas"), el("canvas"));
    holder.append(sheet);
    return sheet;
  };

  function begin(scene, area) {
    const margin = [Math.round(PICTURE_MARGIN * area.width), Math.round(PICTURE_MARGIN * area.height)];
    const width = area.width + 2 * margin[0], height = area.height + 2 * margin[1];
    const sheet = job?.sheet || spare || blank();
    spare = null;
    sheet.style.width = `${width}px`;
    sheet.style.height = `${height}px`;
    const contexts = [...sheet.children].map((canvas) => {
      canvas.width = Math.round(width * ratio()); // and it is blank
      canvas.height = Math.round(height * ratio());
      const context = canvas.getContext("2d");
      context.scale(ratio(), ratio());
      return context;
    });
    const own = { left: margin[0], top: margin[1], width: area.width, height: area.height };
    job = { sheet, margin, width, height, area: own, view: scene.view, version: scene.version, steps: paintScene(contexts, scene, own, width, height) };
  }

  function work(now) {
    if (now - lastFrame < 200) chunk = Math.max(100, Math.min(1500, chunk * (now - lastFrame > FRAME_GOAL ? 0.6 : 1.15)));
    for (let i = 0; i < chunk; i++) {
      const { done, value } = job.steps.next();
      if (value) job.usable = true;
      if (!done) continue;
      spare = shown?.sheet || null;
      shown = job;
      job = null;
      return;
    }
  }

  /* Does a picture hold all that the window shows, as it is now? */
  function covers(picture, { view, version }, area) {
    if (!picture || picture.version !== version || picture.view.zoom !== view.zoom) return false;
    if (picture.area.width !== area.width || picture.area.height !== area.height) return false;
    const [x, y] = toScreen(layout, { ...area, left: 0, top: 0 }, view, picture.view.x, picture.view.y);
    return Math.abs(x - area.width / 2) <= picture.margin[0] && Math.abs(y - area.height / 2) <= picture.margin[1];
  }
  const needed = (scene, area) => !covers(shown, scene, area) && !(job && job.version === scene.version && job.view.zoom === scene.view.zoom);

  /* Moves the picture to its place; true while a better one is on its way. */
  return (scene, area, now) => {
    const { view } = scene;
    if (view.zoom !== lastZoom) { lastZoom = view.zoom; zoomedAt = now; }
    const resting = !shown || shown.version !== scene.version || now - zoomedAt >= ZOOM_RESTS;
    if (needed(scene, area) && resting) begin(scene, area);
    if (job) work(now);
    lastFrame = now;
    const best = shown && (covers(shown, scene, area) || !job?.usable) ? shown : job;
    const [[sx, sy], [ox, oy]] = [scales(layout, area, view.zoom), scales(layout, best.area, best.view.zoom)];
    const [x, y] = toScreen(layout, area, view, best.view.x, best.view.y), [w, h] = [sx / ox, sy / oy];
    best.sheet.style.transform = `translate(${x - (best.width * w) / 2}px, ${y - (best.height * h) / 2}px) scale(${w}, ${h})`;
    for (const sheet of holder.children) sheet.hidden = sheet !== best.sheet;
    return job !== null || !covers(shown, scene, area);
  };
}
