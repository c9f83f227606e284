"""What a chapter is run with: the profile, which decides sizes, and the seed.

The sizes themselves are in `experiments.py`, for pretrained models in `llm_experiments.py`.
"""

from dataclasses import dataclass

from sinkbook.annotations import check_fields
from sinkbook.arguments import check_seed
from sinkbook.errors import SinkbookError

# An environment variable that holds a command. Where it is set, measurements of pretrained models
# are kept and none is read; the command makes them again.
KEEP = "SINKBOOK_KEEP"
PROFILES = ("quick", "paper")


def check_profile(profile: str) -> str:
    """The profile's name, or an error that names the ones there are.

    >>> check_profile("quick")
    'quick'
    """
    if profile not in PROFILES:
        raise SinkbookError(
            f"no profile named {profile!r}. There are two: quick (minutes on two CPU cores) and "
            "paper (the paper's own sizes, for one GPU)."
        )
    return profile


@dataclass(frozen=True)
class Settings:
    """A profile and a seed. Raises `SinkbookError` for a profile that is none.

    >>> Settings("quick").quick, Settings("paper", seed=1).seed
    (True, 1)
    """

    profile: str
    seed: int = 0

    def __post_init__(self) -> None:
        check_profile(self.profile)
        check_fields(self)
        check_seed(self.seed)

    @property
    def quick(self) -> bool:
        return self.profile == "quick"
