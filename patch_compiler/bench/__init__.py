"""`python -m patch_compiler.bench`: whole models end to end, dense and packed, interleaved on one machine."""
