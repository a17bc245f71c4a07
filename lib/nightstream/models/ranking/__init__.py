"""From vectors to a ranked, explained list."""
