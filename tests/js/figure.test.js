const assert = require("node:assert/strict");
const { test } = require("node:test");
const { load } = require("./load.js");

// An image that loads when it is told to, and a canvas whose asynchronous ways never answer.
class SlowImage {
  decode() { return new Promise(() => {}); }
  set src(text) { this.url = text; queueMicrotask(() => (text.includes("broken") ? this.onerror() : this.onload())); }
}
const canvas = () => ({
  getContext: () => ({ drawImage() {} }),
  toBlob() {},
  toDataURL: () => "data:image/png;base64," + Buffer.from("\x89PNG", "latin1").toString("base64"),
  append() {}, setAttribute() {},
});
const page = { Image: SlowImage, Blob, atob, document: { createElement: canvas } };
const { toPng, shorten } = load(["element.js", "core.js", "figure.js"], ["toPng", "shorten"], page);

test("a PNG comes even where no frame is drawn and the page is never idle", async () => {
  const blob = await toPng({ text: "<svg/>", width: 30, height: 20 });
  assert.equal(blob.type, "image/png");
  assert.equal(Buffer.from(await blob.arrayBuffer()).toString("latin1"), "\x89PNG");
});

test("a picture that cannot be read is an error, not silence", async () => {
  await assert.rejects(toPng({ text: "broken", width: 1, height: 1 }), /cannot be read/);
});

test("long names end in an ellipsis, counted in characters and not in code units", () => {
  assert.equal(shorten("😀😀😀", 3), "😀😀😀");
  assert.equal(shorten("😀😀😀😀", 3), "😀😀…");
});
