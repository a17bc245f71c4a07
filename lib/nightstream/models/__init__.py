"""No Spark here: arrays in, vectors and lists out."""
