"""The dashboard: pages in a browser that show the figures of `rt_lens.plots` and call the rooms below."""
