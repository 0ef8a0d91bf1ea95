"""The built-in ways to install a behaviour, one file each. `rt_lens.arms.registry` imports them by name."""
