"""Studies: expansion of a grid into arms (`expand`), comparison of their runs (`compare`), `plots` and `report`."""
