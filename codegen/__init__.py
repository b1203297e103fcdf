"""From a packed weight to a running kernel."""
