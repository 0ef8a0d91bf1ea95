"""The dashboard: pages in a browser that draw what `rt_lens.plots` gives and compute what the rooms below do."""
