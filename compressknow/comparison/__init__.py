"""Answers to numbers: paired by fact, with intervals and tests. Pure functions of records."""
