"""Modelfile for Ollama: the path of a GGUF file, the chat template, and where an answer ends.

Ollama uses Go templates, tokenizers use Jinja. The text around a system message, a question and an answer is taken from
the tokenizer's rendering of such a chat.
"""

from __future__ import annotations

import json
import os
from itertools import takewhile
from pathlib import Path
from typing import Any

from compressknow.engine.load import load_tokenizer
from compressknow.gguf.record import check_extra
from compressknow.model.checkpoint import read_json

# Placeholders in a chat, from the private use area, which templates do not use.
_SYSTEM, _USER, _ASSISTANT = "\ue000", "\ue001", "\ue002"
_FROM = "FROM "
_SAMPLING = ("temperature", "top_p", "top_k", "repeat_penalty")


def check_modelfile(path: Path, output: Path, text: str, *, overwrite: bool) -> None:
    """Raise UsageError or OutputError, before any work, if a Modelfile with this text cannot be written. One that
    already has this text is accepted."""
    existing = path.read_text("utf-8", "replace") if path.is_file() else ""
    is_ours, is_same = existing.startswith(_FROM), existing == text
    check_extra(path, output, "--modelfile", "a Modelfile", lambda _: is_ours, overwrite=overwrite or is_same)


def build_modelfile(checkpoint: Path, file: Path, place: Path, *, trust_remote_code: bool = False) -> str:
    """Return the text of a Modelfile at `place` for a GGUF file, with settings from the tokenizer and the generation
    config in a checkpoint's folder. Raises CheckpointError if the checkpoint has no tokenizer."""
    tokenizer: Any = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    weights = os.path.relpath(file.absolute(), place.absolute().parent).replace(os.sep, "/")
    lines = [f"{_FROM}{weights if weights.startswith('.') else f'./{weights}'}"]
    if template := build_go_template(tokenizer):
        lines.append(f'TEMPLATE """{template}"""')
    path = checkpoint / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    ids = settings.get("eos_token_id")
    # Configs name ids that the vocabulary lacks, too.
    ids = [each for each in (ids if isinstance(ids, list) else [ids]) if each in range(len(tokenizer))]
    ends = filter(None, tokenizer.convert_ids_to_tokens(ids))
    stops = dict.fromkeys([*ends, *([tokenizer.eos_token] if tokenizer.eos_token else [])])
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    settings = {**settings, "repeat_penalty": settings.get("repetition_penalty")}
    lines += [
        f"PARAMETER {name} {settings[name]:g}" for name in _SAMPLING if isinstance(settings.get(name), int | float)
    ]
    return "\n".join([*lines, ""])


def build_go_template(tokenizer: Any) -> str | None:
    """Return the chat template of a tokenizer as a Go template; None if it has none, or it cannot be translated."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    user, system = {"role": "user", "content": _USER}, {"role": "system", "content": _SYSTEM}
    question = _render_chat(tokenizer, [user], ask=True)
    answered = _render_chat(tokenizer, [user, {"role": "assistant", "content": _ASSISTANT}], ask=False)
    whole = _render_chat(tokenizer, [system, user], ask=True)
    if question is None or question.count(_USER) != 1:
        return None
    before, after = question.split(_USER)
    start = before
    if whole is not None and whole.count(_SYSTEM) == 1 and whole.count(_USER) == 1:
        opening, rest = whole.split(_SYSTEM)
        between = rest.split(_USER)[0]
        # The text directly before the question is shared; what precedes it belongs to a system message, or a default.
        equal = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(before), reversed(between), strict=False))
        shared = "".join(character for character, _ in equal)[::-1]
        default, closing = before.removesuffix(shared), between.removesuffix(shared)
        without_system = f"{{{{ else }}}}{default}" if default else ""
        start = f"{{{{ if .System }}}}{opening}{{{{ .System }}}}{closing}{without_system}{{{{ end }}}}{shared}"
    end = answered.split(_ASSISTANT)[1] if answered and answered.count(_ASSISTANT) == 1 else ""
    template = f"{start}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}{end}"
    texts = (question, whole or "", answered or "")
    return None if any("{{" in text or '"""' in text for text in texts) else template


def _render_chat(tokenizer: Any, chat: list[dict[str, str]], *, ask: bool) -> str | None:
    """Return a chat as the tokenizer renders it, without the token that begins a text, which llama.cpp adds; None if
    its template rejects such a chat."""
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask))
    except Exception:  # Templates are programs, which can raise anything.
        return None
    adds_bos = tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds_bos else text
