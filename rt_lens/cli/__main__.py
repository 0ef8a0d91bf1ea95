"""`python -m rt_lens.cli`, the same as `rt-lens`."""

from rt_lens.cli import main

main()
