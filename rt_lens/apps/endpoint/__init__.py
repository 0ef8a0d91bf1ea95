"""An OpenAI-compatible endpoint on this machine, whose model names are arms. It imports the other rooms and none it."""
