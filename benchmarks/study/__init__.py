"""Does KV-CAT make caches more compressible? A study on a small model of our own: `python -m benchmarks.study` (README.md)."""
