"""ImageNet's class names stand in their order, and a class is found by what people call it."""

from collections import Counter

import pytest

from nextscale.datasets.imagenet import IMAGENET, find_class


def test_there_are_a_thousand_different_names() -> None:
    assert len(IMAGENET) == len(set(IMAGENET)) == 1000
    for entry in IMAGENET:
        synonyms = entry.split(", ")
        assert 1 <= len(synonyms) <= 3, entry
        assert all(part and part == part.strip() and "," not in part for part in synonyms), entry


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (0, "tench"),
        (88, "macaw"),
        (134, "crane"),
        (207, "golden retriever"),
        (281, "tabby"),
        (388, "giant panda"),
        (517, "crane"),
        (638, "maillot"),
        (639, "maillot"),
        (817, "sports car"),
        (933, "cheeseburger"),
        (980, "volcano"),
        (999, "toilet tissue"),
    ],
)
def test_the_order_is_that_of_the_challenge(number: int, name: str) -> None:
    assert IMAGENET[number].split(", ")[0] == name


def test_every_class_has_a_synonym_that_finds_it() -> None:
    classes = [entry.lower().replace("-", " ").split(", ") for entry in IMAGENET]
    uses = Counter(synonym for synonyms in classes for synonym in set(synonyms))
    assert {synonym for synonym, count in uses.items() if count > 1} == {"cardigan", "crane", "maillot"}
    for number, synonyms in enumerate(classes):
        own = next(synonym for synonym in synonyms if uses[synonym] == 1)
        if own != synonyms[0]:
            assert find_class(own, IMAGENET) == number


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("golden retriever", 207),
        ("Golden_Retriever", 207),
        ("  GOLDEN   retriever ", 207),
        ("golden-retriever", 207),
        ("toilet paper", 999),
        ("orca", 148),
        ("crane bird", 134),
        ("construction crane", 517),
        ("cardigan sweater", 474),
        ("shih tzu", 155),
        ("tiger", 292),
    ],
)
def test_a_class_is_found_by_any_synonym_however_written(name: str, number: int) -> None:
    assert find_class(name, IMAGENET) == number


def test_a_word_of_one_name_only_finds_its_class() -> None:
    assert find_class("triumphal", IMAGENET) == IMAGENET.index("triumphal arch")


def test_an_ambiguous_name_lists_the_classes() -> None:
    with pytest.raises(ValueError, match=r"'crane' could be any of 134: crane, .*; 517: crane, .*; give the number"):
        find_class("crane", IMAGENET)


def test_a_long_list_of_classes_says_how_many_it_leaves_out() -> None:
    terriers = sum("terrier" in entry.lower().replace(",", "").split() for entry in IMAGENET)
    with pytest.raises(ValueError, match=rf"and {terriers - 8} more; give the number"):
        find_class("terrier", IMAGENET)


def test_an_unknown_name_brings_suggestions_each_once() -> None:
    with pytest.raises(ValueError, match="no class is called 'volcanoe'; did you mean volcano"):
        find_class("volcanoe", IMAGENET)
    with pytest.raises(ValueError) as caught:
        find_class("cardigann", IMAGENET)
    hints = str(caught.value).split("did you mean ")[1].removesuffix("?").split(" or ")
    assert "cardigan" in hints and len(hints) == len(set(hints))


def test_a_name_like_nothing_known_brings_all_names_where_they_are_few() -> None:
    with pytest.raises(ValueError, match="no class is called 'qqqqzzzzxxxx'; there are cat, big dog"):
        find_class("qqqqzzzzxxxx", ["cat", "big dog"])


def test_a_name_like_nothing_known_brings_no_suggestion() -> None:
    with pytest.raises(ValueError, match=r"no class is called 'qqqqzzzzxxxx'$"):
        find_class("qqqqzzzzxxxx", IMAGENET)


@pytest.mark.parametrize("names", [None, ()])
def test_a_model_without_names_says_so(names: tuple[str, ...] | None) -> None:
    with pytest.raises(ValueError, match="by number only"):
        find_class("volcano", names)
