"""What comes out: students to ask, to export with a full card, and to push to the hub (docs/students.md)."""
