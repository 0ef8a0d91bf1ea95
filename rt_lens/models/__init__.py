"""Models: loading them, running them fast, their tokens, activations and answers. The only room that builds one."""
