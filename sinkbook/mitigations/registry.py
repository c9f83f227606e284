"""Every known way of being rid of extreme tokens, by name: what it changes in a training.

`MITIGATIONS` is the registry of the league table. A mitigation is a few changes to the configs of
task, model and training: adding one is a line here, and a function in `toy/attention.py` if it
needs a new kernel. `under_mitigations` applies them all to one training.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from sinkbook.annotations import check_arguments
from sinkbook.errors import SinkbookError
from sinkbook.toy.runs import TrainingConfig, seeds_of
from sinkbook.toy.tasks import task

# What each family does about a head that has nothing to say, in the order of the table.
FAMILIES = {
    "control": "changes nothing about it",
    "no normalisation": "lets its weights add up to less than 1",
    "null slot": "gives it somewhere else to look",
    "gate": "lets it be silent whatever it looks at",
    "norm": "changes what a norm makes of large states",
    "optimizer": "changes how weights move",
}


@dataclass(frozen=True)
class Mitigation:
    """One row of the league table: its name in figures, its family, where it comes from, and the
    fields of `TransformerConfig`, `TrainingConfig` and `TaskConfig` that make it."""

    label: str
    family: str  # a name in FAMILIES
    source: str  # whose it is, with an arXiv number where there is one
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0  # its learning rate, in those of AdamW

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise SinkbookError(f"no family {self.family!r}. Known: {', '.join(FAMILIES)}.")

    def applied_to(self, config: TrainingConfig) -> TrainingConfig:
        """The training of `config` with the mitigation, on a vocabulary that fits its task."""
        made = replace(config.task, **self.task)
        model = replace(config.model, vocab_size=task(made).vocab_size, **self.model)
        rate = self.rate * config.learning_rate
        changes = {"task": made, "model": model, "learning_rate": rate}
        return replace(config, **changes | self.training)


MITIGATIONS: dict[str, Mitigation] = {
    "softmax": Mitigation("softmax", "control", "Vaswani et al., 1706.03762"),
    "qk-norm": Mitigation("QK norm", "control", "Henry et al., 2010.04245", {"qk_norm": True}),
    "random-first": Mitigation(
        "random first token", "control", "Gu et al., 2410.10781", task={"random_first": True}
    ),
    "relu": Mitigation(
        "ReLU / t", "no normalisation", "Guo et al., 2410.13835", {"attention": "relu"}
    ),
    "sigmoid": Mitigation(
        "sigmoid", "no normalisation", "Ramapuram et al., 2409.04431", {"attention": "sigmoid"}
    ),
    "softpick": Mitigation(
        "softpick", "no normalisation", "Zuhri et al., 2504.20966", {"attention": "softpick"}
    ),
    "clipped-softmax": Mitigation(
        "clipped softmax",
        "no normalisation",
        "Bondarenko et al., 2306.12929",
        {"attention": "clipped-softmax"},
    ),
    "differential": Mitigation(
        "differential",
        "no normalisation",
        "Ye et al., 2410.05258",
        {"attention": "differential", "head_norm": True},
    ),
    "softmax-1": Mitigation(
        "softmax-1", "null slot", "Miller; Kaul et al., 2410.17174", {"attention": "softmax-1"}
    ),
    "sink-logit": Mitigation(
        "sink logit", "null slot", "OpenAI, gpt-oss", {"attention": "sink-logit"}
    ),
    "key-bias": Mitigation(
        "key bias, v = 0", "null slot", "Gu et al., 2410.10781", {"attention": "key-bias"}
    ),
    "head-gate": Mitigation("head gate", "gate", "Bondarenko et al., 2306.12929", {"gate": "head"}),
    "element-gate": Mitigation(
        "element gate", "gate", "Qiu et al., 2505.06708", {"gate": "element"}
    ),
    "value-gate": Mitigation("value gate", "gate", "Bu et al., 2510.09017", {"gate": "value"}),
    "head-norm": Mitigation("head norm", "norm", "2605.06611", {"head_norm": True}),
    "post-norm": Mitigation("post-norm", "norm", "Gu et al., 2410.10781", {"norm_place": "post"}),
    "sandwich-norm": Mitigation(
        "sandwich norm", "norm", "Ding et al., 2105.13290", {"norm_place": "sandwich"}
    ),
    "single-scale-norm": Mitigation(
        "SSNorm", "norm", "Park et al., 2506.19697", {"norm": "single-scale"}
    ),
    "gated-norm": Mitigation("GatedNorm", "norm", "2601.22966", {"norm": "gated"}),
    "dynamic-tanh": Mitigation("DyT", "norm", "Zhu et al., 2503.10622", {"norm": "tanh"}),
    "sgd": Mitigation(
        "SGD", "optimizer", "Guo et al., 2410.13835", training={"optimizer": "sgd"}, rate=100 / 3
    ),
    "muon": Mitigation(
        "Muon", "optimizer", "Park et al., 2506.19697", training={"optimizer": "muon"}
    ),
    "orthoadam": Mitigation(
        "OrthoAdam", "optimizer", "Kaul et al., 2410.17174", training={"optimizer": "orthoadam"}
    ),
    "soap": Mitigation(
        "SOAP", "optimizer", "Vyas et al., 2409.11321", training={"optimizer": "soap"}
    ),
}


@check_arguments
def under_mitigations(base: TrainingConfig, count: int) -> dict[str, list[TrainingConfig]]:
    """A training under every mitigation of the registry, with `count` seeds, by its name there."""
    return {name: seeds_of(m.applied_to(base), count) for name, m in MITIGATIONS.items()}


# What decides between `<s>` and a null slot, one change each.
SLOT_CONTROLS = {
    "as it is": {},
    "no <s>": {"task": {"starts": 0}},
    "random first token": {"task": {"random_first": True}},
    "slot 10 × as fast": {"model": {"null_slot_speed": 10.0}},
}


@check_arguments
def under_slot_controls(
    groups: dict[str, list[TrainingConfig]],
) -> dict[str, dict[str, list[TrainingConfig]]]:
    """Those of a league's trainings that have a null slot, under each of `SLOT_CONTROLS`.

    By control and name. The slot of softmax-1 learns nothing and has no speed.
    """
    names = [name for name, m in MITIGATIONS.items() if m.family == "null slot"]
    found: dict[str, dict[str, list[TrainingConfig]]] = {}
    for control, changes in SLOT_CONTROLS.items():
        change = Mitigation(control, "control", "", **changes)
        found[control] = {
            name: [change.applied_to(config) for config in configs]
            for name, configs in groups.items()
            if name in names and not (name == "softmax-1" and "model" in changes)
        }
    return found
