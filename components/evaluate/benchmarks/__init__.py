"""The field's benchmarks: what each asks, how it is scored by its own published rule, and where to get it."""
