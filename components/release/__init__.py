"""Using a trained student: generate, export with a full card, push to the Hub (docs/students.md)."""
