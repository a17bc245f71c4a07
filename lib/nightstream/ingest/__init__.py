"""Each payload that arrives ends in one table."""
