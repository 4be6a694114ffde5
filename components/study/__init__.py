"""Studies: which students to train (`expand`), what became of each (`record`), what that says (`compare`), which one to use
(`champion`)."""
