"""Scoring of facts: one scorer per model family, and what they share."""
