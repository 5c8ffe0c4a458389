import gzip
import json
import re

import pytest
import torch

from kick import calibration
from kick.calibration import CalibrationSpec, draw, read_documents
from kick.errors import DataError


def test_the_embedded_text_fills_what_is_asked(tokenizer):
    found = draw(CalibrationSpec(samples=8, sequence_length=64), tokenizer)
    assert found.tokens.shape == (8, 64)
    assert found.tokens.dtype == torch.int64


def test_the_seed_decides_the_tokens_and_the_fingerprint(tokenizer):
    specs = [CalibrationSpec(samples=4, sequence_length=32, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (draw(spec, tokenizer) for spec in specs)
    assert torch.equal(first.tokens, again.tokens)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_short_documents_are_packed_with_an_end_between_them(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": word}) + "\n" for word in ("alpha", "beta", "gamma", "delta")))
    lengths = [len(tokenizer(word)["input_ids"]) for word in ("alpha", "beta", "gamma", "delta")]
    spec = CalibrationSpec(source=str(path), samples=1, sequence_length=sum(lengths) + 4)
    (row,) = draw(spec, tokenizer).tokens.tolist()
    assert row.count(tokenizer.eos_token_id) == 4
    words = tokenizer.decode(row).split("</s>")
    assert sorted(filter(None, words)) == ["alpha", "beta", "delta", "gamma"]


def test_one_long_document_does_not_crowd_out_short_ones(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    rows = ["long " * 5000] + [f"short number {place} " * 2 for place in range(6)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    text = tokenizer.decode(
        draw(CalibrationSpec(source=str(path), samples=12, sequence_length=32), tokenizer).tokens.flatten()
    )
    assert all(f"number {place}" in text for place in range(6))


@pytest.mark.parametrize(
    ("processor", "able", "chosen"),
    [
        ("Intel(R) Xeon(R) Processor", {"avx512_bf16": True, "amx_bf16": True}, "bfloat16"),
        ("Intel(R) Xeon(R) Processor", {"avx512_bf16": True, "amx_bf16": False}, "float32"),
        ("AMD EPYC 9575F 64-Core Processor", {"avx512_bf16": True}, "bfloat16"),
        ("AMD EPYC 7763 64-Core Processor", {}, "float32"),
    ],
)
def test_blocks_run_in_bfloat16_where_the_processor_gains_by_it(processor, able, chosen, tokenizer, monkeypatch):
    monkeypatch.setattr(calibration, "processor", lambda: processor)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    spec = CalibrationSpec(samples=1, sequence_length=32)
    assert draw(spec, tokenizer).precision == chosen
    assert draw(spec, tokenizer, "float16", "cuda").precision == "float16"
    assert draw(spec.model_copy(update={"precision": "float16"}), tokenizer).precision == "float16"


def test_too_few_tokens_says_how_many_there_are(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a few words only")
    held = len(tokenizer("a few words only")["input_ids"]) + 1
    with pytest.raises(DataError, match=rf"128 x 2048 = 262,144 tokens; .* holds {held}\."):
        draw(CalibrationSpec(source=str(path), samples=128, sequence_length=2048), tokenizer)


def test_sources(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(
            json.dumps({"text": "first\u2028line"}, ensure_ascii=False) + "\n"
        )  # a separator that is no line end
    assert read_documents(str(tmp_path)) == ["first\u2028line", "second"]
    with pytest.raises(DataError, match="no text source"):
        read_documents("nowhere.txt")
    (tmp_path / "bad.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(DataError, match="line 1"):
        read_documents(str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("Salesforce/wikitext", ("Salesforce/wikitext", "wikitext-2-raw-v1")),
        ("allenai/c4", ("allenai/c4", "en")),
        ("allenai/c4:realnewslike", ("allenai/c4", "realnewslike")),
        ("owner/name", ("owner/name", None)),
    ],
)
def test_a_hub_dataset_is_asked_in_the_configuration_that_is_meant(source, asked, monkeypatch):
    import datasets
    from kick_compressors.training.text import open_documents

    seen = []

    def load_dataset(name, configuration, split, streaming):
        seen.append((name, configuration))
        assert (split, streaming) == ("train", True)
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": "one"}, {"text": "two"}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_documents(source) == ["one", "two"]
    assert [row["text"] for row in open_documents(source)] == ["one", "two"]
    assert seen == [asked, asked]


def test_a_hub_dataset_without_the_field_is_refused(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"content": "one"}]))
    with pytest.raises(DataError, match=r"'owner/name' cannot be read from the hub: KeyError\('text'\)"):
        read_documents("owner/name")


def test_calibration_and_evaluation_text_do_not_overlap():
    """No run of eight words stands in both embedded texts."""
    from kick_tasks import sources

    from kick.jsonl import read_jsonl

    def runs(texts):
        for text in texts:
            words = re.findall(r"\w+", text.lower())
            yield from (tuple(words[i : i + 8]) for i in range(len(words) - 7))

    evaluation = [row["text"] for _, row in read_jsonl(sources.EMBEDDED / "perplexity" / "text.jsonl")]
    calibration = read_documents("embedded")
    assert not set(runs(evaluation)) & set(runs(calibration))
    assert sum(len(text.encode()) for text in evaluation) >= 60_000
    assert sum(len(text.encode()) for text in calibration) >= 60_000


def test_real_c4_documents_are_read(mirror, tokenizer):
    spec = CalibrationSpec(source=str(mirror / "calibration/c4/en"), samples=16, sequence_length=128)
    assert draw(spec, tokenizer).tokens.shape == (16, 128)
