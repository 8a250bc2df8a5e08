"""Making new rows: instructions, rationales, multi-instruction pairs, pairs from user edits."""
