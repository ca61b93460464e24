"""What options take: a share, or one of several names."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import click

from compressknow.errors import did_you_mean


class Share(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click alone
    """A number such as 0.2, or the same as percent: 20%. Whoever takes it says in which bounds it must lie."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number itself, of a text that holds one."""
        text = str(value).strip()
        number = text.removesuffix("%").rstrip()
        try:
            # 0.07 of "7%", where 7 * 0.01 would be 0.07000000000000001.
            return float(Decimal(number) / 100 if text.endswith("%") else Decimal(number))
        except (InvalidOperation, OverflowError):
            self.fail(f"{text!r} is no number; write 0.2 or 20%.", param, ctx)


class OneOf(click.Choice[str]):
    """One of some names, in any case of letters; what is nearly one of them is told so."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names, case_sensitive=False)

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:  # noqa: ARG002
        """Of a name that is none of them."""
        return f"{value!r} is not known. {did_you_mean(str(value), self.choices)}There is {', '.join(self.choices)}."
