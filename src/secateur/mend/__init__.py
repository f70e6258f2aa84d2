"""MAKING it good: what is left after a cut is repaired, in closed form."""
