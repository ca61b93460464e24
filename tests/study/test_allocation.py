"""The choice of a type per tensor, compared with every possible choice."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressknow.base.errors import UsageError
from compressknow.study.allocation import TypeOption, allocate, check_below_whole, join_options

KINDS = ("q2", "q3", "q4", "q8")
OPTIONS = st.builds(TypeOption, st.integers(1, 400), st.floats(0, 4, allow_subnormal=False))
BY_TYPE = st.dictionaries(st.sampled_from(KINDS), OPTIONS, min_size=1)
TABLES = st.dictionaries(st.text("abc", min_size=1, max_size=4), BY_TYPE, min_size=1, max_size=5)


def list_choices(table):
    """Yield the bytes and the loss of every choice."""
    for kinds in product(*table.values()):
        options = [table[name][kind] for name, kind in zip(table, kinds, strict=True)]
        yield sum(option.nbytes for option in options), sum(option.loss for option in options)


@settings(max_examples=300, deadline=None)
@given(TABLES, st.integers(0, 2000), st.integers(0, 100))
def test_no_choice_within_the_budget_loses_less(table, spare, overhead):
    choices = list(list_choices(table))
    budget = overhead + min(nbytes for nbytes, _ in choices) + spare
    chosen = allocate(table, budget, overhead=overhead)
    options = [table[name][kind] for name, kind in chosen.types.items()]
    assert chosen.types.keys() == table.keys()
    assert chosen.nbytes == overhead + sum(option.nbytes for option in options) <= budget
    assert chosen.loss == sum(option.loss for option in options)
    assert chosen.loss == pytest.approx(min(loss for nbytes, loss in choices if overhead + nbytes <= budget))


@settings(max_examples=100, deadline=None)
@given(TABLES, st.integers(1, 3000))
def test_a_budget_below_the_smallest_file_is_refused(table, missing):
    """The size that the message suggests is sufficient."""
    smallest = min(nbytes for nbytes, _ in list_choices(table)) + 7
    with pytest.raises(UsageError, match=rf"the smallest file has (?s:.*)Give --size {smallest} or more\."):
        allocate(table, smallest - min(missing, smallest), overhead=7)
    assert allocate(table, smallest, overhead=7).nbytes == smallest


def make_realistic_table(count, seed=0):
    """Return tensors of sizes without a common divisor, of which one is a third of the file."""
    random = np.random.default_rng(seed)
    bits = np.array([2.6, 3.4, 4.25, 4.5, 5.0, 5.5, 6.0, 6.6, 8.5, 16.0])
    numel = random.integers(90_001, 900_001, count)
    numel[0] = numel.sum() // 2
    loss = random.lognormal(0, 2, count)
    return {
        f"t{index}": {
            f"{bit}": TypeOption(int(size * bit / 8) + int(random.integers(99)), float(loss[index] * 4.0**-bit))
            for bit in bits
        }
        for index, size in enumerate(numel)
    }


@pytest.mark.parametrize("bits", [3, 4.5, 6])
def test_large_budget_is_almost_fully_used(bits):
    table = make_realistic_table(300)
    numel = sum(options["16.0"].nbytes / 2 for options in table.values())
    budget = int(numel * bits / 8)
    chosen = allocate(table, budget)
    assert budget * 0.998 < chosen.nbytes <= budget
    # In what is left, no tensor could have a better type.
    for name, kind in chosen.types.items():
        now, room = table[name][kind], budget - chosen.nbytes
        assert not any(each.nbytes - now.nbytes <= room and each.loss < now.loss for each in table[name].values())
    # The Lagrangian dual: at any price per byte, no choice loses less than this bound.
    bound = max(
        sum(min(option.loss + price * option.nbytes for option in options.values()) for options in table.values())
        - price * budget
        for price in np.logspace(-14, 0, 300)
    )
    assert bound <= chosen.loss <= bound * 1.02


def test_joined_tensors_share_one_type():
    table = make_realistic_table(12)
    parts = {"three": ("t1", "t2", "t3"), "two": ("t5", "t6")}
    single = {name: (name,) for name in table if not any(name in part for part in parts.values())}
    joined = join_options(table, parts | single)
    assert joined["two"]["4.5"].nbytes == table["t5"]["4.5"].nbytes + table["t6"]["4.5"].nbytes
    chosen = allocate(joined, sum(options["4.5"].nbytes for options in table.values()))
    assert chosen.types.keys() == parts.keys() | single.keys()
    separate = allocate(table, sum(options["4.5"].nbytes for options in table.values()))
    assert separate.loss < chosen.loss


def test_error_lists_the_parts_of_the_smallest_file():
    table = {
        "head": {"q4": TypeOption(9_000_000, 1), "q8": TypeOption(17_000_000, 0)},
        "one": {"q2": TypeOption(1_000_000, 1)},
    }
    with pytest.raises(UsageError) as caught:
        allocate(table, 5_000_000, overhead=500_000)
    assert str(caught.value).splitlines() == [
        "5.0 MB is too small: the smallest file has 10.5 MB.",
        "That is head (q4) 9.0 MB, one (q2) 1.0 MB, and 500.0 kB of vocabulary, norms and metadata.",
        "Give --size 10500000 or more. Types that --must sets count too.",
    ]
    others = {f"t{index}": {"q2": TypeOption(1000 * (9 - index), 1)} for index in range(9)}
    with pytest.raises(UsageError, match=r"one \(q2\) 1\.0 MB, t0 \(q2\) 9\.0 kB, 8 others 36\.0 kB, and 500\.0 kB of"):
        allocate(table | others, 5_000_000, overhead=500_000)
    # Sizes that would read alike have all their digits.
    with pytest.raises(UsageError, match="10,499,999 bytes is too small: the smallest file has 10,500,000 bytes"):
        allocate(table, 10_499_999, overhead=500_000)
    with pytest.raises(UsageError, match="10,500,001 bytes is not less than the whole model, 10,500,000 bytes"):
        check_below_whole(10_500_001, 10_500_000)


def test_joined_tensors_without_a_common_type_are_refused():
    table = {"q": {"q4": TypeOption(4, 1)}, "k": {"q8": TypeOption(8, 0)}}
    with pytest.raises(UsageError, match="qk must share a type, but have none in common"):
        join_options(table, {"qk": ("q", "k")})
