const assert = require("node:assert/strict");
const { test } = require("node:test");
const { load } = require("./load.js");

const { formatNumber, toCsv, mix, readable, rgb, asNumber } = load(["element.js", "core.js"],
  ["formatNumber", "toCsv", "mix", "readable", "rgb", "asNumber"]);

test("numbers read the same at every size, and what is no number says so", () => {
  assert.equal(formatNumber(0), "0");
  assert.equal(formatNumber(1.23456), "1.235");
  assert.equal(formatNumber(-1.5), "−1.500");
  assert.equal(formatNumber(1.5, true), "+1.500");
  assert.equal(formatNumber(1234.5), "1234.5");
  assert.equal(formatNumber(0.0000123), "1.2e-5");
  assert.equal(formatNumber(null), "–");
  assert.equal(formatNumber(asNumber("nan")), "× NaN");
  assert.equal(formatNumber(asNumber("-inf")), "−∞");
});

test("CSV quotes what needs quotes, and no cell is a formula", () => {
  const text = toCsv(["a", "b"], [['say "x"', "1,5"], ["=1+1", "@x"], ["\n=1", "\uff1d1"], ["-1.5", -1.5], [null, [" a", "\n"]]]);
  assert.deepEqual(text.split("\r\n"), ["a,b", '"say ""x""","1,5"', "'=1+1,'@x", "\"'\n=1\",'\uff1d1", "-1.5,-1.5", ',""" a"" ""\\n"""', ""]);
});

test("text on a coloured ground keeps a contrast of 4.5 on every colour of the scale", () => {
  const luminance = (c) => {
    const [r, g, b] = c.map((x) => (x / 255 <= 0.03928 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  for (let t = 0; t <= 1; t += 0.01) {
    const ground = mix(rgb("#ffffff"), rgb("#2a5d9f"), t);
    const [light, dark] = [luminance(ground), readable(ground) === "#fff" ? 1 : 0].sort((a, b) => b - a);
    assert.ok((light + 0.05) / (dark + 0.05) >= 4.5, `at ${t}`);
  }
});
