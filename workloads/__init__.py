"""What the examples and the benchmarks train: a model and problems for it, and the memory that a training takes."""
