"""The loop that learns masks, on one process or many."""
