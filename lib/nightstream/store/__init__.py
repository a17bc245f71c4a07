"""The Delta tables and every way to read and write them."""
