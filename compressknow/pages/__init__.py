"""Pages from records: cards, comparisons, studies and searches. No model is opened here."""
