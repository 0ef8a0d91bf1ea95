"""Turns the folder of a finished run into one HTML page that opens offline. This room reads files, and knows no model.

The page is made from results.json, responses.jsonl and projections.json alone. A model or a user wrote the text in
them, so all of it is escaped: here by `html.escape`, and in figures by `rt_lens.plots`.
"""
