// The scripts of a page are one classic script. Here some of them run in a context of their own.
const fs = require("node:fs");
const path = require("node:path");
const vm = require("node:vm");

const ASSETS = path.join(__dirname, "..", "..", "mechinterp_attn", "view", "assets");

/** Run files of the page; `names` are what a test wants of them. */
function load(files, names, globals = {}) {
  const code = files.map((file) => fs.readFileSync(path.join(ASSETS, file), "utf8")).join("\n");
  const context = vm.createContext({ ...globals });
  return vm.runInContext(`${code}\n;({ ${names.join(", ")} })`, context);
}

module.exports = { load };
