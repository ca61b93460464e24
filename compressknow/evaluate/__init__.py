"""Facts in, answers out: sources of facts, one scorer per model family, and what runs a model over them."""
