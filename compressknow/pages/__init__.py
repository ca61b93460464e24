"""Records to pages: what is shown of cards, comparisons, studies and searches. No model is opened here."""
