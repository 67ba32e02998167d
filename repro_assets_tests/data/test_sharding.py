"""Token leaves: contents against the codec, reuse across snapshots, truncation and untrained records."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

from repro_assets.data import engines, leaves, lines, sharding
from repro_assets.data.errors import DataError, LeafError, WorkerLost
from repro_assets.data.lines import Record
from repro_assets.data.tokenizing import Codec, load
from repro_assets.data.workers import Spawn
from repro_assets.documents import BaseModel, Records, Shards, ShardsObserved
from repro_assets.recipe import RecordsSection, ShardingSection, Split
from repro_assets.trust.blob import BlobMissing, FolderStore
from repro_assets.trust.canonical import digest
from repro_assets_tests.data.material import CHAT, CHATML, PAIR, Raw, base_model_of, jsonl, row

MakeRaw = Callable[[Mapping[str, bytes]], Raw]
SECTION = ShardingSection()
CLEANING = RecordsSection(sources=(CHAT,), split=Split(validation=0.1))


@pytest.fixture
def chats(raw: MakeRaw) -> Callable[[list[str]], Records]:
    return lambda texts: raw({"a.jsonl": jsonl(*(row(text, f"answer to {text}") for text in texts))}).records(CLEANING, target=8)


def numbers(count: int) -> list[str]:
    return [f"question number {n}" for n in range(count)]


def contents(shards: Shards, observed: ShardsObserved, store: FolderStore) -> list[tuple[str, str, list[int]]]:
    return [
        (entry.split, name, ids.tolist())
        for entry, leaf in sharding.stored_leaves(shards, observed, store)
        for name, ids in zip(leaf.records, leaf.ids, strict=True)
    ]


def test_each_record_leaf_has_its_token_leaf_with_the_codecs_ids(
    chats: Callable[[list[str]], Records], base_model: BaseModel, store: FolderStore
) -> None:
    """S0.16, S0.55: shards under content-addressed names."""
    made = chats(numbers(100))
    shards, observed = sharding.build(made, base_model, SECTION, store)
    assert [(entry.split, entry.source, entry.records) for entry in shards.leaves] == [
        (leaf.split, leaf.blob.sha256, leaf.records) for leaf in made.leaves
    ]
    expected = []
    codec = load(store, base_model)
    for leaf in made.leaves:
        held = list(lines.read(store, [leaf.blob]))
        for record, tokens in zip(held, codec.tokens(held, SECTION.max_tokens), strict=True):
            expected.append((leaf.split, record.id, tokens.ids.tolist()))
    assert contents(shards, observed, store) == expected
    assert shards.tokens == {split: sum(len(ids) for side, _name, ids in expected if side == split) for split in ("train", "validation")}
    assert shards.records == made.splits
    assert shards.slices == {"intent": {"refund": 100}} == made.slices
    assert sum(shards.lengths.values()) == 100
    assert observed.tokens_new == sum(shards.tokens.values())
    assert set(observed.stored) == {entry.sha256 for entry in shards.leaves}
    assert (shards.tokenizer, shards.template, shards.width) == (base_model.tokenizer, base_model.template, 2)


def test_the_same_records_give_the_same_shards_in_another_store(tokenizer_json: bytes, store: FolderStore) -> None:
    """S0.4: same inputs, same artefacts."""
    results = []
    for name in ("one", "two"):
        other = FolderStore(store.root / name)
        made = Raw({"a.jsonl": jsonl(*(row(text) for text in numbers(50)))}, other).records(CLEANING, target=8)
        results.append(digest(sharding.build(made, base_model_of(other, tokenizer_json, CHATML), SECTION, other)[0]))
    assert results[0] == results[1]


def test_unchanged_leaves_are_neither_tokenised_nor_stored_again(
    chats: Callable[[list[str]], Records], base_model: BaseModel, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sharding.build(chats(numbers(200)), base_model, SECTION, store)
    tokenised: list[str] = []
    stored: list[int] = []
    real = Codec.tokens
    monkeypatch.setattr(
        Codec, "tokens", lambda self, some, *how: (tokenised.extend(r.messages[0].content for r in some), real(self, some, *how))[1]
    )
    put = FolderStore.put_bytes
    monkeypatch.setattr(FolderStore, "put_bytes", lambda self, data: (stored.append(len(data)), put(self, data))[1])

    same = chats(numbers(200))
    stored.clear()
    again, observed = sharding.build(same, base_model, SECTION, store, first)
    assert again == first[0]
    assert (tokenised, stored) == ([], [0])  # the quarantine, which is empty
    assert (observed.leaves_reused, observed.leaves_new, observed.tokens_new) == (len(again.leaves), 0, 0)

    edited = ["brand new", *numbers(200)]
    edited[100] = "an edit"
    made = chats(edited)
    stored.clear()
    now, observed = sharding.build(made, base_model, SECTION, store, first)
    assert sorted(tokenised) == ["an edit", "brand new"]
    assert len(stored) - 1 == observed.leaves_new <= 8
    assert observed.records_new == 2
    fresh = sharding.build(made, base_model, SECTION, store)
    assert now == fresh[0]
    assert 0 < observed.tokens_new < 60 < fresh[1].tokens_new


def test_shards_of_another_tokenizer_template_or_engine_give_nothing(
    chats: Callable[[list[str]], Records], base_model: BaseModel, store: FolderStore, tokenizer_json: bytes
) -> None:
    made = chats(numbers(40))
    before = sharding.build(made, base_model, SECTION, store)
    now, observed = sharding.build(made, base_model_of(store, tokenizer_json, CHATML), SECTION, store, before)
    assert (observed.leaves_reused, observed.tokens_new) == (0, sum(now.tokens.values()))
    assert {entry.sha256 for entry in now.leaves}.isdisjoint(entry.sha256 for entry in before[0].leaves)


def test_leaves_that_the_store_has_lost_are_made_again(
    chats: Callable[[list[str]], Records], base_model: BaseModel, store: FolderStore
) -> None:
    made = chats(numbers(60))
    before = sharding.build(made, base_model, SECTION, store)
    lost = next(iter(before[1].stored.values())).sha256
    (store.root / "sha256" / lost[:2] / lost).unlink()
    now, observed = sharding.build(made, base_model, SECTION, store, before)
    assert (now, observed.leaves_new) == (before[0], 1)


def test_a_record_taken_over_with_a_wrong_token_digest_is_refused(
    chats: Callable[[list[str]], Records], base_model: BaseModel, store: FolderStore
) -> None:
    shards, observed = sharding.build(chats(numbers(30)), base_model, SECTION, store)
    forged_leaves, stored = [], {}
    for entry, leaf in sharding.stored_leaves(shards, observed, store):
        forged = leaves.Leaf(
            **{**{name: getattr(leaf, name) for name in leaf.__dataclass_fields__}, "flat_ids": leaf.flat_ids[::-1].copy()}
        )
        name = leaves.identity(forged)
        forged_leaves.append(msgspec.structs.replace(entry, sha256=name))
        stored[name] = store.put_bytes(leaves.store_form(forged))
    forged_shards = type(shards)(**{**{name: getattr(shards, name) for name in shards.__struct_fields__}, "leaves": tuple(forged_leaves)})
    forged_observed = ShardsObserved(stored, 0, 0, 0, 0, 0.0)
    with pytest.raises(LeafError, match=r"record [0-9a-f]{64}: its token digest in the previous shards does not fit its ids.*no-memo"):
        sharding.build(chats(["new first", *numbers(30)]), base_model, SECTION, store, (forged_shards, forged_observed))


def test_what_is_cut_off_and_left_out_is_counted(raw: MakeRaw, base_model: BaseModel, store: FolderStore) -> None:
    """Truncation is reported in tokens, and a record that lost all its trained tokens is not trained on in silence."""
    texts = [("short", "ok"), ("short", "x " * 200), ("q " * 200, "never reached")]
    made = raw({"a.jsonl": jsonl(*(row(text, answer) for text, answer in texts))}).records(
        RecordsSection(sources=(CHAT,), split=Split(validation=0))
    )
    shards, observed = sharding.build(made, base_model, ShardingSection(max_tokens=100), store)
    assert (shards.truncated_records, shards.untrained_records, shards.records["train"]) == (1, 1, 2)
    codec = load(store, base_model)
    whole = codec.tokens(list(lines.read(store, [leaf.blob for leaf in made.leaves])), 10_000)
    (long,) = (tokens for tokens in whole if tokens.trained > 150)
    assert shards.truncated_tokens == len(long.ids) - 100
    again = sharding.build(made, base_model, ShardingSection(max_tokens=100), store, (shards, observed))
    assert again[0] == shards


def test_records_without_any_trained_token_stop_the_asset(raw: MakeRaw, base_model: BaseModel, store: FolderStore) -> None:
    made = raw({"a.jsonl": jsonl(row("q " * 50))}).records(CLEANING)
    with pytest.raises(DataError, match=r"none of 1 records has a trained token: .*sharding\.max_tokens"):
        sharding.build(made, base_model, ShardingSection(max_tokens=10), store)


def test_a_leaf_whose_stored_form_is_unknown_or_gone_is_named(
    chats: Callable[[list[str]], Records], base_model: BaseModel, store: FolderStore
) -> None:
    shards, _observed = sharding.build(chats(numbers(10)), base_model, SECTION, store)
    first = shards.leaves[0].sha256
    with pytest.raises(BlobMissing, match=f"token leaf {first}: the shards do not say where"):
        list(sharding.stored_leaves(shards, ShardsObserved({}, 0, 0, 0, 0, 0.0), store))


@pytest.mark.parametrize(("length", "edge"), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 4), (1023, 512), (1024, 1024)])
def test_lengths_are_counted_by_powers_of_two(length: int, edge: int) -> None:
    """S0.32: token-length distribution on fixed edges."""
    assert sharding.edges(np.array([length])) == [edge]


def test_real_rows_have_the_ids_and_spans_that_they_should(raw: MakeRaw, base_model: BaseModel, store: FolderStore, gsm8k: bytes) -> None:
    """S0.34: real rows through reading, cleaning, rendering, tokenising and cutting."""
    made = raw({"gsm8k/train.jsonl": gsm8k}).records(PAIR)
    shards, observed = sharding.build(made, base_model, SECTION, store)
    engine = load(store, base_model)._engine
    expected = {}
    for line in gsm8k.splitlines():
        fields = json.loads(line)
        asked, said = f"<|user|>{fields['question']}<|end|><|assistant|>", f"{fields['answer']}<|end|>"
        prompt = engine.encode(asked, add_special_tokens=False).ids
        whole = engine.encode(asked + said, add_special_tokens=False).ids
        messages = [{"role": "user", "content": fields["question"]}, {"role": "assistant", "content": fields["answer"]}]
        expected[digest(messages)] = (whole, [[len(prompt), len(whole)]])
    found = {
        name: (ids.tolist(), spans.tolist())
        for _entry, leaf in sharding.stored_leaves(shards, observed, store)
        for name, ids, spans in zip(leaf.records, leaf.ids, leaf.spans, strict=True)
    }
    assert found == expected
    assert len(found) == 400


def test_an_engine_that_fails_on_a_sampled_record_is_replaced_for_every_record(
    chats: Callable[[list[str]], Records], base_model: BaseModel, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0.20: nothing that the wrong engine made is kept, and the page says why."""
    made = chats(numbers(100))
    fast = ShardingSection(engine="fastokens")
    right = sharding.build(made, base_model, fast, store)[0]
    assert right.engine.name == "fastokens"

    def differs(_self: Codec, records: Sequence[Record], *_how: Any) -> None:
        raise engines.EngineMismatch(f"record {records[0].id}: other tokens", engines.refusal("0", "gave a sampled record other tokens"))

    monkeypatch.setattr(Codec, "_compare", differs)  # what makes it raise is tested with the engines
    shards, observed = sharding.build(made, base_model, fast, store)
    assert shards.engine.name == "tokenizers"
    assert "gave a sampled record other tokens" in str(shards.engine.gate)
    assert [leaf.sha256 for leaf in shards.leaves] == [leaf.sha256 for leaf in right.leaves]
    assert set(observed.stored) == {leaf.sha256 for leaf in shards.leaves}


def test_workers_take_fastokens_untried_and_nothing_of_theirs_is_kept_when_it_fails_the_gate_here(
    chats: Callable[[list[str]], Records], base_model: BaseModel, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = chats(numbers(300))
    fast = ShardingSection(engine="fastokens")
    alone = sharding.build(made, base_model, fast, store)[0]
    assert sharding.build(made, base_model, fast, store, workers=Spawn(2))[0] == alone
    plain = sharding.build(made, base_model, ShardingSection(), store)[0]
    # Seen by this process only: the workers' own library passes no judgement.
    monkeypatch.setattr(engines, "difference", lambda *_how: "'x': at token 0 [1] became [2]")
    refused, observed = sharding.build(made, base_model, fast, store, workers=Spawn(2))
    assert refused.engine.name == "tokenizers"
    assert "gives other ids than tokenizers" in str(refused.engine.gate)
    assert refused == msgspec.structs.replace(plain, engine=refused.engine)
    assert refused == sharding.build(made, base_model, fast, store)[0]
    assert set(observed.stored) == {leaf.sha256 for leaf in refused.leaves}


def test_a_worker_with_another_tokenizer_library_is_named(
    chats: Callable[[list[str]], Records], base_model: BaseModel, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster's nodes are installed by somebody else: shards must not say of all of them what is true of the driver."""
    made = chats(numbers(10))
    monkeypatch.setattr(engines.Reference, "version", "0.0.1")  # of this process, not of the workers
    with pytest.raises(
        WorkerLost, match=r"a worker tokenised with tokenizers 0\.\d+\.\d+ .*this process with tokenizers 0\.0\.1 .*same lock"
    ):
        sharding.build(made, base_model, ShardingSection(), store, workers=Spawn(1))


def test_one_codec_serves_the_snapshots_of_a_process_until_something_of_it_changes(
    chats: Callable[[list[str]], Records], base_model: BaseModel, tokenizer_json: bytes, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(sharding, "load", lambda *how: loaded.append(how[2]) or load(*how))
    first, second = chats(numbers(20)), chats(numbers(30))
    for made in (first, second, first):
        sharding.build(made, base_model, SECTION, store)
    assert loaded == ["tokenizers"]
    other = base_model_of(store, tokenizer_json, CHATML)
    templated = sharding.build(first, other, SECTION, store)[0]
    assert len(loaded) == 2
    assert templated.leaves != sharding.build(first, base_model, SECTION, store)[0].leaves
    sharding.build(first, base_model, ShardingSection(engine="fastokens"), store)
    sharding.build(first, base_model, SECTION, store)
    sharding.build(first, msgspec.structs.replace(base_model, vocabulary=701), SECTION, store)
    assert loaded == ["tokenizers", "tokenizers", "tokenizers", "fastokens", "tokenizers", "tokenizers"]


def test_an_error_while_workers_run_leaves_none_at_work(
    chats: Callable[[list[str]], Records], base_model: BaseModel, store: FolderStore
) -> None:
    def stop(*_what: object) -> None:
        raise RuntimeError("stopped by the user")

    with pytest.raises(RuntimeError, match="stopped by the user") as caught:
        sharding.build(chats(numbers(600)), base_model, SECTION, store, progress=stop, workers=Spawn(2))
    assert [child.pid for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())] == []
    assert caught.tb is not None  # held until here, with all its frames
