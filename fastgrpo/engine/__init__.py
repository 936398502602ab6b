"""The engine: log-probs and GRPO steps of whole groups."""

from fastgrpo.engine.score import GroupScores, score
