"""Text to token ids, and an instruction with its reasoning to the segments of a batch row."""
