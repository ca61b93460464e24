"""A sensitivity made by hand, and its pages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compressknow.pages.pages import render_html, render_markdown
from compressknow.study.map import Map, build_page
from compressknow.study.sensitivity import Guidance, Rounding, Sensitivity, TensorSensitivity

TYPES = {"q8_0": 1.0, "q6_k": 4.0, "q4_k": 40.0, "q4_0": 64.0, "q3_k": 300.0}
BITS = {"q8_0": 8.5, "q6_k": 6.5625, "q4_k": 4.5, "q4_0": 4.5, "q3_k": 3.4375}
DOMAINS = {"geography": 40, "science": 25}


def make_row(
    name: str, *, layer: int | None, base: float, stack: str | None = None, group: str = "attention"
) -> TensorSensitivity:
    """Return a weight that loses `base` in q8_0, and the multiples of `TYPES` in other types."""
    shape = (256, 1024)
    types = {
        kind: Rounding(round(256 * 1024 * BITS[kind] / 8), base * times, base * times / 2, min(1.0, base * times * 3))
        for kind, times in TYPES.items()
    }
    return TensorSensitivity(
        f"{stack}.{layer}.{name}.weight", shape, group, layer, types, stack, name, {"geography": 1.5, "science": 0.5}
    )


def make_sensitivity(layers: int = 6, **changes: Any) -> Sensitivity:
    """Return rows from the last layer to the first, as they are measured; v_proj of layer 2 matters most."""
    modules = {"self_attn.q_proj": 1, "self_attn.v_proj": 8, "mlp.down_proj": 3}
    rows = [make_row("lm_head", layer=None, base=2e-5, group="final")]
    rows += [
        make_row(name, layer=layer, base=1e-5 * base * (20 if (layer, base) == (2, 8) else 1 + layer))
        for layer in reversed(range(layers))
        for name, base in modules.items()
    ]
    guidance = Guidance("gguf", tuple(TYPES), 120, "f" * 64, 2048, "e" * 64)
    return replace(Sensitivity("a" * 64, guidance, tuple(rows), DOMAINS, 5000), **changes)


def render_map_html(map: Map) -> str:
    return render_html(build_page(map, charts=True))


def render_map_markdown(map: Map) -> str:
    return render_markdown(build_page(map, charts=False))
