"""Models: specs, endpoints, the shipped fake, the ledger of answers, embedders."""
