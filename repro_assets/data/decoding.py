"""Token ids back as text, for people who look at them. Making ids is `tokenizing.py`; nothing that enters an identity comes from here."""

import json
from collections.abc import Iterable

from repro_assets.data.errors import TokenizerError
from repro_assets.documents import BaseModel
from repro_assets.trust.blob import BlobStore


class Decoder:
    """The tokenizer of a base model, reading only."""

    def __init__(self, store: BlobStore, model: BaseModel) -> None:
        """Raises TokenizerError when the base model has no tokenizer.json."""
        import tokenizers

        if "tokenizer.json" not in model.model_files:
            raise TokenizerError("the base model has no tokenizer.json; save its fast tokenizer with `save_pretrained` and use that folder")
        definition = json.loads(store.get_bytes(model.model_files["tokenizer.json"].sha256))
        self._engine = tokenizers.Tokenizer.from_str(json.dumps(definition, ensure_ascii=False))

    def text(self, ids: Iterable[int]) -> str:
        """The text of a run of tokens, control tokens included."""
        return str(self._engine.decode([int(token) for token in ids], skip_special_tokens=False))

    def piece(self, token: int) -> str:
        """The text of one token; where it holds only part of a character, the vocabulary's own spelling of its bytes."""
        text = self.text([token])
        if text and "\ufffd" not in text:
            return text
        spelled = self._engine.id_to_token(int(token))
        return text if spelled is None else str(spelled)
