"""What it is fed: records, codec, puzzles, data sets, their order."""
