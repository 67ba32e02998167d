"""Languages by the shipped model, scored in double precision; the same answers as the package's own."""

import json

import pytest

from repro_assets.data.language import model
from repro_assets_tests.data.material import GSM8K

TEXTS = {
    "en": "The quick brown fox jumps over the lazy dog, and nobody minds.",
    "de": "Könnten Sie mir bitte erklären, wie ich mein Kennwort ändern kann?",
    "fr": "Je voudrais savoir quand ma commande sera enfin livrée chez moi.",
    "cs": "Příliš žluťoučký kůň úpěl ďábelské ódy a nikdo ho neslyšel.",
    "zh": "我想知道我的订单什么时候可以送到家里，请告诉我具体的时间安排好吗谢谢您",
    "ru": "Подскажите, пожалуйста, когда будет доставлен мой заказ.",
}


@pytest.mark.parametrize("language", sorted(TEXTS))
def test_a_sentence_is_told_by_its_language(language: str) -> None:
    assert model().of([TEXTS[language]]) == language


def test_the_answers_are_those_of_the_package() -> None:
    import py3langid

    texts = [*TEXTS.values(), *(json.loads(line)["question"] for line in GSM8K.read_text().splitlines()[:60]), TEXTS["en"].upper()]
    assert [model().of([text]) for text in texts] == [py3langid.classify(text)[0] for text in texts]


@pytest.mark.parametrize("text", ["", "12345 67890 !?", "ok, thanks", "\ud800" * 30])
def test_what_has_too_few_letters_has_no_language(text: str) -> None:
    assert model().of([text]) is None


def test_all_turns_count_together() -> None:
    assert model().of(["Where is", "it?", "In the other warehouse."]) == "en"
