"""Questions with gold answers: the synthetic world, TFDS builders, the question iterator and scripted episodes."""
