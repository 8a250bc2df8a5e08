"""Tiny steps for tests, named by their dotted path as a third party's steps are."""
