"""What the recipes share: command line, checkpoints, history."""
