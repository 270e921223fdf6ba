"""flaxsplit measured against the step written by hand, claim by claim: `python -m benchmarks --help`."""
