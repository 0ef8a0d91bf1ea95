"""The same work in rt_lens and in its peers, one worker file per tool. Only `write_inputs` and rt_lens's worker need rt_lens."""
