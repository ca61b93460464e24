"""Bad input of a calibrated conversion gives one clear message and exit code 1 or 2; nothing is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperForConditionalGeneration

from tests.compress.conftest import Refusal
from tests.knowing import KNOWN_FACTS, save_trained
from tests.long import long
from tests.models import edit_tensors, save_tiny

WANDA = ["--prune", "0.5", "--prune-method", "wanda"]
SENTENCES = " ".join(fact.sentence(fact.obj_label) for fact in KNOWN_FACTS)


@pytest.fixture
def llama(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    folder = save_trained("llama", tmp_path / "in")
    capsys.readouterr()
    return folder


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text(SENTENCES * 40)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", b"The capital of Drenn is Velin.", "has 7 tokens of this model, but 2,016 are needed"),
        ("empty.txt", b"", "has 0 tokens of this model"),
        ("latin.txt", "Caf\xe9".encode("latin-1"), "is not UTF-8"),
        ("foreign.txt", b"quux " * 4000, "The tokenizer does not know 100% of the tokens"),
    ],
)
def test_an_unusable_text_is_refused(
    name: str, content: bytes, message: str, llama: Path, tmp_path: Path, refusal: Refusal
) -> None:
    (tmp_path / name).write_bytes(content)
    printed = refusal(llama, *WANDA, "--calibration", str(tmp_path / name))
    assert message in printed
    assert name in printed


@pytest.mark.parametrize(("text", "message"), [("none.txt", "no calibration text none.txt"), ("a.pdf", "'a.pdf'")])
def test_a_missing_text_is_refused_before_torch_is_imported(
    text: str, message: str, llama: Path, refusal: Refusal
) -> None:
    printed = refusal(llama, *WANDA, "--calibration", text, code=2)
    assert message in printed
    assert "FILE.jsonl" in printed
    code = (
        "import sys\nfrom compressknow.cli import main\ncode = main(sys.argv[1:])\nprint(code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "convert", str(llama), "out", *WANDA, "--calibration", text]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stdout == "2 False\n"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ["--quantize", "int4", "--group-size", "128"],
            1,
            "Its 64 input channels are not a multiple of the group size 128.",
        ),
        (["--quantize", "int4", "--group-size", "48"], 2, "group_size must be 32, 64 or 128"),
        (["--prune", "0.4", "--pattern", "3:5"], 1, "Its 64 input channels are not a multiple of 5."),
        (["--prune", "0.4", "--pattern", "2:4"], 2, "The pattern 2:4 prunes 0.5 of the weights, not 0.4."),
        (["--prune", "0.5", "--pattern", "4:2"], 2, "such as 2:4"),
        (["--prune", "0.5", "--smooth", "0.5"], 2, "--rounding and --smooth go with --quantize SCHEME"),
        (["--prune", "0.5", "--rounding", "gptq"], 2, "--rounding and --smooth go with --quantize SCHEME"),
        (["--quantize", "int8", "--prune-method", "wanda"], 2, "--norm and --dim go with --prune AMOUNT"),
        (["--quantize", "int8", "--per-layer"], 2, "--norm and --dim go with --prune AMOUNT"),
        (["--prune", "0.2", "--dim", "1"], 2, "--dim is not a parameter of l1-unstructured"),
        (["--prune", "0.2", "--norm", "2"], 2, "It needs ln-structured. Choose from --pattern, --per-layer."),
        (["--prune", "0.2", "--prune-method", "random-structured", "--norm", "2"], 2, "--norm is not a parameter of"),
        (["--prune", "0.2", "--prune-method", "ln-structured", "--per-layer"], 2, "--per-layer is not a parameter of"),
        (["--quantize", "int8", "--group-size", "64"], 2, "It needs int4."),
        (["--drop-blocks", "1-1", "--pattern", "2:4"], 2, "not a parameter of a step that drops blocks or neurons"),
        (["--quantize", "int8-paper", "--rounding", "gptq"], 2, "int8-paper can only be rounded to nearest."),
        (["--quantize", "int8-weights", "--smooth", "0.5"], 2, "it rounds no activations by token"),
        (["--quantize", "int8", "--smooth", "1.5"], 2, "smooth must be a number greater than 0 and at most 1"),
        (["--quantize", "int8", "--calibration", "self"], 2, "There is nothing to calibrate"),
        (["--prune", "0.2", "--calibration-tokens", "4096"], 2, "There is nothing to calibrate"),
        ([*WANDA, "--calibration-tokens", "10"], 2, "do not fill a sequence of this model, of 64"),
        ([*WANDA, "--scope", "vision"], 2, 'The scope "vision" is empty'),
        (["--drop-neurons", "0.5", "--layers", "0-0"], 2, "--layers does not restrict what is dropped"),
        (["--drop-blocks", "1", "--scope", "attention"], 2, "--scope does not restrict what is dropped"),
        (["--drop-blocks", "2"], 2, "Dropping 2 blocks would leave none"),
    ],
)
def test_bad_options_are_refused(options: list[str], code: int, message: str, llama: Path, refusal: Refusal) -> None:
    assert message in refusal(llama, *options, code=code)


def test_a_model_that_reads_no_text_is_refused(llama: Path, tmp_path: Path, notes: Path, refusal: Refusal) -> None:
    sizes = {"d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    special = {f"{name}_token_id": 1 for name in ("bos", "eos", "pad", "decoder_start")}
    WhisperForConditionalGeneration(WhisperConfig(vocab_size=99, **sizes, **special)).save_pretrained(tmp_path / "ear")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "ear")
    printed = refusal(tmp_path / "ear", *WANDA, "--calibration", str(notes))
    assert "WhisperForConditionalGeneration fails on the calibration text." in printed


def test_a_model_whose_norms_feed_more_than_layers_is_not_smoothed(
    tmp_path: Path, notes: Path, refusal: Refusal, capsys: pytest.CaptureFixture[str]
) -> None:
    bert = save_trained("bert", tmp_path / "in")
    capsys.readouterr()
    message = refusal(bert, "--quantize", "int8", "--smooth", "0.5", "--calibration", str(notes))
    assert "Nothing in bert.encoder.layer.0 can be smoothed" in message
    assert "Leave --smooth out.\n" in message


def test_unsmoothable_models_are_refused_before_they_write_a_text(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bert, albert = save_trained("bert", tmp_path / "bert"), save_tiny("albert", tmp_path / "albert")
    capsys.readouterr()
    monkeypatch.setattr("compressknow.compress.calibrate.text.read_calibration_text", pytest.fail)
    assert "Nothing in bert.encoder.layer.0 can be smoothed" in refusal(bert, "--quantize", "int8", "--smooth", "0.5")
    assert "share their weights" in refusal(albert, "--quantize", "int8", "--smooth", "0.5")


@pytest.mark.parametrize(
    ("options", "module"),
    [
        (["--include", "down_proj"], "model.layers.0"),
        (["--include", r"0\.mlp\.(gate|up)_proj|1\.mlp\.down_proj"], "model.layers.1"),
        (["--scope", "final"], "lm_head"),
        (["--include", "down_proj", "--drop-neurons", "0.25"], "model.layers.0"),
    ],
    ids=["first-block", "second-block", "outside-blocks", "fewer-neurons"],
)
@pytest.mark.parametrize("dry_run", [True, False], ids=["dry", "real"])
def test_an_unsmoothable_block_is_named_before_the_text_is_read(
    options: list[str],
    module: str,
    dry_run: bool,
    llama: Path,
    notes: Path,
    refusal: Refusal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("compressknow.compress.calibrate.text.read_calibration_text", pytest.fail)
    smooth = ["--quantize", "int8", "--smooth", "0.5", "--calibration", str(notes)]
    message = refusal(llama, *smooth, *options, *(["--dry-run"] if dry_run else []))
    assert f"Nothing in {module} can be smoothed" in message
    assert "Leave --smooth out, or extend --scope" in message


def test_a_checkpoint_without_tokenizer_is_refused(
    tmp_path: Path, notes: Path, refusal: Refusal, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny("llama", tmp_path / "in")
    capsys.readouterr()
    for text in ("self", str(notes)):
        assert "has no tokenizer" in refusal(tmp_path / "in", *WANDA, "--calibration", text)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (WANDA, "model.layers.1.mlp.gate_proj.weight"),
        (["--prune", "0.5", "--prune-method", "sparsegpt"], "model.layers.0.input_layernorm.weight"),
        (["--quantize", "int4", "--group-size", "32", "--rounding", "gptq"], "model.layers.0.mlp.gate_proj.weight"),
        # A few tokens, which do not reach the last block, first tell whether it can be smoothed.
        (["--quantize", "int8", "--smooth", "0.5"], "model.layers.0.self_attn.q_proj.weight"),
        (["--quantize", "int8", "--smooth", "0.5"], "model.layers.1.self_attn.q_proj.weight"),
    ],
)
@pytest.mark.parametrize("text", ["file", "self"])
def test_a_weight_that_is_nan_is_named(
    options: list[str], name: str, text: str, llama: Path, notes: Path, refusal: Refusal
) -> None:
    edit_tensors(llama, lambda tensors: tensors[name].view(-1)[5].fill_(torch.nan))
    message = refusal(llama, *options, *(["--calibration", str(notes)] if text == "file" else []))
    assert f"{name} in model.safetensors holds NaN" in message


def test_a_block_that_gives_infinities_is_named(llama: Path, notes: Path, refusal: Refusal) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e38
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e20
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    message = refusal(llama, *WANDA, "--calibration", str(notes))
    assert "model.layers.1 gives NaN or infinities on the calibration text" in message


# argv[1] is the address space, in bytes, that the run may take after its imports.
WITH_LIMITED_MEMORY = """
import resource, sys
import compressknow.compress.calibrate.compression, compressknow.compress.calibrate.text
import transformers.models.llama.modeling_llama
from compressknow.cli import main
from pathlib import Path
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


@long
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits address space")
def test_a_block_that_does_not_fit_in_memory_is_named(llama: Path, notes: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(llama, intermediate_size=20_000, num_hidden_layers=1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(llama)
    out = tmp_path / "out"
    options = ["--prune", "0.5", "--prune-method", "sparsegpt", "--calibration", str(notes), "--threads", "1"]
    # X^T X of 20,000 channels takes 1.6 GB.
    command = [sys.executable, "-c", WITH_LIMITED_MEMORY, str(10**9), "convert", str(llama), str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: There is not enough memory to calibrate model.layers.0.\n  Its weights ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "notes.txt"]


WITH_FREQUENT_PROGRESS = """
import sys
import compressknow.cli.terminal as terminal
terminal.SECONDS_ELSEWHERE = 0.01
from compressknow.cli import main
sys.exit(main(sys.argv[1:]))
"""


@long
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
@pytest.mark.parametrize(("stage", "tokens"), [("Writing the calibration text", "400000"), ("Compressing", "64000")])
def test_an_interrupted_run_leaves_nothing(stage: str, tokens: str, llama: Path, notes: Path, tmp_path: Path) -> None:
    notes.write_text(SENTENCES * 200, encoding="utf-8")
    text = [] if stage.startswith("Writing") else ["--calibration", str(notes)]
    options = ["--prune", "0.5", "--prune-method", "sparsegpt", *text, "--calibration-tokens", tokens]
    command = [sys.executable, "-c", WITH_FREQUENT_PROGRESS, "convert", str(llama), str(tmp_path / "out"), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        assert any(line.startswith(stage) for line in run.stderr)
        run.send_signal(signal.SIGINT)
        message = run.stderr.read()
    assert run.returncode == 130
    assert message.endswith("Interrupted. Nothing was written.\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "notes.txt"]
