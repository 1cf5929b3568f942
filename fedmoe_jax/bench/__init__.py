"""Benchmarks that `fedmoe bench` runs: one file a question, one JSON object a figure."""
