"""word2vec: what a text gives to learn from, the objectives and their gradients, and files of word vectors."""

from etude.language.word2vec.files import read_vectors, write_vectors
from etude.language.word2vec.pairs import Vocabulary, split_words
from etude.language.word2vec.scores import analogy_scores, nearest, similarity_score

__all__ = [
    "Vocabulary",
    "analogy_scores",
    "nearest",
    "read_vectors",
    "similarity_score",
    "split_words",
    "write_vectors",
]
