"""Captions made by a machine: what to label, who labels, what is kept."""
