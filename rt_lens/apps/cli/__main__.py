"""`python -m rt_lens.apps.cli`, the same as `rt-lens`."""

from rt_lens.apps.cli import main

main()
