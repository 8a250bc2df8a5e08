"""Prefect flows: the only code that imports Prefect."""
