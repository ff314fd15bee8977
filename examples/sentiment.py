"""A reward for positive texts: VADER's compound score of the response, from -1 to 1.

    pip install vaderSentiment
    python ppo_training.py --reward-function examples/sentiment.py:positive ...

VADER (Hutto and Gilbert 2014) adds up the valence of known words; no model is involved, so it is
quick, repeatable, and easily fooled: see docs/real_models.md for how PPO does it.
"""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyser = SentimentIntensityAnalyzer()


def positive(prompts, responses):
    """How positive each response is, from -1 to 1."""
    return [analyser.polarity_scores(text)["compound"] for text in responses]
