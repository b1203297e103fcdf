"""The sub-commands of `python -m learning`, one file each: `add_parser(commands)` declares it, `run(args)` does it."""

from . import evaluate, export, import_mask, learn, prune

COMMANDS = (prune, learn, evaluate, export, import_mask)
