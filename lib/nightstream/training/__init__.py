"""From events to a model version."""
