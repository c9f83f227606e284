"""Files, folders and names from outside that are broken, and what is said of each, a line each.

`config(...)` changes entries of a tiny model's config.json; `file(name, content)` writes one file of
its folder anew, `cut(name, share)` cuts it off, `without(name)` takes it away, `index(...)` gives it
an index of shards, `tensors(change)` other weights. `header(...)` and `bytes_at(...)` do so to a GGUF
file. `record`, `ledger` and `claims` break files of the book, `run` is the command line.
"""

import itertools
import json
import os
import shutil
import stat
from pathlib import Path

# What the code looks for by its name, with what reads it.
NAMED = {
    "_toc.yml": "contents_of",
    "_config.yml": "contents_of",
    "pyproject.toml": "addresses_of",
    "package-lock.json": "packages_of",
    "book/claims.yml": "ledger_of",
    "book/03.ipynb": "chapter_of",
    "book/records/optimizers.nc": "record_of",
    "book/records/one-layer.safetensors": "first_run_of",
    "book/records/paper-one-layer.csv": "paper_of",
    "cache/ledger/one.json": "ledger_of",
    "cache/chapters/03.json": "status_of_all",
}

TABLE = {
    "a model's config": [
        ("load(file('config.json', ''))", "is empty"),
        ("load(file('config.json', '['))", "config.json"),
        ("load(file('config.json', '[]'))", "config.json' holds a list"),
        ("load(file('config.json', 'null'))", "config.json' holds a NoneType"),
        ("load(file('config.json', '5'))", "config.json' holds a int"),
        ("load(file('config.json', '{}'))", "model_type"),
        ("load(file('config.json', b'\\xff\\xfe{}'))", "config.json"),
        ("load(file('config.json', '{\"a\": ' * 100_000))", "config.json"),
        ("load(file('config.json', '[' * 100_000))", "config.json"),
        ("load(file('config.json', '<html>'))", "is a web page"),
        ("load(without('config.json'))", "has no config.json"),
        ("load(folder_at('config.json'))", "config.json' is no file"),
        ("load(pipe_at('config.json'))", "config.json' is no file"),
        ("load(link('config.json', '/dev/zero'))", "config.json' is no file"),
        ("load(link('config.json', 'config.json'))", "has no config.json"),
        ("load(config(model_type='nonsense'))", "nonsense"),
        ("load(config(model_type=None))", "model"),
        ("load(config(model_type=5))", "model"),
        ("load(config(model_type=['llama']))", "model"),
        ("load(config(model_type='bert'))", "is no causal language model"),
        ("load(config(model_type='t5'))", "is no causal language model"),
        ("load(config(model_type='vit'))", "is no causal language model"),
        ("load(config(num_hidden_layers=1))", "no place for"),
        ("load(config(num_hidden_layers=3))", "incomplete"),
        ("load(config(num_hidden_layers=0))", "no place for"),
        ("load(config(num_hidden_layers=-1))", "no place for"),
        ("load(config(num_hidden_layers=2.5))", "num_hidden_layers"),
        ("load(config(num_hidden_layers='2'))", "num_hidden_layers"),
        ("load(config(num_hidden_layers=None))", "num_hidden_layers"),
        ("load(config(num_hidden_layers=[2]))", "num_hidden_layers"),
        ("load(config(hidden_size=0))", "do not fit"),
        ("load(config(hidden_size=-32))", "model"),
        ("load(config(hidden_size=33))", "hidden size"),
        ("load(config(hidden_size=64))", "do not fit"),
        ("load(config(hidden_size='wide'))", "hidden_size"),
        ("load(config(num_attention_heads=0))", "model"),
        ("load(config(num_attention_heads=3))", "heads"),
        ("load(config(num_key_value_heads=3))", "model"),
        ("load(config(num_key_value_heads=-2))", "model"),
        ("load(config(head_dim=0))", "model"),
        ("load(config(vocab_size=0))", "do not fit"),
        ("load(config(vocab_size=-1))", "model"),
        ("load(config(vocab_size=9))", "do not fit"),
        ("load(config(vocab_size='many'))", "vocab_size"),
        ("load(config(hidden_act='nonsense'))", "nonsense"),
        ("load(config(hidden_act=5))", "model"),
        ("load(config(rms_norm_eps='small'))", "rms_norm_eps"),
        ("load(config(dtype='nonsense'))", "nonsense"),
        ("load(config(rope_parameters='fast'))", "rope"),
        ("load(config(rope_parameters={'rope_type': 'nonsense'}))", "nonsense"),
        ("load(config(rope_parameters={'rope_type': 'yarn'}))", "rope"),
        ("load(config(max_position_embeddings='long'))", "max_position_embeddings"),
        ("load(config(tie_word_embeddings='yes'))", "tie_word_embeddings"),
        ("load(config(pad_token_id=999))", "model"),
        ("load(config(quantization_config='nonsense'))", "model"),
        ("load(config(auto_map={'AutoModelForCausalLM': 'evil.Evil'}))", "code of its own"),
        (
            "load(config(auto_map={'AutoConfig': 'evil.Evil'}, model_type='evil'))",
            "code of its own",
        ),
        ("load(config(auto_map=5))", "model"),
        ("load(config(transformers_weights='weights.bin'))", "no safetensors file inside"),
        (
            "load(config(transformers_weights='/etc/model.safetensors'))",
            "no safetensors file inside",
        ),
        ("load(config(transformers_weights='../model.safetensors'))", "no safetensors file inside"),
        ("load(config(transformers_weights=5))", "no safetensors file inside"),
    ],
    "a model's weights": [
        ("load(without('model.safetensors'))", "has its weights nowhere"),
        ("load(file('model.safetensors', b''))", "is empty"),
        ("load(file('model.safetensors', b'nonsense'))", "weights"),
        ("load(file('model.safetensors', b'\\xff' * 100))", "weights"),
        ("load(file('model.safetensors', b'\\x02' + bytes(7) + b'{}'))", "incomplete"),
        ("load(file('model.safetensors', b'\\x02' + bytes(7) + b'[]'))", "weights"),
        ("load(file('model.safetensors', pickle))", "a pickle under another name"),
        ("load(file('model.safetensors', zip_file))", "a pickle under another name"),
        ("load(file('model.safetensors', '<!doctype html>'))", "is a web page"),
        ("load(file('model.safetensors', pointer))", "git lfs pull"),
        ("load(cut('model.safetensors', 0.0001))", "weights"),
        ("load(cut('model.safetensors', 0.5))", "weights"),
        ("load(cut('model.safetensors', 0.999))", "weights"),
        ("load(folder_at('model.safetensors'))", "model.safetensors' is no file"),
        ("load(pipe_at('model.safetensors'))", "model.safetensors' is no file"),
        ("load(link('model.safetensors', 'nowhere'))", "missing, such as model.safetensors"),
        ("load(link('model.safetensors', 'model.safetensors'))", "weights"),
        ("load(tensors(lambda name, values: None if 'mlp' in name else values))", "incomplete"),
        ("load(tensors(lambda name, values: values[:1]))", "do not fit"),
        ("load(tensors(lambda name, values: values.int()))", "whole numbers"),
        ("load(tensors(lambda name, values: values[None]))", "do not fit"),
        ("load(tensors(lambda name, values: values.double() * nan, probed=True))", "NaN"),
        ("load(more(with_='model.layers.2.mlp.up_proj.weight'))", "no place for"),
        ("load(more(with_='lm_head.lora_A.weight'))", "no place for"),
        ("load(index('nonsense'))", "without a weight_map"),
        ("load(index(5))", "without a weight_map"),
        ("load(index({}))", "without a weight_map"),
        ("load(index(['a.safetensors']))", "without a weight_map"),
        ("load(index({'a': 5}))", "no safetensors file inside"),
        ("load(index({'a': None}))", "no safetensors file inside"),
        ("load(index({'a': 'pytorch_model.bin'}))", "no safetensors file inside"),
        ("load(index({'a': 'x.pt'}))", "no safetensors file inside"),
        ("load(index({'a': '/elsewhere/model.safetensors'}))", "no safetensors file inside"),
        ("load(index({'a': '../model.safetensors'}))", "no safetensors file inside"),
        ("load(index({'a': 'b/../../model.safetensors'}))", "no safetensors file inside"),
        ("load(index({'a': 'C:\\\\\\\\model.safetensors'}))", "no safetensors file inside"),
        ("load(index({'a': ''}))", "no safetensors file inside"),
        ("load(index({'a': 'a\\0.safetensors'}))", "missing"),
        ("load(index({'a': 'x' * 300 + '.safetensors'}))", "xxx"),
        ("load(index({'a': 'elsewhere.safetensors'}))", "missing, such as elsewhere.safetensors"),
        (
            "load(index({'a': 'linked.safetensors'}, linked='/etc/passwd'))",
            "weights cannot be read",
        ),
        ("load(file('model.safetensors.index.json', '[', alone=True))", "index.json"),
        ("load(file('model.safetensors.index.json', b'\\xff', alone=True))", "index.json"),
        (
            "load(file('pytorch_model.bin', pickle, alone=True))",
            "only as pytorch_model.bin, a pickle",
        ),
        ("load(file('adapter_config.json', '['))", "adapter"),
        ("load(file('adapter_model.safetensors', b'x'))", "an adapter of PEFT"),
        (
            "load(file('adapter_config.json', json.dumps({'peft_type': 'LORA'})))",
            "an adapter of PEFT",
        ),
    ],
    "a model's tokenizer": [
        ("load(without('tokenizer.json'))", "no tokenizer files"),
        ("load(folder_at('tokenizer.json'))", "tokenizer.json' is no file"),
        ("load(folder_at('tokenizer_config.json'))", "tokenizer_config.json' is no file"),
        ("load(pipe_at('tokenizer.json'))", "tokenizer.json' is no file"),
        ("load(link('tokenizer.json', '/dev/null'))", "tokenizer.json' is no file"),
        ("load(link('tokenizer.json', 'tokenizer.json'))", "is a link to a file"),
        ("load(file('tokenizer.json', ''))", "is empty"),
        ("load(file('tokenizer.json', '['))", "tokenizer"),
        ("load(file('tokenizer.json', '[]'))", "tokenizer"),
        ("load(file('tokenizer.json', '{}'))", "tokenizer"),
        ("load(file('tokenizer.json', 'null'))", "tokenizer"),
        ("load(file('tokenizer.json', b'\\xff\\xfe'))", "tokenizer"),
        ("load(file('tokenizer.json', pointer))", "git lfs pull"),
        ("load(cut('tokenizer.json', 0.5))", "tokenizer"),
        ("load(tokenizer(model=None))", "tokenizer"),
        ("load(tokenizer(model={'type': 'nonsense'}))", "tokenizer"),
        (
            "load(tokenizer(model={'type': 'WordLevel', 'vocab': [], 'unk_token': 'or'}))",
            "tokenizer",
        ),
        (
            "load(tokenizer(model={'type': 'WordLevel', 'vocab': {}, 'unk_token': 'or'}))",
            "tokenizer",
        ),
        (
            "load(tokenizer(model={'type': 'WordLevel', 'vocab': {'or': 500}, 'unk_token': 'or'}))",
            "another model's",
        ),
        (
            "load(tokenizer(model={'type': 'WordLevel', 'vocab': {'or': -1}, 'unk_token': 'or'}))",
            "tokenizer",
        ),
        (
            "load(tokenizer(added_tokens=[{'id': 500, 'content': 'far', 'special': False}]))",
            "tokenizer",
        ),
        ("load(tokenizer(post_processor={'type': 'nonsense'}))", "tokenizer"),
        (
            "load(tokenizer(pre_tokenizer={'type': 'Split', 'pattern': {'Regex': '('}, 'behavior': 'Removed', 'invert': False}))",
            "tokenizer",
        ),
        ("load(file('tokenizer_config.json', '['))", "tokenizer"),
        ("load(file('tokenizer_config.json', '[]'))", "tokenizer"),
        ("load(file('tokenizer_config.json', '{\"tokenizer_class\": 5}'))", "tokenizer"),
        ("load(file('tokenizer_config.json', '{\"bos_token\": 5}'))", "tokenizer"),
        ("load(file('tokenizer_config.json', '{\"model_max_length\": \"x\"}'))", "tokenizer"),
        (
            'load(file(\'tokenizer_config.json\', \'{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}\'))',
            "code of its own",
        ),
        ("load(file('special_tokens_map.json', '['))", "tokenizer"),
        ("load(file('added_tokens.json', '['))", "tokenizer"),
    ],
    "a GGUF file": [
        ("load(gguf_of(b''))", "is empty"),
        ("load(gguf_of(b'GGUF'))", "model.gguf"),
        ("load(gguf_of(b'nonsense' * 100))", "model.gguf"),
        ("load(gguf_of(b'GGML' + bytes(500)))", "model.gguf"),
        ("load(gguf_of(b'<html>not found'))", "is a web page"),
        ("load(gguf_of(pickle))", "a pickle under another name"),
        ("load(gguf_of(zip_file))", "a pickle under another name"),
        ("load(gguf_of(pointer.encode()))", "git lfs pull"),
        ("load(gguf_cut(0.01))", "model.gguf"),
        ("load(gguf_cut(0.05))", "model.gguf"),
        ("load(gguf_cut(0.5))", "model.gguf"),
        ("load(gguf_cut(0.99))", "model.gguf"),
        ("load(gguf_at(4, 99))", "model.gguf"),
        ("load(gguf_at(4, 0))", "model.gguf"),
        ("load(gguf_at(8, 2**62, 8))", "model.gguf"),
        ("load(gguf_at(8, 2**63 - 1, 8))", "model.gguf"),
        ("load(gguf_at(8, 0, 8))", "model.gguf"),
        ("load(gguf_at(8, 1, 8))", "model.gguf"),
        ("load(gguf_at(16, 2**62, 8))", "model.gguf"),
        ("load(gguf_at(16, 0, 8))", "model.gguf"),
        ("load(gguf_at(16, 3, 8))", "model.gguf"),
        ("load(gguf_at(24, 2**40, 8))", "model.gguf"),
        (
            "load(gguf(lambda writer: writer.add_key_value('general.architecture', 'nonsense', text)))",
            "nonsense",
        ),
        (
            "load(gguf(lambda writer: writer.add_key_value('general.architecture', 'clip', text)))",
            "clip",
        ),
        ("load(gguf(lambda writer: writer.add_block_count(1)))", "model.gguf"),
        ("load(gguf(lambda writer: writer.add_block_count(5)))", "incomplete"),
        ("load(gguf(lambda writer: writer.add_head_count(0)))", "model.gguf"),
        ("load(gguf(lambda writer: writer.add_head_count(3)))", "model.gguf"),
        ("load(gguf(lambda writer: writer.add_embedding_length(64)))", "do not fit"),
        ("load(gguf(lambda writer: writer.add_vocab_size(3)))", "model.gguf"),
        ("load(gguf(lambda writer: writer.add_tokenizer_model('nonsense')))", "model.gguf"),
        ("load(gguf(lambda writer: writer.add_token_list(['a'])))", "model.gguf"),
        ("load(gguf(lambda writer: writer.add_token_merges(['nonsense'])))", "model.gguf"),
        (
            "load(gguf(lambda writer: writer.add_key_value('split.count', 3, number)))",
            "one of 3 parts",
        ),
        (
            "load(gguf(lambda writer: writer.add_key_value('llama.rope.scaling.factor', 8, number)))",
            "rope.scaling.factor",
        ),
        (
            "load(gguf(lambda writer: writer.add_key_value('llama.attention.sliding_window', 8, number)))",
            "sliding_window",
        ),
        ("load(gguf_folder())", "model.gguf"),
    ],
    "a record": [
        ("load_record(record(b''))", "optimizers.nc"),
        ("load_record(record(b'nonsense'))", "optimizers.nc"),
        ("load_record(record(b'CDF\\x01' + bytes(20)))", "optimizers.nc"),
        ("load_record(record(b'\\x89HDF\\r\\n\\x1a\\n' + bytes(500)))", "optimizers.nc"),
        ("load_record(record(share=0.1))", "optimizers.nc"),
        ("load_record(record(share=0.5))", "optimizers.nc"),
        ("load_record(record(share=0.95))", "optimizers.nc"),
        ("load_record(record(dataset=None))", "optimizers.nc"),
        ("about_record(record(b'nonsense'))", "optimizers.nc"),
        ("about_record(record(dataset={}))", "optimizers.nc"),
        ("load_record(record(b'nonsense', name='one-layer'))", "one-layer.nc"),
        ("load_record(record(dataset={}, name='one-layer'))", "one-layer.nc"),
        (
            "load_record(record(dataset={'facts': ('training', ['[', 'x'])}, name='one-layer'))",
            "one-layer.nc",
        ),
        ("load_record(record(versions=None))", "optimizers.nc"),
        ("load_record(record(versions=''))", "optimizers.nc"),
        ("load_record(record(versions='[]'))", "optimizers.nc"),
        ("load_record(record(versions='{}'))", "optimizers.nc"),
        ("load_record(record(versions='{\"torch\": 2}'))", "optimizers.nc"),
        ("load_record(record(versions=5))", "optimizers.nc"),
        ("load_record(record(seconds='long'))", "optimizers.nc"),
        ("load_record(record(seconds=-1.0))", "optimizers.nc"),
        ("load_record(record(date=5))", "optimizers.nc"),
        ("load_record(record(device=5))", "optimizers.nc"),
        ("weights_of(b'')", "one-layer.safetensors"),
        ("weights_of(b'nonsense')", "one-layer.safetensors"),
        ("weights_of(b'\\x02' + bytes(7) + b'{}')", "one-layer.safetensors"),
        ("table_of('paper-one-layer', '')", "paper-one-layer.csv"),
        ("table_of('paper-one-layer', 'a,b\\n1,2\\n')", "paper-one-layer.csv"),
        ("table_of('paper-one-layer', b'\\xff\\xfe\\x00')", "paper-one-layer.csv"),
        ("table_of('paper-one-layer', None)", "paper-one-layer.csv"),
        ("table_of('paper-olmo-7b', 'a,b\\n1,2\\n')", "paper-olmo-7b.csv"),
    ],
    "the claims": [
        ("claims('[')", "claims.yml"),
        ("claims('a: [')", "claims.yml"),
        ("claims('\\t- a')", "claims.yml"),
        ("claims(b'\\xff\\xfe\\x00')", "claims.yml"),
        ("claims('5')", "claims.yml"),
        ("claims('one: two')", "claims.yml"),
        ("claims('- 5')", "claims.yml, entry 5"),
        ("claims('- [a]')", "claims.yml, entry ['a']"),
        ("claims('- {id: a}')", "claims.yml, entry 'a'"),
        ("claims('- !!python/object/apply:os.system [true]')", "claims.yml"),
        ("claims(a_claim(nonsense='x'))", "nonsense"),
        ("claims(a_claim(id='../../x'))", "'../../x'"),
        ("claims(a_claim(id='a/b'))", "'a/b'"),
        ("claims(a_claim(id='..'))", "'..'"),
        ("claims(a_claim(id=''))", "''"),
        ("claims(a_claim(id=5))", "5"),
        ("claims(a_claim(id=None))", "None"),
        ("claims(a_claim(id='a\\\\0b'))", "claims.yml"),
        ("claims(a_claim(id='x' * 300))", "xxx"),
        ("claims(a_claim() + a_claim())", "two claims are called"),
        ("claims(a_claim(criterion='>= 1'))", "criterion"),
        ("claims(a_claim(criterion={}))", "criterion"),
        ("claims(a_claim(criterion={'huge': '>= 1'}))", "huge"),
        ("claims(a_claim(criterion={'quick': 'large'}))", "large"),
        ("claims(a_claim(criterion={'quick': 5}))", "criterion"),
        ("claims(a_claim(criterion=['quick']))", "criterion"),
        ("claims(a_claim(statement=5))", "statement"),
        ("claims(a_claim(chapter=5))", "chapter"),
        ("claims(a_claim(chapter=None))", "chapter"),
        ("claims(a_claim(paper=[1]))", "paper"),
        ("claims(a_claim(decided_by='nonsense'))", "nonsense"),
        ("claims(a_claim(whose=5))", "5"),
        ("claims(a_claim(sensitive='maybe'))", "sensitive"),
    ],
    "the ledger": [
        ("ledger('')", "one.json"),
        ("ledger('[')", "one.json"),
        ("ledger('[]')", "one.json"),
        ("ledger('{}')", "one.json"),
        ("ledger('null')", "one.json"),
        ("ledger(b'\\xff\\xfe')", "one.json"),
        ("ledger('[' * 100_000)", "one.json"),
        ("ledger(measured=['high'])", "one.json"),
        ("ledger(measured=5)", "one.json"),
        ("ledger(measured=None)", "one.json"),
        ("ledger(measured=[[1]])", "one.json"),
        ("ledger(measured='123')", "one.json"),
        ("ledger(profile='huge')", "huge"),
        ("ledger(profile=None)", "one.json"),
        ("ledger(profile='paper')", "paper"),
        ("ledger(date=5)", "one.json"),
        ("ledger(folder=True)", "one.json"),
        ("keep_claim({'id': '../../x'})", "'../../x'"),
        ("keep_claim({'id': '/elsewhere/x'})", "'/elsewhere/x'"),
        ("keep_claim({})", "id"),
        ("status_of('')", "03.json"),
        ("status_of('[')", "03.json"),
        ("status_of('{}')", "03.json"),
        ("status_of('[]')", "03.json"),
        ('status_of(\'{"chapter": "03"}\')', "03.json"),
        ("status_of(b'\\xff')", "03.json"),
    ],
    "what is read by its name": [
        (f"{read}(spoilt({name!r}, {kind!r}))", name.rpartition("/")[2])
        for name, read in NAMED.items()
        for kind in ("a folder", "a circle of links", "a pipe", "a socket", "rubbish")
    ],
    "documents and outputs": [
        ("read_document(Path('nowhere'))", "cannot read"),
        ("read_document(Path('.'))", "cannot read"),
        ("read_document(Path('a\\0b'))", "cannot read"),
        ("read_document(Path('x' * 5000))", "cannot read"),
        ("read_document(written(''))", "is empty"),
        ("read_document(written(' \\n\\t'))", "is empty"),
        ("read_document(written(b'\\xff\\xfe'))", "is not UTF-8"),
        ("read_document(written(b'caf\\xe9'))", "is not UTF-8"),
        ("write_report(written('x'))", "Not a directory"),
        ("write_report(written('x') / 'report')", "Not a directory"),
        ("write_report(Path('x' * 300))", "cannot write"),
        ("write_report(circle())", "cannot write"),
        ("read_document(circle())", "symbolic links"),
        ("write_report(Path('a\\0b'))", "cannot write"),
        ("write_page(Path('.'))", "is a folder"),
        ("write_page(written('x'))", "is there already"),
        ("write_page(written('x') / 'page.html')", "cannot write"),
        ("write_page(Path('x' * 300))", "cannot write"),
        ("write_page(Path('a\\0b'))", "cannot write"),
        ("write_page(Path('/proc/page.html'))", "cannot write"),
    ],
    "the environment": [
        ("cache_at('~nosuchuser/x')", "SINKBOOK_CACHE"),
        ("runs_at('~nosuchuser/x')", "SINKBOOK_RUNS"),
        ("training_at('/dev/null')", "SINKBOOK_RUNS"),
        ("training_at('/dev/null/x')", "SINKBOOK_RUNS"),
        ("training_at('/proc/runs')", "SINKBOOK_RUNS"),
        ("training_at('x' * 300)", "SINKBOOK_RUNS"),
        ("fetching_at('/dev/null')", "SINKBOOK_CACHE"),
        ("fetching_at('/proc/cache')", "SINKBOOK_CACHE"),
        ("cluster_at('nonsense')", "no Dask scheduler"),
        ("cluster_at('tcp://127.0.0.1:1')", "no Dask scheduler"),
        ("cluster_at('tcp://256.0.0.1:99999')", "no Dask scheduler"),
        ("cluster_at('')", "no Dask scheduler"),
        ("cluster_at('tls://127.0.0.1:1')", "no Dask scheduler"),
    ],
    "the command line": [
        ("run('probe', 'nonsense')", "no model named"),
        ("run('probe', '')", "after probe is empty"),
        ("run('probe', 'smollm2-135m', '--out', '')", "after --out is empty"),
        ("run('probe', 'smollm2-135m', '--out=')", "after --out is empty"),
        ("run('probe', 'smollm2-135m', '--text', '')", "after --text is empty"),
        ("run('fetch', '')", "after fetch is empty"),
        ("run('')", "an argument is empty"),
        ("run('run', '03', '--output', ' ')", "after --output is empty"),
        ("run('run', '03', '--output= ')", "after --output is empty"),
        ("run('probe', 'smollm2-135m', '--text=\\t')", "after --text is empty"),
        ("run('probe', 'smollm2-135m', '--length', '1e400')", "length"),
        ("run('probe', 'smollm2-135m', '--length', '9' * 400)", "length"),
        ("run('probe', 'smollm2-135m', '--domain', '\\udcff')", "no domain named"),
        ("run('probe', 'smollm2-135m', '--domain', 'a\\nb')", "no domain named"),
        ("run('probe', 'smollm2-135m', '--length', '1', '--length', 'many')", "length"),
        ("run('run', '03', '--seed', '1e400')", "seed"),
        ("run('run', '03', '--seed', '9' * 400)", "seed"),
        ("run('build', '--jobs', '0')", "jobs"),
        ("run('record', '--minutes', '-1')", "minutes"),
        ("run('record', '--minutes', '')", "after --minutes is empty"),
        ("run('claims', '--chapter', 'a\\nb')", "no chapter"),
        ("run('checkpoints', 'a/b', '--steps', '\\udcff')", "no list of steps"),
        ("run('checkpoints', 'a/b', '--steps', '-1,nan')", "no list of steps"),
        ("run('probe', '~nosuchuser/x')", "no model named"),
        ("run('probe', 'smollm2-135m', '--text', 'nowhere')", "cannot read"),
        ("run('probe', 'smollm2-135m', '--text', '.')", "cannot read"),
        ("run('probe', 'smollm2-135m', '--text', 'a', '--domain', 'code')", "not both"),
        ("run('probe', 'smollm2-135m', '--domain', 'nonsense')", "no domain named"),
        ("run('probe', 'smollm2-135m', '--texts', '0')", "texts"),
        ("run('probe', 'smollm2-135m', '--length', '1')", "length"),
        ("run('probe', 'smollm2-135m', '--length', 'many')", "length"),
        ("run('probe', 'smollm2-135m', '--out', written('x'))", "Not a directory"),
        ("run('probe', 'smollm2-135m', '--out', '/proc/x')", "/proc"),
        ("run('probe', 'smollm2-135m', '--fail-if', 'nonsense')", "nonsense"),
        ("run('probe', config(num_hidden_layers=1))", "no place for"),
        ("run('compare', 'smollm2-135m')", "B"),
        ("run('compare', 'smollm2-135m', '--int8-b', 'nonsense')", "nonsense"),
        ("run('compare', 'smollm2-135m', 'smollm2-135m', '--out', '.')", "is a folder"),
        ("run('compare', 'smollm2-135m', '--int8-b', 'token', '--out', '/proc/x')", "/proc"),
        ("run('checkpoints', 'a/b', '--list')", "no way to the hub"),
        ("run('checkpoints', 'not a model!')", "no model"),
        ("run('checkpoints', 'a/b', '--steps', 'all')", "no list of steps"),
        ("run('checkpoints', 'a/b', '--length', '0')", "length"),
        ("run('checkpoints', 'a/b', '--out', '/proc/x.nc')", "/proc"),
        ("run('checkpoints', 'a/b', '--out', '.')", "is a folder"),
        ("run('checkpoints', 'a/b', '--text', 'nowhere')", "cannot read"),
        ("run('fetch', 'nonsense')", "nothing named"),
        ("run('fetch', '../x')", "nothing named"),
        ("run('record', 'nonsense')", "no record named"),
        ("run('record', '../x')", "no record named"),
        ("run('record', 'league', '--device', 'gpu')", "device"),
        ("run('record', '--minutes', 'nan')", "minutes"),
        ("run('claims', '--chapter', 'nonsense')", "no chapter"),
        ("run('claims', '--verdict', 'nonsense')", "no verdict"),
        ("run('run', 'nonsense', '--dask', 'nonsense')", "no Dask scheduler"),
        ("run('run', '03', '--seed', '-1')", "seed"),
        ("run('run', '03', '--seed', str(2**31))", "seed"),
        ("run('run', '03', '--profile', 'huge')", "no profile named"),
        ("run('build', '--profile', 'huge')", "no profile named"),
    ],
}


class Places:
    """A new folder for each input."""

    def __init__(self, root: Path):
        self.root, self.numbers = root, itertools.count()

    def new(self) -> Path:
        """An empty one."""
        folder = self.root / str(next(self.numbers))
        folder.mkdir()
        return folder


def put(path: Path, content: str | bytes) -> Path:
    """Write a file, whatever stood there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def changed(path: Path, **entries) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def of_models(places: Places) -> dict:
    """What breaks a folder that holds a model."""
    from functools import partial

    from safetensors.torch import load_file, save_file

    from sinkbook.models.pretrained import load
    from sinkbook.probe.measure import measure_texts
    from tiny import WORDS, tiny_model, tiny_tokenizer

    whole = places.new()
    tiny_model(vocab_size=len(WORDS)).save_pretrained(whole)
    tiny_tokenizer().save_pretrained(whole)
    weights = load_file(whole / "model.safetensors")

    def copy() -> Path:
        return Path(shutil.copytree(whole, places.new(), dirs_exist_ok=True))

    def config(**entries) -> Path:
        changed((folder := copy()) / "config.json", **entries)
        return folder

    def tokenizer(**entries) -> Path:
        changed((folder := copy()) / "tokenizer.json", **entries)
        return folder

    def file(name, content, alone=False) -> Path:
        put((folder := copy()) / name, content)
        if alone:
            (folder / "model.safetensors").unlink()
        return folder

    def cut(name, share) -> Path:
        path = (folder := copy()) / name
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size) + 9])
        return folder

    def without(name) -> Path:
        ((folder := copy()) / name).unlink()
        return folder

    def folder_at(name) -> Path:
        without_it = without(name)
        (without_it / name).mkdir()
        return without_it

    def pipe_at(name) -> Path:
        without_it = without(name)
        os.mkfifo(without_it / name)
        return without_it

    def link(name, to) -> Path:
        without_it = without(name)
        (without_it / name).symlink_to(to)
        return without_it

    def index(weight_map, linked=None) -> Path:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        folder = file("model.safetensors.index.json", text, alone=True)
        if linked:
            (folder / "linked.safetensors").symlink_to(linked)
        return folder

    def tensors(change, probed=False) -> Path:
        found = {name: change(name, values) for name, values in weights.items()}
        found = {name: values.contiguous() for name, values in found.items() if values is not None}
        save_file(found, (folder := copy()) / "model.safetensors", {"format": "pt"})
        if probed:
            measure_texts(load(folder, device="cpu"), ["to be"])
        return folder

    def more(with_) -> Path:
        found = weights | {with_: weights["model.norm.weight"].clone()}
        save_file(found, (folder := copy()) / "model.safetensors", {"format": "pt"})
        return folder

    return locals() | {"load": partial(load, device="cpu")}


def of_gguf(places: Places) -> dict:
    """What breaks a GGUF file."""
    import gguf as library

    from tiny import GGUF_TOKENS, tiny_model, write_tiny_gguf

    model = tiny_model(vocab_size=len(GGUF_TOKENS))
    write_tiny_gguf(places.new() / "whole.gguf", model)
    whole = (places.root / str(next(places.numbers) - 1) / "whole.gguf").read_bytes()

    def gguf_of(content) -> Path:
        return put(places.new() / "model.gguf", content)

    def gguf_cut(share) -> Path:
        return gguf_of(whole[: int(share * len(whole))])

    def gguf_at(place, value, width=4) -> Path:
        return gguf_of(whole[:place] + value.to_bytes(width, "little") + whole[place + width :])

    def gguf(about) -> Path:
        def over(writer) -> None:
            class Over:
                def __getattr__(self, name):
                    def add(*arguments):
                        known = {key: None for data in writer.kv_data for key in data}
                        kept = [dict(data) for data in writer.kv_data]
                        for data in writer.kv_data:
                            data.clear()
                        getattr(writer, name)(*arguments)
                        new = dict(writer.kv_data[0])
                        writer.kv_data[0].clear()
                        writer.kv_data[0].update(kept[0] | new)
                        assert known

                    return add

            about(Over())

        path = places.new() / "model.gguf"
        write_tiny_gguf(path, model, over)
        return path

    def gguf_folder() -> Path:
        (folder := places.new() / "model.gguf").mkdir()
        return folder

    kinds = library.GGUFValueType
    return locals() | {"text": kinds.STRING, "number": kinds.UINT32}


def of_the_book(places: Places) -> dict:
    """What breaks records, claims and what the cache keeps of chapters."""
    import xarray as xr
    import yaml

    from sinkbook.book import claims as book_claims
    from sinkbook.book import records
    from sinkbook.book.build import check_contents
    from sinkbook.book.chapters import status, status_folder
    from sinkbook.book.notebooks import read_notebook
    from sinkbook.book.records import kept
    from sinkbook.pages import vendor
    from sinkbook.pages.publishing import addresses

    root = records.path_of("optimizers").parents[2]
    plain = {
        "id": "one",
        "chapter": "01_one",
        "source": "arithmetic",
        "statement": "One is one.",
        "quantity": "one",
        "criterion": {"quick": ">= 1"},
    }

    def here() -> Path:
        folder = places.new()
        put(folder / "_toc.yml", "root: book/index")
        put(folder / "book" / "claims.yml", yaml.safe_dump([plain]))
        os.chdir(folder)
        os.environ["SINKBOOK_CACHE"] = str(folder / "cache")
        return folder

    def record(content=None, share=None, dataset=..., name="optimizers", **facts) -> str:
        if share is not None:
            content = (root / "book" / "records" / f"{name}.nc").read_bytes()
            content = content[: int(share * len(content))]
        path = put(here() / "book" / "records" / f"{name}.nc", content or b"")
        if facts:
            found = xr.load_dataset(root / "book" / "records" / f"{name}.nc", engine="h5netcdf")
            kept = {
                fact: value for fact, value in (found.attrs | facts).items() if value is not None
            }
            found.attrs = kept
            found.to_netcdf(path, engine="h5netcdf")
        elif dataset is not ...:
            xr.Dataset(dataset).to_netcdf(path, engine="h5netcdf")
        return name

    def weights_of(content):
        folder = here() / "book" / "records"
        put(folder / "one-layer.safetensors", content)
        shutil.copy(root / "book" / "records" / "one-layer.nc", folder)
        return records.run_of("one-layer", next(iter(kept.paper_scale.GROUPS["one-layer"]())))

    def table_of(name, content):
        folder = here() / "book" / "records"
        if content is not None:
            put(folder / f"{name}.csv", content)
        return records.paper_one_layer() if name.endswith("layer") else records.paper_olmo()

    def a_claim(**entries) -> str:
        return yaml.safe_dump([plain | entries])

    def claims(content):
        put(here() / "book" / "claims.yml", content)
        return str(book_claims.ledger())

    def ledger(content=None, folder=False, **entries):
        here()
        measured = {"id": "one", "profile": "quick", "measured": [1.0], "date": "2026-01-01"}
        path = book_claims.ledger_folder() / "one.json"
        if folder:
            path.mkdir(parents=True)
        else:
            put(path, json.dumps(measured | entries) if content is None else content)
        return str(book_claims.ledger()), repr(book_claims.ledger()._repr_html_())

    def keep_claim(measured):
        here()
        return book_claims.keep(measured)

    def status_of(content):
        put((here() / "book" / "03.ipynb"), "{}")
        put(status_folder() / "03.json", content)
        return status()._repr_html_()

    def spoilt(name, kind) -> Path:
        """A repository in which something else is where a file should be."""
        root_of_it = here()
        put(root_of_it / "_config.yml", "")
        put(root_of_it / "book" / "03.ipynb", "{}")
        path = put(root_of_it / name, b"\xff\xfe\x00")
        if kind != "rubbish":
            path.unlink()
        if kind == "a folder":
            path.mkdir()
        elif kind == "a circle of links":
            path.symlink_to(path.name)
        elif kind == "a pipe":
            os.mkfifo(path)
        elif kind == "a socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        return root_of_it

    def contents_of(folder):
        return check_contents(folder)

    def addresses_of(folder):
        return addresses(folder)

    def ledger_of(_):
        return str(book_claims.ledger())

    def status_of_all(_):
        return status()

    def record_of(_):
        return records.about("optimizers"), records.load("optimizers")

    def first_run_of(folder):
        shutil.copy(root / "book" / "records" / "one-layer.nc", folder / "book" / "records")
        return records.run_of("one-layer", next(iter(kept.paper_scale.GROUPS["one-layer"]())))

    def paper_of(_):
        return records.paper_one_layer()

    def packages_of(folder):
        vendor.install(folder)

    def chapter_of(folder):
        return read_notebook(folder / "book" / "03.ipynb")

    def about_record(name):
        return records.about(name)

    def load_record(name):
        return records.about(name), records.load(name)

    return locals()


def of_places(places: Places) -> dict:
    """Documents, outputs, the environment, and the command line."""
    import contextlib
    import io
    import sys

    import torch

    from sinkbook import cli, parallel
    from sinkbook.data import corpora
    from sinkbook.errors import SinkbookError
    from sinkbook.files import cache_folder
    from sinkbook.models.token_windows import read_document
    from sinkbook.report import comparison_page, report
    from sinkbook.store import runs_folder
    from sinkbook.toy.runs import TrainingConfig
    from sinkbook.toy.tasks import TaskConfig
    from sinkbook.toy.training import train
    from sinkbook.toy.transformer import TransformerConfig
    from tiny import tiny_model, tiny_reader

    class ToldError(SinkbookError):
        """What the command line said, which is the message of an error."""

    windows = torch.arange(8).repeat(2, 2)
    result = report.measure_windows(tiny_reader(tiny_model()), windows)
    result.attrs |= {"texts": "a test", "command": "sinkbook probe", "weights": "tiny"}
    comparison_page.comparison_page = lambda comparison: "a page"
    runs = os.environ.get("SINKBOOK_RUNS", "")
    known = dict(os.environ)

    def written(content) -> Path:
        return put(places.new() / "document.txt", content)

    def circle() -> Path:
        (path := places.new() / "circle").symlink_to("circle")
        return path

    def write_report(folder):
        report.write(result, folder)

    def write_page(path):
        comparison_page.write(None, path)

    def cache_at(folder):
        os.environ["SINKBOOK_CACHE"] = folder
        return cache_folder()

    def runs_at(folder):
        os.environ["SINKBOOK_RUNS"] = folder
        return runs_folder()

    def training_at(folder):
        os.environ.update(known | {"SINKBOOK_RUNS": folder})
        os.environ.pop("SINKBOOK_CACHE", None)
        try:
            small = {"task": TaskConfig(length=8), "model": TransformerConfig(length=8, width=4)}
            return train(TrainingConfig(**small, steps=1, batch_size=1, evaluation_size=1))
        finally:
            os.environ["SINKBOOK_RUNS"] = runs

    def fetching_at(folder):
        os.environ["SINKBOOK_CACHE"] = folder
        return corpora.fetch("shakespeare")

    def cluster_at(address):
        with parallel.cluster(address, patience="1s"):
            pass

    def run(*arguments):
        os.environ.update(known)
        os.environ.pop("SINKBOOK_CACHE", None)
        os.chdir(places.new())
        sys.argv = ["sinkbook", *map(str, arguments)]
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                cli.main()
            except SystemExit as end:
                if end.code and "Traceback" not in said.getvalue():
                    raise ToldError(said.getvalue()) from None
        raise AssertionError(said.getvalue())

    return locals() | {"read_document": read_document, "Path": Path}


def names() -> dict:
    """All that the inputs name."""
    import pickle
    import zipfile
    from tempfile import mkdtemp

    places = Places(Path(mkdtemp(dir=Path.cwd())))
    with zipfile.ZipFile(places.root / "a.zip", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({}))
    return {
        **{"json": json, "nan": float("nan"), "pickle": pickle.dumps({})},
        "zip_file": (places.root / "a.zip").read_bytes(),
        "pointer": f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 9\n",
        **of_models(places),
        **of_gguf(places),
        **of_the_book(places),
        **of_places(places),
    }
