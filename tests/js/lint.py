"""Lint the scripts of the report, the graph and the explorer: biome, on what a page really runs.

The page holds its scripts as one, so they are linted as one: a name that no file declares, or that
none uses, is an error.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from mechinterp_attn.explore.page import script as explorer
from mechinterp_attn.view.report.page import script

HERE = Path(__file__).parent


def main() -> int:
    if shutil.which("npm") is None:
        print("no node: the scripts of the report are not linted here")
        return 0
    biome = HERE / "node_modules" / ".bin" / "biome"
    if not biome.exists():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--silent"], cwd=HERE)
    if not biome.exists():
        print("biome cannot be installed (no network?): the scripts of the report are not linted here")
        return 0
    built = HERE / "built"
    built.mkdir(exist_ok=True)
    (built / "report.js").write_text(script(), encoding="utf-8")
    (built / "explorer.js").write_text(explorer(), encoding="utf-8")
    return subprocess.run([biome, "lint", "--error-on-warnings", "."], cwd=HERE).returncode


if __name__ == "__main__":
    sys.exit(main())
