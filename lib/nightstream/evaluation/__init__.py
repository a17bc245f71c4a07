"""Protocols, offline scores, and the gate before publishing."""
