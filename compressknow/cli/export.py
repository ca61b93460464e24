"""`compressknow export`: options in, a GGUF file out, and a table of the types in it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressknow.base.format import clean, count, write_size
from compressknow.base.reading import NotReadable, compute_sha256
from compressknow.cli import NOTHING_WRITTEN, RESUMES, check_upload, explain_interrupt, push_options, upload
from compressknow.cli import options as opt
from compressknow.cli.terminal import ProgressLines, show, show_json
from compressknow.model.checkpoint import HUB_ID
from compressknow.model.manifest import MANIFEST_NAME, read_manifest

if TYPE_CHECKING:
    from compressknow.gguf.record import ExportRecord

EPILOG = """\b
Types (--type), bits per weight with scales:
  f32, bf16, f16           as trained
  q8_0                     8.5 (default)
  q6_k                     6.6
  q5_k_m, q5_k_s           5.7, 5.5
  q4_k_m, q4_k_s           4.9, 4.6
  q3_k_m, q2_k             3.9, 3.0
  iq4_xs, iq3_m, ...       and all others that llama.cpp has
"""


@opt.command(epilog=EPILOG)
@click.argument("model")
@click.argument("output", type=opt.PATH)
@opt.option("--type", group=opt.HOW, metavar="TYPE", help="Type of most weights; see below.  [default: q8_0]")
@opt.option(
    "--type-of",
    group=opt.HOW,
    multiple=True,
    type=opt.read_type_of,
    metavar="WHICH=TYPE",
    help="Type of a scope's tensors, such as attention=q8_0, or of those whose GGUF name matches; repeatable, the last "
    "one applies.",
)
@opt.option("--size", group=opt.FIT, metavar="SIZE", help="Maximum size of the file, such as 90MB; chooses the types.")
@opt.option("--bits", group=opt.FIT, type=float, metavar="B", help="The same in bits per weight, over the whole file.")
@opt.add_guide_option(group=opt.FIT)
@opt.option(
    "--facts", group=opt.FIT, multiple=True, metavar="PROBE", help="Facts that decide; repeatable.  [default: atlas]"
)
@opt.add_data_option(opt.FIT)
@opt.fit_options
@opt.add_calibration_options(
    tokens="32768; with --size, 8192",
    help="Text for an importance matrix, or for --size: self (the model's own samples; the default with --size), "
    "FILE.txt, FILE.jsonl or hf:DATASET.",
)
@opt.option(
    "--seed", group=opt.CALIBRATION, type=int, default=0, show_default=True, help="Seed of own samples and of masking."
)
@opt.option("--imatrix", group=opt.CALIBRATION, type=opt.PATH, help="Use this importance matrix of llama.cpp instead.")
@opt.option("--imatrix-out", group=opt.CALIBRATION, type=opt.PATH, help="Write the importance matrix there too.")
@opt.option("--recipe", group=opt.HOW, type=opt.PATH, help="TOML file with [export], or an export's record.")
@opt.option("--converter", group=opt.RUNS, metavar="PATH", help="Folder of llama.cpp's convert_hf_to_gguf.py.")
@opt.option(
    "--threads", group=opt.RUNS, type=opt.WholeNumber(1), help="Threads to quantize with.  [default: one per core]"
)
@opt.checkpoint_options
@opt.option("--modelfile", type=opt.PATH, help="Write a Modelfile for Ollama there too.")
@opt.option(
    "--smoke/--no-smoke", group=opt.RUNS, default=True, help="Test the file with a prompt in llama.cpp.  [default: on]"
)
@opt.option("--overwrite", is_flag=True, help="Replace OUTPUT, if export wrote it.")
@push_options
@opt.option("--dry-run", is_flag=True, help="Show sizes and types by group; keep nothing.")
@opt.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def export(model: str, output: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Write MODEL, a local folder or a Hub id, as the GGUF file OUTPUT.

    MODEL may be an original or the output of `compressknow convert`. llama.cpp's own converter and quantization do the
    work. The file's metadata and OUTPUT.json next to it record what it was made from.

    \b
    compressknow export MODEL OUT.gguf
    compressknow export MODEL OUT.gguf --type q4_k_m --type-of attention=q8_0
    compressknow export MODEL OUT.gguf --size 90MB
    """
    from compressknow.api.export import OF_RECIPE
    from compressknow.api.export import export as run

    repo, private = options.pop("push"), options.pop("private")
    check_upload(repo, private, dry_run=dry_run)
    # Only what chooses types for a size is stored before the file is.
    with explain_interrupt(RESUMES if options["size"] or options["bits"] else NOTHING_WRITTEN):
        record = run(
            model, output, dry_run=dry_run, on_progress=ProgressLines(), **opt.drop_recipe_conflicts(options, OF_RECIPE)
        )
    if as_json:
        show_json(record)
    else:
        show(*_build_page(record, model, output, options["modelfile"], dry_run=dry_run))
    if repo:
        planned = {output.name: record["totals"]["bytes"], f"{output.name}.json": None, "README.md": None}
        upload(output, repo, private, planned=planned if dry_run else None, err=as_json)


def _build_page(
    record: ExportRecord, model: str, output: Path, modelfile: Path | None, *, dry_run: bool
) -> Iterator[str]:
    """Yield the lines that show the types and sizes of the groups."""
    if not record.is_new:
        yield f"{output} already exists, made by the same export: nothing to do."
        yield from _suggest_next(record, model, output, modelfile)
        return
    yield f"{record['setup']}: {model} -> {output}"
    yield ""
    if fit := record.get("fit"):
        yield from build_layers_table(record["types"])
        yield ""
    yield from build_types_table(record["groups"])
    if fit:
        scope = " without the experts" if any("_exps" in which for which, _ in record["types"]) else ""
        of = "facts plus text" if fit["guide"] == "both" else fit["guide"]
        kl = f"{fit['predicted_kl']:.2g} nats"
        yield f"\nPredicted KL of {of}{scope}: {kl}, if each weight is rounded to the nearest value."
    importance = record.get("importance", {})
    if importance.get("identified") is False:
        source = importance["source"]
        yield f"\n! {source} does not say which model it was made from: only names and shapes were checked."
    if dry_run:
        yield "\nDry run: nothing was written."
    else:
        yield f"\n{output}: {write_size(record['bytes'])}, with vocabulary and metadata."
        if record.answer:
            yield f"In llama.cpp: {clean(' -> '.join(record.answer), 64)}"
        if record.read_otherwise:
            yield f'\n! llama.cpp splits "{record.read_otherwise}" differently from the model\'s own tokenizer.'
        yield from _suggest_next(record, model, output, modelfile)


def _suggest_next(record: ExportRecord, model: str, output: Path, modelfile: Path | None) -> Iterator[str]:
    from compressknow.engine.load import find_family_of_class

    if find_family_of_class(record["source"]["architecture"]) == "seq2seq":
        yield "\nWhat it forgot cannot be measured: among GGUF files, only decoder-only models can be evaluated."
        return
    file = shlex.quote(str(output))
    yield f"\nWhat it forgot: compressknow report {shlex.quote(_find_original(model))} {file}"
    if modelfile is None:
        yield f"Serve it:       llama-server -m {file}"
    else:
        # Names in Ollama have at most 80 letters, digits, _, - and . of ASCII, and begin with neither - nor a dot.
        name = re.sub(r"[^a-z0-9_.-]+", "-", output.stem.lower()).lstrip("-.")[:80] or "model"
        yield f"Serve it:       ollama create {name} -f {shlex.quote(str(modelfile))}"


def _find_original(model: str) -> str:
    """Return what a converted checkpoint was made from, if its manifest leads there: a hub id, or a folder next to it
    or here; otherwise the model itself."""
    if not (Path(model) / MANIFEST_NAME).is_file():
        return model
    source = read_manifest(Path(model))["source"]
    name, config = str(source["name"]), source["files"].get("config.json")
    # A folder has a name without a slash, and no revision.
    if HUB_ID.fullmatch(name) and ("/" in name or source.get("revision")):
        return name
    for folder in (Path(model).parent / name, Path(name)):
        with suppress(OSError, NotReadable):
            # Another model may have that name.
            if compute_sha256(folder / "config.json") == config:
                return str(folder)
    return model


def build_layers_table(types: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of the chosen types: one per layer, then tensors outside the layers."""
    chosen = {which.strip("^$").replace("\\", "").removesuffix(".weight"): kind for which, kind in types}
    layers: dict[int, dict[str, str]] = {}
    for name, kind in chosen.items():
        if name.startswith("blk."):
            _, layer, part = name.split(".", 2)
            layers.setdefault(int(layer), {})[part] = kind
    # Attention before feed-forward, as a layer computes them; a file may hold them in another order.
    parts = sorted(set().union(*layers.values()), key=lambda part: (part.startswith("ffn"), part))
    widths = [max(len(part), 7) + 2 for part in parts]
    yield f"{'Layer':<7}" + "".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()
    for number, kinds in sorted(layers.items()):
        cells = (kinds.get(part, "").ljust(width) for part, width in zip(parts, widths, strict=True))
        yield f"{number:<7}{''.join(cells)}".rstrip()
    for name, kind in chosen.items():
        if not name.startswith("blk."):
            yield f"{name}: {kind}"


def build_types_table(groups: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Iterator[str]:
    """Yield the lines of a GGUF file's tensors, by group and type."""
    yield f"{'Group':<16}{'Type':<10}{'Tensors':>10}{'Parameters':>16}{'Size':>12}{'Bits':>8}"
    yield "-" * 72
    for group, types in groups.items():
        for kind, counts in types.items():
            yield _format_row(group, kind, counts)
    yield "-" * 72
    every = [counts for types in groups.values() for counts in types.values()]
    yield _format_row(
        "total", "", {key: sum(counts[key] for counts in every) for key in ("tensors", "parameters", "bytes")}
    )


def _format_row(group: str, kind: str, counts: Mapping[str, int]) -> str:
    bits = 8 * counts["bytes"] / max(counts["parameters"], 1)
    return (
        f"{group:<16}{kind:<10}{count(counts['tensors']):>10}{count(counts['parameters']):>16}"
        f"{write_size(counts['bytes']):>12}{bits:>8.2f}"
    )
