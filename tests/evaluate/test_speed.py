"""Speed and memory before and after, measured in separate processes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import compressknow
from compressknow.base.errors import CompressknowError
from compressknow.base.progress import Stage
from compressknow.engine.identity import locate
from compressknow.engine.layers import BatchInvariantLinear
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.speed import _TEXT, TOKENS, _measure_rate, _measure_tokens, measure
from tests.engine.gguf_files import needs_gguf, write_gguf
from tests.knowing import save_trained, write_facts
from tests.long import long


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    save_trained("llama", folder / "llama")
    compressknow.convert(folder / "llama", folder / "converted", quantize="int8")
    write_facts(folder / "facts.jsonl")
    return folder


def test_a_report_has_speed_and_memory_of_both_models(root: Path, tmp_path: Path) -> None:
    # Memory of this process is not counted.
    held = torch.ones(64_000_000)
    stages: list[Stage] = []
    card = compressknow.report(
        root / "llama",
        root / "converted",
        [f"facts:{root / 'facts.jsonl'}"],
        output=[tmp_path / "report.html"],
        answers=tmp_path / "answers",
        time=True,
        on_progress=lambda progress: stages.append(progress.stage) if progress.state == "ends" else None,
    )
    assert [stage.model for stage in stages if stage.work == "time"] == ["llama", "converted"]
    for speed in (card.original.speed, card.comparisons[0].model.speed):
        assert speed is not None
        assert re.fullmatch(r"cpu, (1 thread|(?!1 )\d+ threads)", speed.device)
        assert speed.facts_per_second > 0
        assert speed.tokens_per_second is not None
        assert speed.tokens_per_second > 0
        assert 0 < int(speed.peak_bytes or 0) < held.nbytes
    page = (tmp_path / "report.html").read_text()
    assert "Facts per second" in page
    assert "Tokens per second" in page


@needs_gguf
def test_memory_of_a_gguf_file_does_not_include_libraries(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp_py_sync")
    file = write_gguf(root / "llama", tmp_path / "llama.gguf")
    assert 0 < int(measure(locate(file), Settings(device="cpu")).peak_bytes or 0) < 100_000_000


def test_tokens_are_timed_without_batch_invariant_layers(root: Path) -> None:
    handle = ModelHandle(locate(root / "converted"), Settings())
    language_model = handle.loaded.language_model
    assert language_model is not None
    if not any(isinstance(module, BatchInvariantLinear) for module in language_model.model.modules()):
        pytest.skip("this CPU does not multiply integers")
    assert _measure_tokens(handle)
    assert not any(isinstance(module, BatchInvariantLinear) for module in language_model.model.modules())


def test_tokens_are_counted_up_to_the_end_of_the_text_or_of_the_window(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressknow.evaluate.speed._measure_rate", lambda work: work())
    handle = ModelHandle(locate(root / "llama"), Settings())
    reader = handle.make_reader()
    prompt, _ = reader.encode(_TEXT)
    assert reader.most is not None
    assert _measure_tokens(handle) == reader.most - len(prompt) < TOKENS
    language_model = handle.loaded.language_model
    assert language_model is not None
    # As if its first token ended the text.
    ((first,),) = reader.continue_texts([prompt], 1)
    language_model.tokenizer.eos_token_id = first
    assert _measure_tokens(handle) == 1


@pytest.mark.parametrize(
    ("seconds", "rate"),
    [([9.0, 1.0, 2.0, 5.0], 5.0), ([1.0, 4.0, 8.0, 1.0], 1.875), ([1.0, 300.0], 0.03333)],
    ids=["the warm-up is not counted", "no third round after ten seconds", "slow models have a rate too"],
)
def test_the_rate_is_the_median_of_three_rounds(
    seconds: list[float], rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, rounds = [0.0], iter(seconds)

    def work() -> int:
        now[0] += next(rounds)
        return 10

    monkeypatch.setattr("compressknow.evaluate.speed.time.perf_counter", lambda: now[0])
    assert _measure_rate(work) == rate


@long
def test_a_model_is_timed_in_the_precision_that_it_is_deployed_in(root: Path, tmp_path: Path) -> None:
    stored = transformers.AutoModelForCausalLM.from_pretrained(root / "llama", dtype=torch.bfloat16)
    stored.save_pretrained(tmp_path / "half")
    transformers.AutoTokenizer.from_pretrained(root / "llama").save_pretrained(tmp_path / "half")
    speeds = {dtype: measure(locate(tmp_path / "half"), Settings(dtype=dtype)) for dtype in (None, "float32")}
    assert {dtype: speed.computed_in for dtype, speed in speeds.items()} == {None: "bfloat16", "float32": "float32"}


@long
def test_a_model_that_does_not_continue_text_has_no_tokens_per_second(tmp_path: Path) -> None:
    model = save_trained("bert", tmp_path / "bert")
    assert measure(locate(model), Settings()).tokens_per_second is None


@pytest.mark.usefixtures("scripts")
def test_measuring_runs_no_script_of_the_working_directory(root: Path) -> None:
    assert measure(locate(root / "llama"), Settings()).facts_per_second > 0


def test_a_model_that_cannot_be_measured_is_one_error(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The process warns of this before it fails.
    monkeypatch.setenv("PYTHONWARNINGS", "nonsense")
    model = shutil.copytree(root / "llama", tmp_path / "model")
    (model / "tokenizer.json").unlink()
    with pytest.raises(CompressknowError, match="The speed of model could not be measured") as error:
        measure(locate(model), Settings())
    assert "has no tokenizer that loads" in str(error.value.why)
    assert "\n" not in str(error.value.why)
