"""Pretrained models: how they are loaded, laid out, intervened on and fed with texts.

`load` and `LanguageModel` stand here too; they are imported, with transformers, when asked for.
"""

__all__ = ["LanguageModel", "load"]


def __getattr__(name: str) -> object:
    """Import what loads models, and transformers with it, only when it is asked for."""
    if name in __all__:
        from sinkbook.models import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module 'sinkbook.models' has no attribute {name!r}")
