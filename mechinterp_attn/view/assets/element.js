"use strict";
/* Text reaches the page through textContent only: nothing from the data is ever parsed as markup. */

function el(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function formatNumber(x, signed) {
  if (x === null) return "–";
  if (Number.isNaN(x)) return "× NaN";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  if (x === 0) return "0";
  const size = Math.abs(x);
  let text;
  if (size < 5e-4 || size >= 1e6) text = size.toExponential(1);
  else text = size.toFixed(size >= 100 ? 1 : 3);
  return (x < 0 ? "−" : signed && x > 0 ? "+" : "") + text;
}
