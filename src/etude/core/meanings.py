"""What the numbers of a run mean: a method's own METRICS, and the words that all methods share.

``METRICS = {"overestimation": "max Q of the states …", "variance_*": "…"}`` stands beside SETTINGS in a method's file. A name
may end in ``*``; the split in front of a number (``train_``, ``validation_``, ``test_``) need not be written.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

SHARED = {
    "loss": "mean of the objective over a mini-batch",
    "train_loss": "mean loss on the training split",
    "validation_loss": "mean loss on the validation split",
    "test_loss": "mean loss on the test split, scored once, at the end",
    "accuracy": "share of examples whose class is answered rightly",
    "error": "mean squared error",
    "nll": "mean negative log-likelihood of the right class (nats)",
    "bleu": "BLEU of translations on the text as written, as sacrebleu counts it (0 to 100)",
    "unrelated_bleu": "BLEU of each translation against the target of the next sentence: likely text, source unread",
    "exact_match": "share of the sentences that are translated letter for letter",
    "nats_per_token": "mean negative log-likelihood of a token of the given translations, their ends included (nats)",
    "gradient_norm": "Euclidean norm of the gradient over all parameters, before clipping",
    "modes": "modes that got their samples: Gaussians of the ring, or classes that a judge sees often enough",
    "share": "share of the samples that lie within three standard deviations of a mode",
    "frechet_distance": "Fréchet distance of two Gaussians, fitted to the samples and to the data",
    "frechet_ratio": "Fréchet distance over that of the untrained generator",
    "lenet_frechet_distance": "Fréchet distance between features that a trained LeNet sees in samples and in images",
    "judge_accuracy": "accuracy of that LeNet, whose judgement is used",
    "distance": "exact Wasserstein distance between samples and fresh data",
    "distance_ratio": "the critic's estimate of that distance over the exact one; 1 is best",
    "greedy_return": "mean undiscounted return of episodes in which the likeliest or best action is taken",
    "greedy_return_low": "the least of these returns",
    "sampled_return": "mean undiscounted return of episodes in which actions are drawn from the policy",
    "training_return": "mean undiscounted return of the last episodes of training, exploration included",
    "episode_length": "steps of an episode",
    "learner_return": "mean undiscounted return of the policy that was learned",
    "learner_return_low": "the least of these returns",
    "expert_return": "mean undiscounted return of the expert in the same worlds",
    "training_steps": "recorded steps that were learned from",
    "crash_share": "share of the episodes that ended in a crash",
    "rarer_side_share": "share of the episodes that passed on the side that fewer took; 0: one way was forgotten",
    "env_steps": "environment steps taken, over all worlds",
    "episodes": "episodes that ended",
    "updates": "updates of the parameters",
}
"""Names that mean the same in every method."""

SPLITS = {
    "train_": "on the training split",
    "validation_": "on the validation split, by which choices are made",
    "test_": "on the test split, scored once, at the end",
}


def meaning(name: str, own: dict[str, str]) -> str:
    """What a returned number means, in the words of the method or the shared ones; empty where nobody says."""
    for words in (own, SHARED):
        if said := _found(name, words):
            return said
        for split, where in SPLITS.items():
            if name.startswith(split) and (said := _found(name.removeprefix(split), words)):
                return f"{said}, {where}"
    return ""


def explained(names: Iterable[str], own: dict[str, str]) -> list[tuple[str, str]]:
    """(name or pattern, meaning) of these returned numbers, each pattern of the method's own once, in their order."""
    rows: dict[str, str] = {}
    for name in names:
        pattern = next((key for key in own if "*" in key and fnmatchcase(name, key) and name not in own), name)
        rows[pattern] = meaning(name, own)
    return list(rows.items())


def _found(name: str, words: dict[str, str]) -> str:
    return words.get(name) or next((said for key, said in words.items() if fnmatchcase(name, key)), "")
