"""How a fact is scored: one scorer per model family, and what they share."""
