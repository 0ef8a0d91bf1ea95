"""The same work in rt_lens and in its peers, one worker file per tool."""
