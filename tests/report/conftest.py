"""A tiny model in a folder, a document, and the commands that read them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tiny import HAMLET, tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A tiny random Llama in a folder."""
    place = tmp_path_factory.mktemp("model")
    tiny_model(max_position_embeddings=48).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def document(tmp_path) -> Path:
    path = tmp_path / "hamlet.txt"
    path.write_text(HAMLET)
    return path


@pytest.fixture
def sinkbook_cli(request) -> Callable[..., tuple[int, str, str]]:
    """Run any command in this process: exit status, stdout, stderr."""
    return request.getfixturevalue("sinkbook").func


@pytest.fixture
def sinkbook(sinkbook) -> Callable[..., tuple[int, str, str]]:
    """Run `sinkbook probe` in this process: exit status, stdout, stderr."""
    return partial(sinkbook, "probe")
