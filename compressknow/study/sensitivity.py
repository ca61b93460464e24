"""Sensitivity of a model: how much rounding each weight to each type adds to the divergence of its answers.

A `Sensitivity` is measured once (`compressknow.study.measuring`) and stored; types for a size are chosen by it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from compressknow.base import notebook
from compressknow.base.errors import UsageError
from compressknow.base.files import write_whole
from compressknow.base.format import count, number
from compressknow.base.reading import RECORD, read_json
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.gather import open_named
from compressknow.evaluate.sources import Options
from compressknow.model.manifest import SEAL, hash_manifest, seal_manifest

Guide = Literal["facts", "text", "both"]
GUIDES: tuple[Guide, ...] = ("facts", "text", "both")
SCHEMA = 4
FEWEST = 30  # minimum number of facts that distinguish weights
FIT_TOKENS = 8_192  # default number of tokens of the text that guides
# Types of 4 bits: weights are compared by the first one that fits their rows.
FOUR_BITS = ("q4_0", "int4/64", "int4/32", "int4/128")


@dataclass(frozen=True)
class Rounding:
    """Effect of rounding one weight to one type, with all others unchanged.

    Attributes
    ----------
    bytes : size of the weight as this type.
    facts : the KL that it adds to the distribution over a fact's best candidates, in nats per fact; None if no facts
        guided.
    text : the KL that it adds to the next token's distribution, in nats per token; None if no text guided.
    at_risk : share of the facts that the model is expected to forget (0 to 1); None if no facts guided.
    """

    bytes: int
    facts: float | None = None
    text: float | None = None
    at_risk: float | None = None

    def kl(self, guide: Guide = "both", weight: float = 1.0) -> float:
        """Return the predicted KL of facts, of text, or of facts plus `weight` times that of text. Raises ValueError if
        it was not measured."""
        total = 0.0
        for name, factor in ({"facts": 1.0, "text": weight} if guide == "both" else {guide: 1.0}).items():
            if (value := getattr(self, name)) is None:
                raise ValueError(f"the sensitivity to {name} was not measured")
            total += value * factor
        return total


@dataclass(frozen=True)
class TensorSensitivity:
    """Sensitivity of one weight.

    Attributes
    ----------
    name : the checkpoint's parameter; the embedding if the final layer is tied to it.
    shape : [out, in] in the module tree.
    group : ``attention``, ``feed-forward``, ``final``, ``embedding`` or ``other``.
    layer : number of its block; None outside the blocks.
    by_type : effects by type, in the order of `Guidance.types`; types that do not fit its rows are missing.
    stack : ``encoder`` or ``decoder``; None in a model of one stack.
    module : its name inside a block, the same in all blocks: ``self_attn.q_proj``.
    by_domain : the KL of a domain's facts, relative to the mean over all facts; empty if no facts guided.
    """

    name: str
    shape: tuple[int, ...]
    group: str
    layer: int | None
    by_type: Mapping[str, Rounding]
    stack: str | None = None
    module: str = ""
    by_domain: Mapping[str, float] = field(default_factory=dict)

    @property
    def compared(self) -> str:
        """Return the type by which the weight is compared with others, which has 4 bits if one fits."""
        return next((name for name in FOUR_BITS if name in self.by_type), [*self.by_type][-1])

    @property
    def bits(self) -> int:
        """Return the bits of each value if it is not rounded: 16 in a GGUF file, those of its dtype in a checkpoint."""
        if (rounding := self.by_type.get("int8-weights")) is None:
            return 16
        # A row has a scale of that dtype, after whole words of 32 bits.
        rows, columns = self.shape
        return 8 * (rounding.bytes // rows - 4 * -(-columns // 4))

    @property
    def exact(self) -> int:
        """Return the bytes of the weight if it is not rounded."""
        return self.bits // 8 * prod(self.shape)

    @property
    def saved(self) -> int:
        """Return the bytes that the compared type saves."""
        return self.exact - self.by_type[self.compared].bytes

    def per_mb(self, guide: Guide = "both") -> float:
        """Return the predicted KL per MB (10^6 bytes) that the compared type saves."""
        return self.by_type[self.compared].kl(guide) / self.saved * 1e6

    @property
    def place(self) -> str:
        """Return the place in the model: ``layer 3``, ``encoder 3``, ``final``, ``embedding``."""
        return self.group if self.layer is None else f"{self.stack or 'layer'} {self.layer}"


@dataclass(frozen=True)
class Guidance:
    """Facts, text and types that a sensitivity was measured with."""

    form: Literal["gguf", "checkpoint"]  # of the file that the types are for
    types: tuple[str, ...]  # the candidates, the largest first
    facts: int = 0  # number of facts, all known to the model
    fingerprint: str | None = None  # a hash of their ids, prompts and candidates
    tokens: int = 0  # number of tokens of text that guide, the first ones
    text: str | None = None  # a hash of the whole text
    ids: tuple[tuple[str, str], ...] = ()  # the facts' probes and ids
    # Whether a checkpoint can have only one of the types, besides weights that stay as they are (T5).
    has_one_type: bool = field(default=False, repr=False)
    # Number of tokens of the whole text, which older stored sensitivities lack; `text` determines it.
    text_tokens: int = field(default=0, repr=False, compare=False)


@dataclass(frozen=True, repr=False)
class Sensitivity(notebook.SummaryRepr):
    """Effects of rounding each weight of a model to each type on facts that it knows, and on text.

    Attributes
    ----------
    sha256 : the hash of the model.
    guidance : what it was measured with.
    rows : one per weight matrix.
    domains : number of facts by domain; those with fewer than 5 are left out.
    others : number of parameters of the model that are not in `rows`.
    """

    sha256: str
    guidance: Guidance
    rows: tuple[TensorSensitivity, ...]
    domains: Mapping[str, int] = field(default_factory=dict)
    others: int = 0

    @property
    def guides(self) -> Guide:
        """Return what guided the measurement, and can guide predictions."""
        facts, text = self.guidance.facts, self.guidance.tokens
        return "both" if facts and text else "facts" if facts else "text"

    def ranked(self, guide: Guide = "both") -> list[TensorSensitivity]:
        """Return the weights by KL per MB that 4 bits save, largest first."""
        return sorted(self.rows, key=lambda row: -row.per_mb(guide))

    def _summary(self) -> notebook.Summary:
        ranked = self.ranked(self.guides)
        return notebook.Summary(
            f"Sensitivity: {count(len(ranked))} weights of {self.sha256[:12]}",
            f"{count(self.guidance.facts)} facts and {count(self.guidance.tokens)} tokens of text guide.",
            ("Most sensitive", "KL per MB saved"),
            [(f"{row.place} {row.module}", number(row.per_mb(self.guides), 5)) for row in ranked],
        )

    def kl(self, guide: Guide = "both", weight: float = 1.0) -> dict[str, dict[str, float]]:
        """Return the predicted KL of each weight and type, by name and type; see `Rounding.kl`."""
        return {
            row.name: {name: rounding.kl(guide, weight) for name, rounding in row.by_type.items()} for row in self.rows
        }

    def predict(self, types: Mapping[str, str], guide: Guide = "both", weight: float = 1.0) -> float:
        """Return the predicted KL of rounding weights to these types: the sum over the weights."""
        rows = {row.name: row for row in self.rows}
        return sum(rows[name].by_type[chosen].kl(guide, weight) for name, chosen in types.items())

    def as_json(self) -> dict[str, Any]:
        """Return plain values, as `write_sensitivity` stores them."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Sensitivity:
        """Build a sensitivity from `as_json` values. Raises ValueError, KeyError or TypeError for anything else."""
        if values.get("schema") != SCHEMA:
            raise ValueError(f"schema {values.get('schema')!r}")
        guidance = dict(values["guidance"])
        guidance |= {"types": tuple(guidance["types"]), "ids": tuple(map(tuple, guidance["ids"]))}
        rows = []
        for row in values["rows"]:
            by_type = {name: Rounding(**each) for name, each in row["by_type"].items()}
            rows.append(TensorSensitivity(**row | {"shape": tuple(row["shape"]), "by_type": by_type}))
        return cls(values["sha256"], Guidance(**guidance), tuple(rows), values["domains"], values["others"])


def name_guide(guide: Guide) -> str:
    """Return the guide in words."""
    return "facts and text" if guide == "both" else guide


def check_guide(guide: str) -> None:
    """Raise UsageError for an unknown guide."""
    if guide not in GUIDES:
        raise UsageError(f"--guide: there is no guide {guide!r}.", hint=f"Choose from {', '.join(GUIDES)}.")


def can_guide(number: int, facts: str, guide: Guide, *, is_search: bool) -> bool:
    """Return whether `number` facts can guide. Raises UsageError, which begins with `facts`, if not but they must."""
    if number < FEWEST and guide != "text":
        raise UsageError(
            f"{facts}, and {FEWEST} are needed to guide.",
            why="A third of all facts guides a search; the others are held out." if is_search else None,
            hint="Give more or other --facts, or --guide text.",
        )
    return number >= FEWEST


def warn_of_few_facts(guidance: Guidance) -> Iterator[str]:
    """Warn if the model knew too few facts, so that only text guided."""
    if not guidance.facts:
        yield (
            f"The model knows fewer than {FEWEST} of the facts, too few to measure which are at risk: only text "
            "guides. Give more or other facts."
        )


def open_facts(names: str | Sequence[str] | None, data: str | Path | None) -> list[Probe]:
    """Open the probes whose facts guide; `data` is the folder of data sets. Raises UsageError for texts and tasks."""
    probes = []
    for each in open_named(names, Options(data=None if data is None else Path(data))):
        if not isinstance(each, Probe):
            raise UsageError(f"{each.name}: it has no facts to guide by.", hint="Give atlas or facts:FILE.jsonl.")
        probes.append(each)
    return probes


def write_sensitivity(sensitivity: Sensitivity, path: Path) -> None:
    """Write a sensitivity atomically, with a hash of its content."""
    sealed = seal_manifest({"sensitivity": sensitivity.as_json()})
    write_whole(path, json.dumps(sealed, separators=(",", ":")).encode())


def read_sensitivity(path: Path, sha256: str, guidance: Guidance) -> Sensitivity | None:
    """Return the stored sensitivity of this model and guidance; None if it is missing, different or damaged."""
    try:
        record = read_json(path, RECORD)
        if record[SEAL] != hash_manifest(record):
            return None
        stored = Sensitivity.from_json(record["sensitivity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return replace(stored, guidance=guidance) if (stored.sha256, stored.guidance) == (sha256, guidance) else None
