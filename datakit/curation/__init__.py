"""Choosing rows: deduplication, decontamination, subset selection."""
