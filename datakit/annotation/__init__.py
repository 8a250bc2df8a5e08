"""Adding answers, verdicts and labels to rows."""
