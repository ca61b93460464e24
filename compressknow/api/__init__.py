"""Functions of the package, one per verb: what is checked first, the steps, what comes back."""
