"""Everything that is to be measured on a CUDA card, as one command: ``python -m benchmarks.card``."""
