"""Which language a text is in, by the naive Bayes model that py3langid ships, scored in double precision.

py3langid multiplies in single precision with code that numpy picks by CPU; two scores that lie close could then change places on another
machine. What share of records must be in which language is judged in `conversations.py`.
"""

import math
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

#: letters below which a text is too short to tell
LETTERS = 20
#: characters of a text that are looked at
LOOKED_AT = 4000


class Languages:
    """The model, loaded once. Languages are ISO 639-1 codes."""

    def __init__(self) -> None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        model = LanguageIdentifier.from_model_file(MODEL_FILE)
        self._weights = np.asarray(model.nb_ptc)
        self._prior = np.asarray(model.nb_pc).astype(np.float64)
        self._model: Any = model
        self._rows = [row << 8 for row in model.tk_row]
        self.labels: list[str] = list(model.nb_classes)

    def of(self, texts: Sequence[str]) -> str | None:
        """The likeliest language of the texts together; None when they hold fewer than 20 letters."""
        from py3langid.langid import visit_counts

        text = unicodedata.normalize("NFC", "\n".join(texts)[:LOOKED_AT])
        if sum(map(str.isalpha, text)) < LETTERS:
            return None
        if text.isupper():
            text = text.lower()
        visits = visit_counts(self._model.tk_nextmove, self._rows, self._model.tk_output, text.encode("utf-8", "surrogatepass"))
        if not visits:
            return None
        counts = np.array([math.log1p(count) for count in visits.values()])
        scores = (counts[:, None] * self._weights[list(visits)].astype(np.float64)).sum(axis=0) + self._prior
        return self.labels[int(scores.argmax())]


@cache
def model() -> Languages:
    """The model, loaded once a process: unpacking it takes a second."""
    return Languages()
