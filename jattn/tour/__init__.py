"""The tour of `python -m jattn`: a walk through attention on the user's own words or array, and its proof."""
