"""The template of a Modelfile, evaluated as Go does, gives the text of the tokenizer's Jinja template; and an exported
file must answer a prompt."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

import compressknow
from compressknow.base.errors import CompressknowError, OutputError, UsageError
from compressknow.cli import main
from compressknow.cli.export import _suggest_next
from compressknow.gguf.modelfile import build_go_template, build_modelfile
from compressknow.gguf.record import ExportRecord
from tests.gguf.making import needs_converter, save_checkpoint

pytest.importorskip("llama_cpp_py_sync")

CHATML = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You help.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (s if loop.first else '') + m.content + "
    "' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def make_tokenizer(template: str | None) -> Any:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "Who": 3, "I": 4}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def evaluate_go_template(template: str, **values: str) -> str:
    """Evaluate a template as Go's text/template does: one `if`, with or without an `else`."""

    def choose(match: re.Match[str]) -> str:
        then, _, otherwise = match[2].partition("{{ else }}")
        return then if values.get(match[1]) else otherwise

    text = re.sub(r"\{\{ if \.(\w+) \}\}(.*?)\{\{ end \}\}", choose, template, flags=re.DOTALL)
    return re.sub(r"\{\{ \.(\w+) \}\}", lambda match: values.get(match[1], ""), text)


@pytest.mark.parametrize(("template", "takes_system"), [(CHATML, True), (LLAMA2, True), (GEMMA, False)])
def test_the_go_template_gives_the_text_of_the_chat_template(template: str, takes_system: bool) -> None:
    tokenizer = make_tokenizer(template)
    go = build_go_template(tokenizer)
    assert go is not None
    for system in ["", *(["Be brief."] if takes_system else [])]:
        chat = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": "Who?"}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert evaluate_go_template(go.partition("{{ .Response }}")[0], System=system, Prompt="Who?") == prompt
        expected = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "I."}], tokenize=False)
        # Some templates put a space before an answer; here the model generates it.
        written = evaluate_go_template(go, System=system, Prompt="Who?", Response="I.")
        assert "".join(written.split()) == "".join(expected.split())


@pytest.mark.parametrize("template", [None, "{{ raise_exception('never') }}", "{{ '{{' }}{{ messages[0].content }}"])
def test_a_chat_template_without_a_go_form_is_left_out(template: str | None) -> None:
    assert build_go_template(make_tokenizer(template)) is None


def test_a_modelfile_has_the_stop_tokens_and_the_sampling_settings(tmp_path: Path) -> None:
    """Its path is relative to its own folder; missing settings, and ids without a token, are left out."""
    make_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    LlamaConfig().save_pretrained(tmp_path / "model")
    settings = {"eos_token_id": [1, 2, 99, -1], "temperature": 0.6, "top_k": 20, "top_p": None}
    settings["repetition_penalty"] = 1.05
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    text = build_modelfile(tmp_path / "model", tmp_path / "files" / "out.gguf", tmp_path / "there" / "Modelfile")
    template = build_go_template(make_tokenizer(CHATML))
    assert text == (
        f'FROM ../files/out.gguf\nTEMPLATE """{template}"""\n'
        'PARAMETER stop "<s>"\nPARAMETER stop "</s>"\n'
        "PARAMETER temperature 0.6\nPARAMETER top_k 20\nPARAMETER repeat_penalty 1.05\n"
    )
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 1}')
    text = build_modelfile(tmp_path / "model", tmp_path / "out.gguf", tmp_path / "Modelfile")
    assert text.startswith("FROM ./out.gguf\n")
    assert text.endswith('PARAMETER stop "<s>"\nPARAMETER stop "</s>"\n')


@needs_converter
def test_export_writes_a_modelfile_and_prints_next_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_checkpoint("llama", tmp_path / "model")
    # Parent folders are made, for the Modelfile too.
    output, modelfile = tmp_path / "new" / "files" / "Out.gguf", tmp_path / "new" / "Modelfile"
    command = ["export", str(source), str(output), "--modelfile", str(modelfile)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "In llama.cpp: The capital of France is ->" in printed
    assert "ollama create out -f " in printed
    assert "compressknow report " in printed
    lines = modelfile.read_text().splitlines()
    assert lines[0] == "FROM ./files/Out.gguf"
    assert any(line.startswith("PARAMETER stop ") for line in lines)
    # A second run has nothing to do, and keeps what the user has added.
    assert main(command) == 0
    with modelfile.open("a") as file:
        file.write("SYSTEM Be brief.\n")
    assert main(command) == 1
    assert "Modelfile exists already" in capsys.readouterr().err
    assert "Be brief" in modelfile.read_text()
    assert main([*command, "--overwrite"]) == 0
    modelfile.write_text("mine")
    with pytest.raises(OutputError, match="exists already, and is not a Modelfile: not overwritten"):
        compressknow.export(source, output, modelfile=modelfile, overwrite=True)
    with pytest.raises(UsageError, match="have the same name"):
        compressknow.export(source, tmp_path / "other.gguf", modelfile=tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("Smollm2_Q4.0", "smollm2_q4.0"),
        ("smöl 88", "sm-l-88"),
        ("-a.b-", "a.b-"),
        ("模型", "model"),
        ("a" * 100, "a" * 80),
    ],
)
def test_the_suggested_name_is_one_that_ollama_takes(stem: str, name: str) -> None:
    record = ExportRecord({"source": {"architecture": "LlamaForCausalLM"}})
    *_, line = _suggest_next(record, "model", Path(f"{stem}.gguf"), Path("Modelfile"))
    assert line == f"Serve it:       ollama create {name} -f Modelfile"


@needs_converter
def test_a_file_that_gives_nan_is_not_written(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if "norm" in name:
            weight.fill_(3e38)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CompressknowError, match=r"produces NaN in llama\.cpp"):
        compressknow.export(source, tmp_path / "out.gguf", type="f32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    record = compressknow.export(source, tmp_path / "out.gguf", type="f32", smoke=False)
    assert record.answer is None
