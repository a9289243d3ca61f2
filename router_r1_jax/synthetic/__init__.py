"""The synthetic world: facts, questions, simulated models and their server, scripted episodes, curriculum, oracle."""
