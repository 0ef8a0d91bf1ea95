"""The `rt-lens` command. It reads arguments and calls the other rooms, and no other room imports it."""

from __future__ import annotations

import logging
import sys
import warnings

from rt_lens.apps.cli import checking, looking, measuring, steering, tuning
from rt_lens.apps.cli.app import app
from rt_lens.common.threads import wait_gently

__all__ = ["app", "checking", "looking", "main", "measuring", "steering", "tuning"]


def main() -> None:
    """Entry point. Bad input gives one line and exit code 2."""
    wait_gently()  # the commands import torch
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", category=UserWarning, module="rt_lens")  # such as abstentions of a judge
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        app()
    except (ValueError, KeyError, OSError, ImportError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        sys.stderr.write(f"rt-lens: {message}\n")
        raise SystemExit(2) from None
