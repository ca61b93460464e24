"""Forms of JSON values: what a record that is read from a file must hold, as plain data, and a check against it.

A form is a type (``float`` takes whole numbers too, no form takes infinities), None, a tuple of forms of which one must
fit, ``[FORM]`` for a list, ``{str: FORM}`` for an object of any keys, or ``{"key": FORM, "other?": FORM}`` for an
object that has these keys, those with a question mark perhaps; other keys are free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", list: "list", dict: "object"}


def misfit(value: Any, form: Any, where: str = "it") -> str | None:
    """What in a value does not fit a form, and where; None where all does.

    >>> misfit({"n": [1, 2.5]}, {"n": [int], "name?": str})
    'n[1] is no whole number'
    """
    if isinstance(form, tuple):
        wrong = [misfit(value, each, where) for each in form]
        return None if None in wrong else _nearest(value, form, wrong)
    if form is None or isinstance(form, type):
        return None if _is(value, form) else f"{where} is {_no(form)}"
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        found = (misfit(entry, form[0], f"{where}[{i}]") for i, entry in enumerate(value))
        return next((wrong for wrong in found if wrong), None)
    if not isinstance(value, Mapping):
        return f"{where} is no object"
    return _misfit_object(value, form, "" if where == "it" else f"{where}.")


def _misfit_object(value: Mapping[str, Any], form: Mapping[Any, Any], prefix: str) -> str | None:
    if str in form:
        pairs = [(key, form[str]) for key in value]
    else:
        if missing := next((key for key in form if not key.endswith("?") and key not in value), None):
            return f"{prefix}{missing} is missing"
        pairs = [(name, form[key]) for key in form if (name := key.removesuffix("?")) in value]
    found = (misfit(value[key], each, f"{prefix}{key}") for key, each in pairs)
    return next((wrong for wrong in found if wrong), None)


def _is(value: Any, form: type | None) -> bool:
    if form is None or value is None:
        return value is form
    if form is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, form) and (form is bool or not isinstance(value, bool))


def _no(form: type | None) -> str:
    return "not null" if form is None else f"no {_NAMES[form]}"


def _nearest(value: Any, forms: tuple[Any, ...], wrong: list[str | None]) -> str | None:
    """The complaint of the form that was probably meant: the first one of the value's kind."""
    kinds = [isinstance(value, (dict, list)) == isinstance(form, (dict, list)) for form in forms]
    return wrong[kinds.index(True) if True in kinds else 0]
