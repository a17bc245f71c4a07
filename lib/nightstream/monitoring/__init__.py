"""Watches the stream and the lists, and never stops what it watches."""
