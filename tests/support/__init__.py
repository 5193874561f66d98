"""What the tests share: strategies, an independent oracle, payload digests, fixtures."""
