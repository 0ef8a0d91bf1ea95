"""A finished run's folder -> one HTML page that opens anywhere, offline. This room reads files; it never meets a model.

What the page says comes from results.json, responses.jsonl and projections.json alone. Text in them was written by a
model or a user, so it is escaped on every road into the page: here by `html.escape`, and in figures by `rt_lens.plots`.
"""
