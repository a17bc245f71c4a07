"""Where candidates come from besides the encoders: one file per source, and the registry that lists them."""
