"""Cheaper steps: fused Triton kernels for the ops that the core defines. None ship yet; see CHANGELOG.md."""

if __name__ != "fastsample.kernels":
    raise ImportError(
        "`import kernels` found the folder of fastsample's kernels instead of the PyPI package of that name, because "
        "Python started in fastsample's repository root; run `pytest`, not `python -m pytest`, or start elsewhere"
    )
