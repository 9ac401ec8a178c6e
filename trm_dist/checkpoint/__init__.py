"""What is kept: names, state, snapshot, seal, store, publishing, retention, resume."""
