"""What lies in a folder is looked at before it is read, and what was read is held against it."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors

from sinkbook.errors import SinkbookError
from sinkbook.llm.sink_location import changed_texts
from sinkbook.models import load
from sinkbook.models.token_windows import of_document
from sinkbook.probe.measure import measure_texts
from tiny import SIZES, WORDS, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.weights

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 269060552\n"
TEXT = "to be or not to be the to be or"


def rows(**changes):
    return tiny_model(**{"vocab_size": len(WORDS)} | changes)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole model and its tokenizer."""
    path = tmp_path / "model"
    rows().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(SinkbookError) as failure:
        load(path, device="cpu")
    return str(failure.value)


def change(file: Path, **entries) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def rename(folder: Path, to) -> None:
    weights = load_file(folder / "model.safetensors")
    renamed = {to(name): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def in_shards(folder: Path) -> Path:
    """The same weights in several files; returns their index."""
    (folder / "model.safetensors").unlink()
    rows().save_pretrained(folder, max_shard_size="10KB")
    return folder / "model.safetensors.index.json"


# --- Adapters, pointers, tokenizers ------------------------------------------------------------

ADAPTER = {"base_model_name_or_path": "someone/base", "peft_type": "LORA", "r": 4}


@pytest.mark.parametrize("left", ["nothing", "config", "whole model"])
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_is_refused_with_its_base_and_what_to_do(folder, left, file):
    if left == "nothing":
        (folder / "config.json").unlink()
    if left != "whole model":
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(json.dumps(ADAPTER))
    said = refusal(folder)
    assert "adapter of PEFT" in said and "PeftModel.from_pretrained" in said
    assert ("someone/base" in said) == (file == "adapter_config.json")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", "a shard"])
def test_a_file_that_was_not_downloaded_is_called_so(folder, file):
    if file == "a shard":
        in_shards(folder)
        file = sorted(folder.glob("*.safetensors"))[1].name
    (folder / file).write_text(POINTER.format("ab" * 32))
    said = refusal(folder)
    assert file in said and "Git LFS" in said and "git lfs pull" in said


def test_a_gguf_file_that_was_not_downloaded_and_a_link_to_nowhere_are_called_so(folder):
    (folder / "Big.GGUF").write_text(POINTER.format("cd" * 32))
    assert "git lfs pull" in refusal(folder / "Big.GGUF")
    (folder / "Big.GGUF").write_text("/annex/objects/SHA256E-s1--ab.gguf\n")
    assert "git annex get" in refusal(folder / "Big.GGUF")
    (folder / "Big.GGUF").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "annexed")
    assert "model.safetensors" in refusal(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("page", ["<!DOCTYPE html><html>", "\n<html lang='en'>Not found"])
def test_a_web_page_in_the_place_of_a_file_is_called_so(folder, file, page):
    (folder / file).write_text(page)
    assert f"{file}' is a web page" in refusal(folder)


def test_a_pickle_that_is_called_safetensors_is_refused_unopened(folder):
    executed = folder.parent / "executed"
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap(executed)))
    assert "a pickle under another name" in refusal(folder)
    torch.save(rows().state_dict(), folder / "model.safetensors")  # a zip archive of pickles
    assert "a pickle under another name" in refusal(folder)
    assert not executed.exists()


def test_a_file_inside_a_folder_is_answered_with_the_folder(folder):
    assert "is a file. Give the folder" in refusal(folder / "model.safetensors")


def test_pickles_beside_whole_weights_are_nobodys_business(folder):
    (folder / "pytorch_model.bin").write_text(POINTER.format("ab" * 32))
    whole, read = rows().state_dict(), load(folder, device="cpu").model.state_dict()
    assert read.keys() == whole.keys()
    assert all(torch.equal(read[name], weights) for name, weights in whole.items())


@pytest.mark.parametrize("config", [None, "LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_a_folder_without_tokenizer_files_says_which_are_missing(folder, config):
    """With its class alone, transformers makes a Llama tokenizer of three tokens."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": config}))
    assert "no tokenizer files, such as tokenizer.json" in refusal(folder)


def test_a_tokenizer_with_more_ordinary_tokens_than_the_model_has_embeddings_is_refused(folder):
    grown = tiny_tokenizer()
    grown.add_tokens(["forsooth"])
    grown.save_pretrained(folder)
    assert "'forsooth' with the id 8, and the model has embeddings for 8" in refusal(folder)
    special = tiny_tokenizer()  # as Gemma 3 is published, with a token for images
    special.add_special_tokens({"additional_special_tokens": ["<image>"]})
    special.save_pretrained(folder)
    load(folder, device="cpu")


# --- Weights and config -----------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "base.model."])
def test_names_with_a_prefix_are_called_so(folder, prefix):
    rename(folder, lambda name: prefix + name)
    assert f"has the prefix {prefix!r}" in refusal(folder)


@pytest.mark.parametrize(
    ("own", "stored"),
    [
        (".layers.0.", ".layers.0._checkpoint_wrapped_module."),
        ("model.", "model._orig_mod."),
        ("model.", "transformer."),
    ],
)
def test_names_that_differ_elsewhere_are_set_side_by_side(folder, own, stored):
    rename(folder, lambda name: name.replace(own, stored, 1))
    said = refusal(folder)
    assert "stored under other names" in said
    found = next(word for word in said.split() if stored in word).strip(",")
    assert f"it has {found}, perhaps for {found.replace(stored, own, 1)} (" in said


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "unheard of"}}])
def test_whole_numbers_without_a_scale_are_no_weights(folder, dtype, config):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = (100 * weights[name]).to(dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder / "config.json", **config)
    assert f"holds {name} as whole numbers" in refusal(folder)


@pytest.mark.parametrize("name", ["torch.bfloat16", "fp16", "auto"])
def test_a_dtype_that_torch_does_not_have_is_named(folder, name):
    change(folder / "config.json", dtype=name)
    assert f"names a dtype that torch does not have: '{name}'" in refusal(folder)


def test_a_class_of_its_own_is_not_taken_for_that_of_transformers(folder):
    """Of the same name it is: transformers has taken such models over."""
    own = {"AutoModelForCausalLM": "modeling_long_llama.LongLlamaForCausalLM"}
    change(folder / "config.json", auto_map=own)
    said = refusal(folder)
    assert "modeling_long_llama.LongLlamaForCausalLM" in said and "trust_remote_code=True" in said
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "code.LlamaForCausalLM"})
    load(folder, device="cpu")


def test_a_tokenizer_that_cannot_read_is_refused(folder, monkeypatch):
    def raises(*_, **__):
        raise Exception("WordPiece error: Missing [UNK] token from the vocabulary")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast._encode_plus", raises)
    assert "does not read 'a': WordPiece error" in refusal(folder)


def test_names_without_the_prefix_of_the_model_inside_are_read_whole(folder):
    for to in (lambda name: f"model.{name}", lambda name: name.removeprefix("model.")):
        rows().save_pretrained(folder)
        rename(folder, to)
        expected = rows().state_dict()
        for name, tensor in load(folder, device="cpu").model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_a_config_with_fewer_layers_more_layers_or_other_sizes_than_the_weights_is_refused(folder):
    change(folder / "config.json", num_hidden_layers=1)
    assert "no place for, such as model.layers.1." in refusal(folder)
    change(folder / "config.json", num_hidden_layers=3)
    assert "are missing, such as model.layers.2." in refusal(folder)
    change(folder / "config.json", num_hidden_layers=2, vocab_size=12)
    said = refusal(folder)
    assert "lm_head.weight is stored in the shape (8, 32), and the config asks for (12, 32)" in said


def test_a_tensor_too_many_is_refused_but_for_buffers_that_the_model_computes(folder):
    weights = load_file(folder / "model.safetensors")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | old, folder / "model.safetensors", metadata={"format": "pt"})
    load(folder, device="cpu")
    lora = {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(4, 32)}
    save_file(weights | lora, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1 tensors that its config has no place for" in refusal(folder)


class Trap:
    """Opened as a pickle, it leaves a file behind."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("kind", ["a pickle", "absolute", "outside", "no text"])
@pytest.mark.parametrize("by", ["index", "config"])
def test_an_index_or_config_that_leads_to_other_files_is_refused_unopened(folder, kind, by):
    index = in_shards(folder)
    trap, executed = folder / "weights.bin", folder.parent / "executed"
    trap.write_bytes(pickle.dumps(Trap(executed)))
    outside = folder.parent / "else.safetensors"
    sorted(folder.glob("*.safetensors"))[0].rename(outside)
    names = {"a pickle": trap.name, "absolute": str(outside), "no text": 7}
    name = names.get(kind, f"../{outside.name}")
    if by == "index":
        weight_map = json.loads(index.read_text())["weight_map"]
        change(index, weight_map=weight_map | {"lm_head.weight": name})
    else:
        change(folder / "config.json", transformers_weights=name)
    said = refusal(folder)
    assert repr(name) in said and "no safetensors file inside of it" in said
    assert not executed.exists()


def test_shards_load_and_a_missing_one_is_named(folder):
    in_shards(folder)
    expected = rows().state_dict()
    for name, tensor in load(folder, device="cpu").model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    assert gone.name in refusal(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
@pytest.mark.parametrize("held", ["", "{", "[]", "\x00\x01"])
def test_a_damaged_file_is_one_sentence_that_names_the_folder(folder, file, held):
    in_shards(folder)
    (folder / file).write_text(held)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("wanted", ["someone/kernel", "kernels-community/flash-mla", "unheard of"])
def test_a_kernel_that_a_config_names_is_never_looked_for(folder, key, wanted, monkeypatch):
    searched = []
    monkeypatch.setattr(
        "transformers.modeling_utils.lazy_import_flash_attention",
        lambda *names, **more: searched.append(names),
    )
    change(folder / "config.json", **{key: wanted, "_experts_implementation": wanted})
    model = load(folder, device="cpu").model
    assert model.config._attn_implementation in ("sdpa", "eager") and not searched


# --- What the tokenizer puts before a text ------------------------------------------------------


def with_template(folder: Path, template: str) -> None:
    words = tiny_tokenizer(adds_bos=False)
    special = [(word, WORDS.index(word)) for word in template.split() if word in WORDS]
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        template, special_tokens=special
    )
    words.save_pretrained(folder)


@pytest.mark.parametrize(
    "template", ["<s> $A", "$A", "<script> <s> $A", "<|endoftext|> $A", "<s> $A <|endoftext|>"]
)
def test_texts_begin_with_what_the_tokenizer_puts_before_them(folder, template):
    with_template(folder, template)
    reader = load(folder, device="cpu")
    before = [WORDS.index(word) for word in template.partition("$A")[0].split()]
    assert list(reader.prefix) == before
    assert reader.first_token == (before[0] if before else None)
    own = reader.tokenizer(TEXT)["input_ids"]
    assert reader.encode([TEXT], length=8)[0].tolist() == own[:8]
    windows = of_document(reader, TEXT, count=2, length=5)
    assert windows[:, : len(before)].tolist() == [before] * len(windows)
    assert (
        windows[:, len(before) :].flatten().tolist()
        == own[len(before) :][: windows.numel()][: len(windows) * (5 - len(before))]
    )
    found = measure_texts(reader, [TEXT, "to be or"], ("sink_attention",), length=8)
    assert found.sink_attention.notnull().all()
    for condition, changed in changed_texts(reader, [TEXT], length=6).items():
        assert changed.tokens.shape == (1, 6), condition
        if changed.first_token_at is not None:
            at = changed.first_token_at
            assert changed.tokens[0, at : at + len(before)].tolist() == before


def test_a_model_of_its_own_sizes_still_loads(tmp_path):
    """Padded embeddings are common: more rows than the tokenizer has tokens."""
    tiny_model(vocab_size=SIZES["vocab_size"]).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load(tmp_path, device="cpu").model.config.vocab_size == 97
