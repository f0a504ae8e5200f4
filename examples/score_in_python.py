"""Scores two answers to one question with the selector that ships with the package."""

from selectmoe import Message, Sample, ScoredSample, ScoringEngine

QUESTION = "Why is the sky blue?"
ANSWERS = ("Air scatters blue light more than red light.", "sky blue sky blue sky blue")

engine = ScoringEngine.from_pretrained()
samples = [
    Sample("example", answer, (Message("user", QUESTION), Message("assistant", answer)))
    for answer in ANSWERS
]
for sample, outcome in zip(samples, engine.score(samples), strict=True):
    if not isinstance(outcome, ScoredSample):
        print(f"{sample.sample_id}: not scored, {outcome.detail}")
        continue
    percentile = engine.calibration and engine.calibration.percentile(outcome.score)
    print(f"{sample.sample_id}: score {outcome.score:.4f}, percentile {percentile}")
