"""The sub-commands of `python -m learning`, one file each: `add_parser(commands)` declares it, `run(args)` does it."""

from . import evaluate, export, import_mask, learn, prune, refit

COMMANDS = (prune, learn, refit, evaluate, export, import_mask)
