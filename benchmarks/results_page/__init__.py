"""docs/results.md from the files in benchmarks/results/: one module a kind of file, found by the program that wrote it."""
