"""The asset graph: raw data to a promoted, proven model. `definitions.py` assembles it; see README."""
