"""Calibration tokens: every source against hand-packed rows, every message, and the model's own text."""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.errors import SecateurError
from secateur.load.data import Tokenizer, load_tokens, read_records, sample_tokens
from secateur.load.mode import evaluating

BOS, EOS, VOCAB = 0, 1, 260


def tokenizer_with(bos: str | None = "<s>", eos: str | None = "</s>", template: str | None = None) -> Tokenizer:
    """One token per byte, after <s> and </s>."""
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = RawTokenizer(models.BPE(vocab, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos, chat_template=template)
    tokenizer: Tokenizer = fast
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_with()


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def load(source: str | Path, tokenizer: Tokenizer | None, **options: Any) -> torch.Tensor:
    settings: dict[str, Any] = {"vocab_size": VOCAB, "seq_len": 8, "samples": None} | options
    return load_tokens(source, tokenizer=tokenizer, **settings)


def packed(stream: list[int], seq_len: int = 8) -> list[list[int]]:
    rows = []
    while len(stream) >= seq_len:
        rows.append(stream[:seq_len])
        stream = stream[seq_len:]
    return rows


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


TEXTS = ["The cat sat on the mat.", "Ein Bäcker bäckt Brot.", "x" * 30]


def documents(tokenizer: Tokenizer) -> list[int]:
    return [token for text in TEXTS for token in [BOS, *plain(tokenizer, text), EOS]]


def test_txt_jsonl_and_parquet_give_the_same_packed_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    expected = packed(documents(tokenizer))
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    for name, text in zip(("a.txt", "b/a.TXT", "c.txt"), TEXTS, strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "notes.md").write_text("not data")
    (folder / ".hidden.txt").write_text("not data either")
    records = write_jsonl(tmp_path / "t.jsonl", [{"body": text, "id": 3} for text in TEXTS])
    pq.write_table(pa.table({"id": [1, 2, 3], "text": TEXTS}), tmp_path / "t.parquet")
    tokens = load(folder, tokenizer)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == expected
    assert load(str(records), tokenizer, text_field="body").tolist() == expected
    assert load(tmp_path / "t.parquet", tokenizer).tolist() == expected
    assert load(tmp_path / "t.parquet", tokenizer, samples=2).tolist() == expected[:2]
    assert load(tmp_path / "t.parquet", tokenizer, samples=999).tolist() == expected  # all there are


@pytest.mark.parametrize(
    ("bos", "eos", "wrap"),
    [
        ("<s>", "</s>", lambda ids: [0, *ids, 1]),
        (None, "</s>", lambda ids: [*ids, 1]),
        ("<s>", None, lambda ids: [0, *ids]),
        ("</s>", "</s>", lambda ids: [*ids, 1]),
        (None, None, lambda ids: ids),
    ],
)
def test_documents_are_separated_as_the_tokenizer_has_it(tmp_path: Path, bos: Any, eos: Any, wrap: Any) -> None:
    tokenizer = tokenizer_with(bos, eos)
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "ab"}, {"text": ""}, {"text": "cde"}])
    stream = wrap(plain(tokenizer, "ab")) + wrap(plain(tokenizer, "cde"))
    assert load(path, tokenizer, seq_len=len(stream)).tolist() == [stream]


def test_chat_goes_through_the_template_without_a_second_bos(tmp_path: Path) -> None:
    template = "<s>{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    tokenizer = tokenizer_with(template=template)
    messages = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "ho"}]
    stream = [BOS, *plain(tokenizer, "user=hi;bot=ho;"), EOS]
    jsonl = write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "chat.parquet")
    for path in (jsonl, tmp_path / "chat.parquet"):
        assert load(path, tokenizer, seq_len=len(stream)).tolist() == [stream]


class Counting:
    """Counts the characters that were tokenised."""

    def __init__(self, inner: Tokenizer) -> None:
        self.inner, self.characters = inner, 0
        self.bos_token_id, self.eos_token_id = inner.bos_token_id, inner.eos_token_id

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        self.characters += len(text)
        return self.inner.encode(text, add_special_tokens=add_special_tokens, verbose=verbose)


def test_tokenising_stops_when_there_is_enough(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "".join(chr(97 + i * i % 26) for i in range(100_000))
    (tmp_path / "long.txt").write_text(text)
    counting = Counting(tokenizer)
    assert load(tmp_path / "long.txt", counting, samples=3).tolist() == packed([BOS, *plain(tokenizer, text)])[:3]
    assert counting.characters <= 5000
    (tmp_path / "many.jsonl").write_text('{"text": "abcdefghij"}\n' * 4 + "not json, and never read")
    assert len(load(tmp_path / "many.jsonl", tokenizer, samples=5)) == 5


def test_a_cut_text_is_read_further_when_its_tokens_are_too_few(tmp_path: Path) -> None:
    class Wide:
        bos_token_id, eos_token_id = None, None

        def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
            return [ord(text[i]) for i in range(0, len(text), 100)]  # 100 characters per token

    text = "".join(chr(97 + i // 100 % 26) for i in range(100_000))
    (tmp_path / "long.txt").write_text(text)
    expected = packed([97 + i % 26 for i in range(1000)])
    assert load(tmp_path / "long.txt", Wide(), samples=12).tolist() == expected[:12]
    assert load(tmp_path / "long.txt", Wide()).tolist() == expected


def test_npy(tmp_path: Path) -> None:
    stream = np.arange(50, dtype=np.uint16)
    np.save(tmp_path / "flat.npy", stream)
    assert load(tmp_path / "flat.npy", None).tolist() == [list(range(i, i + 8)) for i in range(0, 48, 8)]
    assert load(tmp_path / "flat.npy", None, samples=2).tolist() == [list(range(8)), list(range(8, 16))]
    folder = tmp_path / "rows"
    folder.mkdir()
    np.save(folder / "a.npy", stream.reshape(5, 10))
    np.save(folder / "b.npy", stream.reshape(5, 10)[::-1].astype(np.int32))
    assert load(folder / "a.npy", None).tolist() == [list(range(i, i + 8)) for i in range(0, 50, 10)]  # cut
    assert load(folder / "a.npy", None, seq_len=20).shape == (5, 10)  # kept
    assert load(folder, None, samples=6)[:, 0].tolist() == [0, 10, 20, 30, 40, 40]


def test_a_folder_joins_text_and_streams_in_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    np.save(tmp_path / "a.npy", np.array([5, 6, 7]))
    (tmp_path / "b.txt").write_text("abc")
    stream = [5, 6, 7, BOS, *plain(tokenizer, "abc"), EOS]
    assert load(tmp_path, tokenizer).tolist() == [stream]


def fails(source: str | Path, tokenizer: Tokenizer | None, *parts: str, **options: Any) -> None:
    with pytest.raises(SecateurError) as caught:
        load(source, tokenizer, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_missing_and_unknown_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "calibration.txt").write_text("hello")
    fails(tmp_path / "calibratoin.txt", tokenizer, "no such file", "did you mean 'calibration.txt'?")
    fails(tmp_path / "nowhere" / "x.txt", tokenizer, "no such file", "no folder", "nowhere")
    (tmp_path / "a.csv").write_text("a,b")
    fails(tmp_path / "a.csv", tokenizer, "unknown ending '.csv'", ".jsonl, .npy, .parquet, .txt")
    (tmp_path / "only").mkdir()
    fails(tmp_path / "only", tokenizer, "it has no files")
    fails(tmp_path / "only" / "x.txt", tokenizer, "is empty")
    (tmp_path / "only" / "a.csv").write_text("a,b")
    fails(tmp_path / "only", tokenizer, "no .jsonl, .npy, .parquet, .txt file", "a.csv")
    (tmp_path / "none.txt").write_text("")
    fails(tmp_path / "none.txt", tokenizer, "none.txt", "empty")


def test_text_mistakes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "t.txt"
    path.write_text("abc")
    fails(path, tokenizer, "5 tokens are too few for one row of 8", "smaller seq_len")
    fails(path, None, "t.txt", "needs the model's tokenizer", ".npy")
    fails(path, tokenizer, "token id 0", "vocabulary of 0", vocab_size=0)
    fails(path, tokenizer, "outside the model's vocabulary of 60", vocab_size=60)
    fails(path, tokenizer, "seq_len must be at least 1, not 0", seq_len=0)
    fails(path, tokenizer, "samples must be at least 1, not -1", samples=-1)
    path.write_bytes(b"abc\xff\xfe")
    fails(path, tokenizer, "not UTF-8 text (byte 3)")


def test_record_mistakes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    fails(path, tokenizer, "t.jsonl line 3: invalid JSON")
    path.write_text('{"text": "a"}\n{"body": "a", "id": 1}\n')
    fails(path, tokenizer, "t.jsonl line 2: no field 'text'", "'body', 'id'", "text_field")
    path.write_text('{"text": 3}\n')
    fails(path, tokenizer, "line 1: field 'text' holds int, not text")
    path.write_text("[1, 2]\n")
    fails(path, tokenizer, "line 1: a record must be a JSON object, not list")
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    fails(path, tokenizer, "line 1: holds chat messages", "no chat template")
    strict = tokenizer_with(template="{{ raise_exception('roles must alternate') }}")
    fails(path, strict, "line 1: the chat template rejects", "roles must alternate")
    path.write_text('{"messages": "hi"}\n')
    fails(path, strict, "line 1: 'messages' must be a list")
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "t.parquet")
    fails(tmp_path / "t.parquet", tokenizer, "no column 'text'", "'body', 'id'")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "t.parquet")
    fails(tmp_path / "t.parquet", tokenizer, "t.parquet row 2: field 'text' holds NoneType")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 but not really")
    fails(tmp_path / "t.parquet", tokenizer, "not a valid parquet file")


def test_npy_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    for ids, parts in [
        (np.array([1, 2, VOCAB]), ("token id 260", "vocabulary of 260")),
        (np.array([1, -2, 3]), ("token id -2",)),
        (np.array([[1, 2], [3, 2**40]]), (f"token id {2**40}",)),
        (np.array([0.5, 1.0]), ("must be integers, not float64",)),
        (np.zeros((2, 2, 2), dtype=np.int64), ("1-D (a stream) or 2-D (rows)", "(2, 2, 2)")),
        (np.zeros((0, 4), dtype=np.int64), ("the array is empty",)),
        (np.array([1, 2, 3]), ("3 tokens are too few for one row of 8",)),
    ]:
        np.save(path, ids)
        fails(path, None, "t.npy", *parts)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    fails(path, None, "not a .npy array of numbers")
    path.write_bytes(b"nothing of the kind")
    fails(path, None, "not a .npy array of numbers")
    np.save(path, np.zeros((2, 4), dtype=np.int64))
    np.save(tmp_path / "u.npy", np.zeros((2, 6), dtype=np.int64))
    fails(tmp_path, None, "u.npy: its rows have 6 tokens", "t.npy have 4")
    np.save(tmp_path / "u.npy", np.zeros(6, dtype=np.int64))
    fails(tmp_path, None, "t.npy holds rows (2-D)", "u.npy a stream", "separate folders")


class FakeHub:
    """Stands in for `datasets`: remembers how it was called, and how many records were taken."""

    def __init__(self, records: list[dict[str, Any]], error: Exception | None = None) -> None:
        self.records, self.error = records, error
        self.calls: list[tuple[Any, ...]] = []
        self.taken = 0

    def load_dataset(self, name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        self.calls.append((name, config, split, streaming))
        if self.error is not None:
            raise self.error
        return self.stream()

    def stream(self) -> Iterator[dict[str, Any]]:
        for record in self.records:
            self.taken += 1
            yield record


def install(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> FakeHub:
    module = types.ModuleType("datasets")
    module.load_dataset = hub.load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return hub


def test_hub(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    hub = install(monkeypatch, FakeHub([{"text": text} for text in TEXTS]))
    assert load("org/name", tokenizer).tolist() == packed(documents(tokenizer))
    assert load("org/name:en-v1.0", tokenizer, samples=1, split="test").tolist() == packed(documents(tokenizer))[:1]
    assert hub.calls == [("org/name", None, "train", True), ("org/name", "en-v1.0", "test", True)]
    assert hub.taken == 3 + 1  # streaming stops with the rows
    fails("org/name", None, "org/name", "needs the model's tokenizer")
    fails("org/name", tokenizer, "org/name row 1: no field 'body'", text_field="body")


def test_hub_mistakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Tokenizer) -> None:
    install(monkeypatch, FakeHub([], FileNotFoundError("Dataset 'org/name'\ndoesn't exist")))
    fails("org/name:c", tokenizer, "org/name:c", "split 'train'", "Dataset 'org/name' doesn't exist")
    install(monkeypatch, FakeHub([]))
    fails("org/name", tokenizer, "0 tokens are too few")
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails("org/name", tokenizer, "org/name", "secateur[hf]")
    # A file that is missing from a folder which is there is a file, and so is all with a known ending.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "calib").mkdir()
    fails("data/calbi", tokenizer, "did you mean 'calib'?")
    fails("other/calib.txt", tokenizer, "no folder other")


def test_read_records_reads_all_columns(tmp_path: Path) -> None:
    records = [{"a": 1, "b": ["x", "y"]}, {"a": 2, "b": ["z"]}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "t.parquet")
    found = list(read_records(tmp_path / "t.parquet"))
    assert [record for _, record in found] == records
    assert [where for where, _ in found] == [f"{tmp_path / 't.parquet'} row {i}" for i in (1, 2)]


# --- the model's own text ---


def tiny_llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32, "bos_token_id": 3, "eos_token_id": 4,
    }  # fmt: skip
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**settings | options))
    return model


def test_sampled_tokens_are_seeded_and_leave_no_trace() -> None:
    model = tiny_llama()
    model.train()
    model.get_submodule("model.layers.1").eval()
    modes = [module.training for module in model.modules()]
    holder: Any = model
    own = holder.generation_config
    state = torch.get_rng_state()
    first = sample_tokens(model, samples=18, seq_len=12, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert holder.generation_config is own
    assert first.shape == (18, 12)
    assert first.dtype == torch.int64
    assert not first.is_inference()
    assert first[:, 0].tolist() == [3] * 18
    torch.rand(7)
    assert torch.equal(first, sample_tokens(model, samples=18, seq_len=12, seed=5))
    assert not torch.equal(first, sample_tokens(model, samples=18, seq_len=12, seed=6))
    assert not torch.equal(first[:2], first[16:])  # batches differ


def test_samples_follow_the_models_distribution() -> None:
    model = tiny_llama(max_position_embeddings=4)
    head = model.get_parameter("lm_head.weight")
    with torch.no_grad():
        head.mul_(30)  # far from uniform
    holder: Any = model
    holder.generation_config.top_k = 1  # what the model brings for chats must not matter
    holder.generation_config.repetition_penalty = 9.0
    tokens = sample_tokens(model, samples=800, seq_len=2, seed=0)
    share = torch.bincount(tokens[:, 1], minlength=13) / 800
    with torch.no_grad():
        expected = model(torch.tensor([[3]])).logits[0, 0].softmax(-1)
    assert expected.max() > 0.15
    assert (share - expected).abs().max() < 0.06  # more than 3 sigma at a share of one half


def test_end_of_text_does_not_end_a_row() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter("lm_head.weight").zero_()  # uniform: EOS in 1 of 13
    tokens = sample_tokens(model, samples=16, seq_len=32, seed=0)
    inside = tokens[:, 1:-8]
    assert (inside == 4).any()
    rows, places = torch.nonzero(inside == 4, as_tuple=True)
    after = torch.stack([tokens[row, place + 2 :][:7] for row, place in zip(rows, places, strict=True)])
    assert len(set(after.flatten().tolist())) == 13  # it goes on, and not with padding


def test_without_bos_rows_begin_with_random_tokens() -> None:
    tokens = sample_tokens(tiny_llama(bos_token_id=None), samples=40, seq_len=1, seed=0)
    assert tokens.shape == (40, 1)
    assert len(set(tokens.flatten().tolist())) > 5


def test_sampling_mistakes() -> None:
    model = tiny_llama()
    with pytest.raises(SecateurError, match="seq_len 33 is longer than the model's context of 32"):
        sample_tokens(model, samples=1, seq_len=33, seed=0)
    with pytest.raises(SecateurError, match="samples must be at least 1, not 0"):
        sample_tokens(model, samples=0, seq_len=3, seed=0)
    with pytest.raises(SecateurError, match="Linear is no causal language model"):
        sample_tokens(nn.Linear(2, 2), samples=1, seq_len=3, seed=0)
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[0] = torch.nan
    with pytest.raises(SecateurError, match="logits are not finite"):
        sample_tokens(model, samples=1, seq_len=3, seed=0)


def test_evaluating_restores_modes_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not model[0].training
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]
