"""What pretrained models read, and how much of it at each profile; see `experiments.py`."""

from dataclasses import dataclass

from sinkbook.book.settings import Settings
from sinkbook.models.pretrained import LanguageModel


@dataclass(frozen=True)
class DormantHeads:
    """What a profile decides in the search for dormant heads."""

    texts: int  # of each domain: half of them choose heads, half of them test them
    trial_texts: int  # of the first half, on which candidates are taken away in a trial
    candidates: int  # heads that each detector proposes
    shortlist: int  # candidates that are tested
    random_heads: int  # controls
    length: int = 128  # tokens of a text, as in the paper's Figure 8


@dataclass(frozen=True)
class Anatomy:
    """What a profile decides where a pretrained model is taken apart."""

    cut_texts: int  # texts on which every attention and every MLP is silenced in turn
    cut_length: int  # tokens of each
    texts: int  # other texts, on which what was found is tested
    length: int
    unit_counts: tuple[int, ...] = (1, 2, 4, 16)  # units of an MLP silenced together


@dataclass(frozen=True)
class Consequences:
    """What a profile decides where tokens are dropped, states rounded and heads cut."""

    streams: int  # texts that are read with a window
    stream_length: int
    window: int
    stride: int  # steps of the window that is read afresh
    texts: int  # texts read in eight bits
    text_length: int
    prompts: int  # texts whose beginning loses keys
    prompt: int  # tokens of it
    continuation: int  # tokens after it
    budgets: tuple[int, ...]  # keys that each head keeps
    pruned_texts: int  # texts of each domain read without some heads; as many others choose these
    pruned_length: int
    shares: tuple[float, ...] = (0.05, 0.1)  # of all heads


def dormant_heads(settings: Settings) -> DormantHeads:
    """How many texts and heads the search for dormant heads has at a profile."""
    if settings.quick:
        return DormantHeads(texts=16, trial_texts=4, candidates=5, shortlist=4, random_heads=12)
    return DormantHeads(texts=256, trial_texts=32, candidates=24, shortlist=16, random_heads=64)


def anatomy(settings: Settings) -> Anatomy:
    """How many texts, and how long, a pretrained model is taken apart on at a profile."""
    quick = Anatomy(cut_texts=4, cut_length=48, texts=8, length=96)
    paper = Anatomy(cut_texts=16, cut_length=128, texts=128, length=128)
    return {"quick": quick, "paper": paper}[settings.profile]


def consequences(settings: Settings) -> Consequences:
    """How many texts, and how long, pay for dropped tokens, rounded states and cut heads."""
    quick = Consequences(
        streams=4,
        stream_length=192,
        window=64,
        stride=16,
        texts=8,
        text_length=128,
        prompts=5,
        prompt=128,
        continuation=32,
        budgets=(16, 32, 64),
        pruned_texts=4,
        pruned_length=80,
    )
    paper = Consequences(
        streams=32,
        stream_length=4096,
        window=512,
        stride=64,
        texts=64,
        text_length=160,  # few articles of the domain are longer
        prompts=64,
        prompt=128,
        continuation=64,
        budgets=(16, 32, 64, 96),
        pruned_texts=32,
        pruned_length=128,
        shares=(0.05, 0.1, 0.15, 0.2),
    )
    return {"quick": quick, "paper": paper}[settings.profile]


def short_texts(language_model: LanguageModel) -> dict[str, str]:
    """Texts that are short enough for the attention map of every head, by name.

    The last has two beginnings, if the model puts a token of its own before a text.
    """
    sentence = "Green tea cools slowly beside an open window."
    turns = "He read the letter again. Puis il est sorti dans la rue avec son chien."
    begins = language_model.tokenizer.decode(language_model.prefix)
    return {
        "said twice": f"{sentence} {sentence}",
        "from the paper": "Summer is warm. Winter is cold.",
        "Python": "def area(width, height):\n    return width * height\n",
        "two languages": turns,
        "numbers": "3, 14, 15, 92, 65, 35",
        "two documents": f"The ferry leaves at noon.{begins}Mix flour and water, then wait.",
    }
