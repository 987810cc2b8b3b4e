const NAMED = { nan: NaN, inf: Infinity, "-inf": -Infinity };
const asNumber = (x) => (typeof x === "string" ? NAMED[x] : x);

function download(name, content, type) {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // a slow disk may still be reading
}

/* Cells that a spreadsheet would run as a formula begin with an apostrophe; numbers are left alone. */
function toCsv(columns, rows) {
  const cell = (x) => {
    let text = x === null || x === undefined ? "" : Array.isArray(x) ? x.map((t) => JSON.stringify(t)).join(" ") : String(x);
    if (typeof x === "string" && /^[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]/.test(text) && Number.isNaN(Number(text))) text = "'" + text;
    return /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  };
  return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

/* Pictures are painted again when the colours change: dark mode, and a page that is printed. */
function onColours(paint) {
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", paint);
}

function rgb(text) {
  const n = parseInt(text.slice(1), 16);
  const long = text.length === 7;
  return long ? [n >> 16, (n >> 8) & 255, n & 255] : [(n >> 8) * 17, ((n >> 4) & 15) * 17, (n & 15) * 17];
}

const mix = (a, b, t) => a.map((x, i) => Math.round(x + (b[i] - x) * t));

/* Black or white, whichever reads better on a colour (contrast 4.5 or more on every colour). */
function readable(c) {
  const [r, g, b] = c.map((x) => (x / 255 <= 0.03928 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}
