"""What the returned numbers mean: a method's own words first, then the shared ones, with and without a split in front."""

from etude import catalog
from etude.core.meanings import SHARED, explained, meaning

OWN = {"nll": "ours", "drop_*": "a fall", "drop_all": "the whole fall"}


def test_own_words_come_before_shared_ones():
    assert meaning("nll", OWN) == "ours"
    assert meaning("loss", OWN) == SHARED["loss"]
    assert meaning("drop_centre", OWN) == "a fall"
    assert meaning("drop_all", OWN) == "the whole fall"
    assert meaning("unheard_of", OWN) == ""


def test_a_split_is_said_once():
    assert meaning("test_nll", OWN) == "ours, on the test split, scored once, at the end"
    assert (
        meaning("validation_accuracy", {})
        == SHARED["accuracy"] + ", on the validation split, by which choices are made"
    )
    assert meaning("test_loss", {}) == SHARED["test_loss"]


def test_a_pattern_stands_once_and_in_place():
    rows = explained(["drop_b", "loss", "drop_a", "drop_all"], OWN)
    assert rows == [("drop_*", "a fall"), ("loss", SHARED["loss"]), ("drop_all", "the whole fall")]


def test_a_method_tells_what_it_returns():
    numbers = dict(catalog.find("gans/wgan").numbers)
    assert {"test_frechet_ratio", "test_distance", "test_modes"} <= numbers.keys()
    assert all(numbers.values())
    assert catalog.find("games/cfr").metrics["value"] == dict(catalog.find("games/cfr").numbers)["value"]
